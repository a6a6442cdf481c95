// Values for tests.
#pragma once

#include <cstddef>
#include <random>
#include <vector>

inline std::vector<float> normal(std::size_t count, float scale, std::mt19937& random) {
    std::normal_distribution<float> draw(0, scale);
    std::vector<float> values(count);
    for (float& value : values) value = draw(random);
    return values;
}
