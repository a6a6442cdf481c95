// Products of matrices against sums in double precision, at each level of an instruction set.
#include "matrix.hpp"

#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#define REGIONSPOT_KERNELS "matrix.inl"
#include "levels.hpp"

namespace {

constexpr float kUntouched = 7;

void test_product(std::size_t rows, std::size_t depth, std::size_t width, bool add) {
    std::mt19937 random(5);
    std::normal_distribution<float> draw(0, 1);
    const std::size_t of_a = depth + 3, of_b = width + 16, of_c = width + 5;  // strides
    std::vector<float> a(rows * of_a), b((depth + 1) * of_b), c((rows + 1) * of_c, kUntouched);
    for (float& value : a) value = draw(random);
    for (float& value : b) value = draw(random);
    REGIONSPOT_BEST(multiply)({a.data(), of_a}, rows, {b.data(), of_b}, depth, width, {c.data(), of_c}, add);
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t column = 0; column < width; ++column) {
            double sum = add ? kUntouched : 0;
            for (std::size_t k = 0; k < depth; ++k) sum += static_cast<double>(a[row * of_a + k]) * b[k * of_b + column];
            CHECK(std::abs(c[row * of_c + column] - sum) < 1e-4);
        }
        CHECK(std::all_of(c.begin() + static_cast<std::ptrdiff_t>(row * of_c + width),
                          c.begin() + static_cast<std::ptrdiff_t>((row + 1) * of_c),
                          [](float value) { return value == kUntouched; }));
    }
    CHECK(std::all_of(c.end() - static_cast<std::ptrdiff_t>(of_c), c.end(), [](float value) { return value == kUntouched; }));
}

}  // namespace

int main() {
    for (std::size_t rows = 1; rows <= 19; ++rows) {
        for (const std::size_t depth : {0, 1, 3, 4, 5, 16, 27, 128}) {
            for (const std::size_t width : {16, 48, 64, 80, 192}) {
                for (const bool add : {false, true}) test_product(rows, depth, width, add);
            }
        }
    }
    return 0;
}
