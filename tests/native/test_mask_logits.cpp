// Masks from logits: against every pixel computed by itself, at sizes up and down, one thread and several.
#include "mask_logits.hpp"

#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>

namespace {

struct Sample {
    std::size_t below, above;
    float weight_below, weight_above;
};

Sample sample(std::size_t source, std::size_t target, std::size_t i) {
    const float scale = static_cast<float>(source) / static_cast<float>(target);
    const float position = std::max(std::fma(scale, static_cast<float>(i) + 0.5F, -0.5F), 0.0F);
    const auto below = std::min(static_cast<std::size_t>(position), source - 1);
    const float weight = std::clamp(position - static_cast<float>(below), 0.0F, 1.0F);
    return {below, std::min(below + 1, source - 1), 1.0F - weight, weight};
}

// One resize by the definition, every pixel: columns first, then rows.
std::vector<float> resize(const std::vector<float>& image, std::size_t height, std::size_t width, std::size_t to_height,
                          std::size_t to_width) {
    std::vector<float> resized;
    for (std::size_t y = 0; y < to_height; ++y) {
        const Sample row = sample(height, to_height, y);
        for (std::size_t x = 0; x < to_width; ++x) {
            const Sample column = sample(width, to_width, x);
            const auto at = [&](std::size_t i) {
                return std::fma(image[i * width + column.below], column.weight_below,
                                image[i * width + column.above] * column.weight_above);
            };
            resized.push_back(std::fma(at(row.below), row.weight_below, at(row.above) * row.weight_above));
        }
    }
    return resized;
}

std::vector<std::uint8_t> by_definition(const std::vector<float>& logits, const regionspot::MaskFrame& sizes) {
    const std::size_t frame = sizes.frame, height = sizes.valid[0], width = sizes.valid[1];
    const std::vector<float> whole = resize(logits, sizes.low_res[0], sizes.low_res[1], frame, frame);
    std::vector<float> valid;
    for (std::size_t y = 0; y < height; ++y) {
        const auto row = whole.begin() + static_cast<std::ptrdiff_t>(y * frame);
        valid.insert(valid.end(), row, row + static_cast<std::ptrdiff_t>(width));
    }
    std::vector<std::uint8_t> mask;
    for (const float logit : resize(valid, height, width, sizes.picture[0], sizes.picture[1])) mask.push_back(logit > 0);
    return mask;
}

void check_masks(const std::vector<std::vector<float>>& logits, const regionspot::MaskFrame& sizes) {
    std::vector<float> joined;
    for (const auto& one : logits) joined.insert(joined.end(), one.begin(), one.end());
    const std::size_t height = sizes.picture[0], width = sizes.picture[1];
    for (const std::size_t threads : {1, 3}) {
        const auto found = regionspot::masks_from_logits(joined.data(), logits.size(), sizes, threads);
        CHECK(found.size() == logits.size());
        for (std::size_t i = 0; i < logits.size(); ++i) {
            const std::vector<std::uint8_t> mask = by_definition(logits[i], sizes);
            const regionspot::Runs runs =
                regionspot::runs_from_mask({mask.data(), height, width, static_cast<std::ptrdiff_t>(width), 1});
            CHECK(found[i].counts == regionspot::text_from_runs(runs));
            CHECK(found[i].area == regionspot::area(runs));
            std::array<std::size_t, 4> box{width, height, 0, 0};
            for (std::size_t p = 0; p < mask.size(); ++p) {
                if (!mask[p]) continue;
                box = {std::min(box[0], p % width), std::min(box[1], p / width), std::max(box[2], p % width + 1),
                       std::max(box[3], p / width + 1)};
            }
            if (found[i].area == 0) box = {0, 0, 0, 0};
            CHECK(found[i].box == box);
        }
    }
}

std::vector<float> noise(std::size_t count, unsigned seed, float offset) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& value : values) value = normal(random) + offset;
    return values;
}

}  // namespace

int main() {
    const regionspot::MaskFrame sizes[] = {
        {{16, 16}, 64, {64, 64}, {64, 64}},   {{16, 16}, 64, {36, 64}, {108, 193}}, {{16, 16}, 64, {64, 43}, {21, 15}},
        {{16, 16}, 64, {1, 64}, {1, 300}},    {{16, 16}, 64, {64, 1}, {300, 1}},    {{5, 7}, 31, {29, 31}, {47, 61}},
        {{1, 1}, 4, {4, 4}, {3, 5}},
    };
    for (const regionspot::MaskFrame& size : sizes) {
        const std::size_t count = size.low_res[0] * size.low_res[1];
        std::vector<float> odd = noise(count, 5, 0.0F);  // values that a sum or a product may swallow
        for (std::size_t i = 0; i < count; i += 3) odd[i] = (i % 2) ? 1e-44F : -0.0F;
        for (std::size_t i = 1; i < count; i += 7) odd[i] = std::numeric_limits<float>::infinity();
        for (std::size_t i = 2; i < count; i += 11) odd[i] = std::numeric_limits<float>::quiet_NaN();
        check_masks({noise(count, 1, 0.0F), noise(count, 2, 1.5F), noise(count, 3, -1.5F), odd,
                     std::vector<float>(count, 1.0F), std::vector<float>(count, 0.0F)},
                    size);
    }
    CHECK(regionspot::masks_from_logits(nullptr, 0, sizes[0], 2).empty());
    return 0;
}
