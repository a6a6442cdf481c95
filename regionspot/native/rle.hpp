// COCO run-length encoding of binary masks. No Python here: the same code is linked into the extension and the CTest.
//
// A mask of height h and width w is read in column-major order as alternating runs of background and foreground,
// background first (so a mask that begins with foreground has a first run of 0). The runs sum to h * w.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace regionspot {

using Runs = std::vector<std::uint64_t>;

// A read-only view of a (height, width) mask of bytes, any memory order; zero is background, all else foreground.
struct MaskView {
    const std::uint8_t* data;
    std::size_t height;
    std::size_t width;
    std::ptrdiff_t row_stride;     // bytes from a pixel to the one below it
    std::ptrdiff_t column_stride;  // bytes from a pixel to the one to its right
};

[[nodiscard]] Runs runs_from_mask(const MaskView& mask);

// COCO's compressed text: from the fourth run on, the difference to the run two before, in groups of 5 bits, low group
// first, each as one character from '0'; 0x20 marks that more groups follow, 0x10 of the last group is the sign.
[[nodiscard]] std::string text_from_runs(const Runs& runs);

// Throws std::invalid_argument where the text is no such encoding or the runs do not sum to `pixels`.
[[nodiscard]] Runs runs_from_text(std::string_view text, std::uint64_t pixels);

// The column-major mask of 0 and 1; `pixels` is the sum of the runs.
[[nodiscard]] std::vector<std::uint8_t> mask_from_runs(const Runs& runs, std::size_t pixels);

// Number of foreground pixels.
[[nodiscard]] std::uint64_t area(const Runs& runs) noexcept;

}  // namespace regionspot
