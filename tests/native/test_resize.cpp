// The resize on its own: what Pillow 13 gives for a small picture, and a plain loop over pixels for random sizes.
#include "resize.hpp"

#include "check.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>
#include <vector>

namespace {

using regionspot::RgbSource;
using regionspot::RgbTarget;

struct Picture {
    std::size_t height, width;
    std::vector<std::uint8_t> bytes;

    Picture(std::size_t rows, std::size_t columns) : height(rows), width(columns), bytes(rows * columns * 3) {}

    [[nodiscard]] std::ptrdiff_t stride() const { return static_cast<std::ptrdiff_t>(width * 3); }
    [[nodiscard]] RgbSource source() const { return {bytes.data(), height, width, stride()}; }
    [[nodiscard]] RgbTarget target() { return {bytes.data(), height, width, stride()}; }

    [[nodiscard]] Picture transposed() const {
        Picture turned(width, height);
        for (std::size_t y = 0; y < height; ++y) {
            for (std::size_t x = 0; x < width; ++x) {
                std::copy_n(&bytes[(y * width + x) * 3], 3, &turned.bytes[(x * height + y) * 3]);
            }
        }
        return turned;
    }
};

Picture random_picture(std::mt19937& random, std::size_t height, std::size_t width) {
    Picture picture(height, width);
    const bool extreme = random() % 4 == 0;  // sums come close to their limits
    for (std::uint8_t& byte : picture.bytes) {
        byte = static_cast<std::uint8_t>(extreme ? 255 * (random() % 8 != 0) : random());
    }
    return picture;
}

Picture resize_width(const Picture& from, std::size_t width) {
    if (from.width == width) return from;
    Picture to(from.height, width);
    const double scale = static_cast<double>(from.width) / static_cast<double>(width), support = std::max(scale, 1.0);
    for (std::size_t x = 0; x < width; ++x) {
        const double centre = (static_cast<double>(x) + 0.5) * scale;
        const int first = std::max(static_cast<int>(centre - support + 0.5), 0);
        const int end = std::min(static_cast<int>(centre + support + 0.5), static_cast<int>(from.width));
        const auto weight = [&](int i) { return std::max(1 - std::abs((i - centre + 0.5) * (1 / support)), 0.0); };
        double total = 0;
        for (int i = first; i < end; ++i) total += weight(i);
        for (std::size_t y = 0; y < from.height; ++y) {
            for (std::size_t channel = 0; channel < 3; ++channel) {
                std::int64_t sum = 1 << 21;
                for (int i = first; i < end; ++i) {
                    const std::size_t at = (y * from.width + static_cast<std::size_t>(i)) * 3 + channel;
                    sum += static_cast<std::int64_t>(weight(i) / total * (1 << 22) + 0.5) * from.bytes[at];
                }
                const std::int64_t byte = std::clamp<std::int64_t>(sum >> 22, 0, 255);
                to.bytes[(y * width + x) * 3 + channel] = static_cast<std::uint8_t>(byte);
            }
        }
    }
    return to;
}

Picture resize_height(const Picture& from, std::size_t height) {
    return resize_width(from.transposed(), height).transposed();
}

Picture expected(const Picture& from, std::size_t height, std::size_t width) {
    const auto shorter = static_cast<std::int64_t>(from.height) - static_cast<std::int64_t>(height);
    const auto narrower = static_cast<std::int64_t>(from.width) - static_cast<std::int64_t>(width);
    if (shorter > 0 && shorter > 2 * narrower) return resize_width(resize_height(from, height), width);
    return resize_height(resize_width(from, width), height);
}

void test_known_picture() {
    Picture from(2, 3);
    from.bytes = {0, 10, 20, 100, 110, 120, 200, 210, 220, 255, 0, 255, 0, 255, 0, 30, 60, 90};
    Picture larger(3, 4), smaller(1, 2), copy(2, 3);
    const std::array<RgbTarget, 3> targets{larger.target(), smaller.target(), copy.target()};
    regionspot::resize_rgb(from.source(), targets, 1);
    CHECK(larger.bytes == (std::vector<std::uint8_t>{0, 10, 20, 63, 73, 83, 138, 148, 158, 200, 210, 220,  //
                                                     128, 5, 138, 80, 116, 90, 75, 165, 96, 115, 135, 155,  //
                                                     255, 0, 255, 96, 159, 96, 11, 182, 34, 30, 60, 90}));
    CHECK(smaller.bytes == (std::vector<std::uint8_t>{99, 72, 109, 91, 153, 120}));
    CHECK(copy.bytes == from.bytes);
}

void test_random_sizes() {
    std::mt19937 random(0);
    const auto side = [&] { return 1 + random() % (random() % 2 ? 12 : 150); };
    for (int trial = 0; trial < 400; ++trial) {
        const Picture from = random_picture(random, side(), side());
        std::vector<Picture> to;
        for (int i = 0; i < 3; ++i) {
            const std::size_t height = random() % 6 ? side() : from.height, width = random() % 6 ? side() : from.width;
            to.emplace_back(height, width);
        }
        const std::array<RgbTarget, 3> targets{to[0].target(), to[1].target(), to[2].target()};
        regionspot::resize_rgb(from.source(), targets, 1 + random() % 3);
        for (const Picture& picture : to) CHECK(picture.bytes == expected(from, picture.height, picture.width).bytes);
    }
}

void test_slivers() {
    std::mt19937 random(1);
    const std::size_t sizes[][4] = {{1, 1, 40, 30},  {1, 5000, 1, 256},  {5000, 1, 224, 224}, {3, 70000, 2, 50},
                                    {70000, 2, 9, 1}, {1, 70000, 1, 1}, {40000, 1, 1, 1},    {20, 65536, 10, 7}};
    for (const auto& [height, width, to_height, to_width] : sizes) {
        const Picture from = random_picture(random, height, width);
        Picture to(to_height, to_width);
        const std::array<RgbTarget, 1> targets{to.target()};
        regionspot::resize_rgb(from.source(), targets, 2);
        CHECK(to.bytes == expected(from, to_height, to_width).bytes);
    }
}

// Large enough for several threads, into a part of a frame, from a part of a picture that stands on its head.
void test_views_and_threads() {
    std::mt19937 random(2);
    const Picture whole = random_picture(random, 700, 900);
    const RgbSource part{&whole.bytes[(650 * whole.width + 11) * 3], 620, 850, -whole.stride()};
    Picture upright(part.height, part.width);
    for (std::size_t y = 0; y < part.height; ++y) {
        const std::uint8_t* const row = part.data + static_cast<std::ptrdiff_t>(y) * part.row_stride;
        std::copy_n(row, part.width * 3, &upright.bytes[y * part.width * 3]);
    }
    const std::size_t sizes[][2] = {{373, 512}, {100, 512}, {620, 512}, {373, 850}, {620, 850}};
    for (const auto& [height, width] : sizes) {
        Picture frame(640, 860);
        std::fill(frame.bytes.begin(), frame.bytes.end(), std::uint8_t{7});
        const std::array<RgbTarget, 1> targets{RgbTarget{frame.bytes.data(), height, width, frame.stride()}};
        regionspot::resize_rgb(part, targets, 4);
        const Picture within = expected(upright, height, width);
        for (std::size_t y = 0; y < frame.height; ++y) {
            for (std::size_t x = 0; x < frame.width * 3; ++x) {
                const bool inside = y < height && x < width * 3;
                CHECK(frame.bytes[y * frame.width * 3 + x] == (inside ? within.bytes[y * width * 3 + x] : 7));
            }
        }
    }
}

bool refused(const RgbSource& source, const RgbTarget& target) {
    try {
        regionspot::resize_rgb(source, {&target, 1}, 1);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_impossible_sizes() {
    std::uint8_t pixel[3] = {};
    CHECK(refused({pixel, 0, 1, 3}, {pixel, 1, 1, 3}));
    CHECK(refused({pixel, 1, 1, 3}, {pixel, 1, 0, 3}));
    CHECK(refused({pixel, 1, 1, 3}, {pixel, std::size_t{1} << 31, 1, 3}));
}

}  // namespace

int main() {
    test_known_picture();
    test_random_sizes();
    test_slivers();
    test_views_and_threads();
    test_impossible_sizes();
    std::puts("ok");
}
