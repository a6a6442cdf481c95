// Pillow's antialiased bilinear resize of 8-bit RGB (`Image.resize(size, Resampling.BILINEAR)`), bit for bit, to
// several sizes from one reading of the picture. No Python here.
//
// Along one axis a pixel of the target is a weighted mean of the source's pixels around it. The weights are a triangle
// as wide as the reduction is strong; they add up to 1 in double and are then rounded to multiples of 2^-22. One axis
// is resized after the other, with bytes in between; one whose size stays is left out. The width goes first, unless the
// height shrinks by more than twice as many pixels: so it is since Pillow 13, before it always went first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace regionspot {

// The bytes of a row lie side by side, the rows anywhere.
struct RgbSource {
    const std::uint8_t* data;
    std::size_t height;
    std::size_t width;
    std::ptrdiff_t row_stride;  // bytes from a pixel to the one below it
};

struct RgbTarget {
    std::uint8_t* data;
    std::size_t height;
    std::size_t width;
    std::ptrdiff_t row_stride;
};

// Fills all targets, which share no byte with each other nor with the source, on at most so many threads.
// Throws std::invalid_argument where a side is 0 or has more than 2^31 - 1 pixels.
void resize_rgb(const RgbSource& source, std::span<const RgbTarget> targets, std::size_t threads);

}  // namespace regionspot
