// The run-length code on its own: fixed encodings (from the COCO API), random round trips, damaged text.
#include "rle.hpp"

#include "check.hpp"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <stdexcept>

namespace {

using regionspot::MaskView;
using regionspot::Runs;

bool refused(std::string_view text, std::uint64_t pixels) {
    try {
        static_cast<void>(regionspot::runs_from_text(text, pixels));
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

MaskView row_major(const std::vector<std::uint8_t>& pixels, std::size_t height, std::size_t width) {
    return {pixels.data(), height, width, static_cast<std::ptrdiff_t>(width), 1};
}

void test_known_encodings() {
    const std::vector<std::uint8_t> zeros(6, 0), ones(6, 255);
    CHECK(regionspot::runs_from_mask(row_major(zeros, 2, 3)) == (Runs{6}));
    CHECK(regionspot::runs_from_mask(row_major(ones, 2, 3)) == (Runs{0, 6}));
    const std::vector<std::uint8_t> mask{0, 1, 1,  //
                                         1, 1, 0};
    CHECK(regionspot::runs_from_mask(row_major(mask, 2, 3)) == (Runs{1, 4, 1}));
    CHECK(regionspot::text_from_runs({6}) == "6");
    CHECK(regionspot::text_from_runs({0, 6}) == "06");
    CHECK(regionspot::text_from_runs({1, 4, 1}) == "141");
    CHECK(regionspot::text_from_runs({15, 16, 31, 32}) == "?`0o0`0");
    CHECK(regionspot::text_from_runs({5, 9, 5, 2}) == "595I");
}

void test_empty_mask() {
    CHECK(regionspot::runs_from_mask(row_major({}, 0, 4)) == (Runs{0}));
    CHECK(regionspot::runs_from_text("0", 0) == (Runs{0}));
    CHECK(regionspot::mask_from_runs({0}, 0).empty());
}

void test_round_trips() {
    std::mt19937 random(0);
    for (int trial = 0; trial < 300; ++trial) {
        const std::size_t height = 1 + random() % 70, width = 1 + random() % 200, run = 1 + random() % 40;
        std::vector<std::uint8_t> pixels(height * width);
        for (std::size_t i = 0; i < pixels.size(); ++i) pixels[i] = (i == 0 || random() % run == 0) ? random() % 2 : pixels[i - 1];
        const Runs runs = regionspot::runs_from_mask(row_major(pixels, height, width));
        const std::string text = regionspot::text_from_runs(runs);
        CHECK(regionspot::runs_from_text(text, pixels.size()) == runs);
        const std::vector<std::uint8_t> decoded = regionspot::mask_from_runs(runs, pixels.size());
        std::uint64_t foreground = 0;
        for (std::size_t y = 0; y < height; ++y) {
            for (std::size_t x = 0; x < width; ++x) {
                CHECK(decoded[x * height + y] == pixels[y * width + x]);
                foreground += pixels[y * width + x];
            }
        }
        CHECK(regionspot::area(runs) == foreground);
        // The decoded mask is the transpose: read through its strides it is the same mask.
        CHECK(regionspot::runs_from_mask({decoded.data(), height, width, 1, static_cast<std::ptrdiff_t>(height)}) == runs);
    }
}

void test_damaged_text() {
    CHECK(refused("", 6));                   // no runs
    CHECK(refused("5", 6));                  // one pixel short
    CHECK(refused("7", 6));                  // one too many
    CHECK(refused("O", 6));                  // negative
    CHECK(refused("6 ", 6));                 // a character below '0'
    CHECK(refused("6p", 6));                 // and one above 'o'
    CHECK(refused("o", 31));                 // the text stops inside a number
    CHECK(refused("oooooooooooooooo0", 6));  // more than 64 bits
    CHECK(refused("0000I", 0));              // a difference below zero
    std::mt19937 random(1);
    for (int trial = 0; trial < 20000; ++trial) {  // the sanitizers watch
        std::string text(random() % 24, '0');
        for (char& character : text) character = static_cast<char>(random() % 10 ? '0' + random() % 64 : random() % 256);
        try {
            const Runs runs = regionspot::runs_from_text(text, 40);
            CHECK(regionspot::mask_from_runs(runs, 40).size() == 40);
        } catch (const std::invalid_argument&) {
        }
    }
}

}  // namespace

int main() {
    test_known_encodings();
    test_empty_mask();
    test_round_trips();
    test_damaged_text();
    std::puts("ok");
}
