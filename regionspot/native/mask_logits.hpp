// SAM's low-resolution mask logits to run-length encodings at the picture's size, without the masks in between.
//
// The mask is what SAM's postprocessing gives: logits enlarged bilinearly to the SAM frame, its padding cut off, enlarged
// (or reduced) once more to the picture, 1 where above 0. Every pixel that has to be computed is computed with PyTorch's
// own sequence of operations, so that it is PyTorch's to the last bit where PyTorch uses fused multiply-adds. Most need
// not be: a bilinear sample is a convex combination of the logits around it, and where they all have one sign, so has it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "rle.hpp"

namespace regionspot {

// Sizes of one picture's masks, rows before columns.
struct MaskFrame {
    std::array<std::size_t, 2> low_res;  // of the logits
    std::size_t frame;                   // side of the square SAM frame
    std::array<std::size_t, 2> valid;    // what of the frame is not padding
    std::array<std::size_t, 2> picture;
};

struct LogitMask {
    std::string counts;                // COCO's compressed text
    std::uint64_t area = 0;            // pixels of foreground
    std::array<std::size_t, 4> box{};  // x0, y0, x1, y1, the last two exclusive; zeros where the mask is empty
};

// The masks of `count` arrays of logits, row-major one after another.
[[nodiscard]] std::vector<LogitMask> masks_from_logits(const float* logits, std::size_t count, const MaskFrame& frame,
                                                       std::size_t threads);

}  // namespace regionspot
