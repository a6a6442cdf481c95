#include "mask_logits.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kLanes = 16;  // columns of the picture that are computed side by side
constexpr std::size_t kBits = 64;   // rows of a column in a word

constexpr std::uint8_t kMaybeBackground = 1;
constexpr std::uint8_t kMaybeForeground = 2;
constexpr std::uint8_t kMixed = kMaybeBackground | kMaybeForeground;

// Between these and infinity, a logit times any weight that occurs keeps its sign.
constexpr float kTiny = 1e-30F;
constexpr float kLargest = std::numeric_limits<float>::max();

// Where each of the first samples of a bilinear resize comes from: two neighbours and their weights.
struct Taps {
    std::vector<std::uint32_t> below, above;
    std::vector<float> weight_below, weight_above;
};

// align_corners=False, without antialiasing, in the arithmetic of torch.nn.functional.interpolate.
Taps bilinear_taps(std::size_t source, std::size_t target, std::size_t count) {
    Taps taps;
    const float scale = static_cast<float>(source) / static_cast<float>(target);
    for (std::size_t i = 0; i < count; ++i) {
        const float position = std::max(std::fma(scale, static_cast<float>(i) + 0.5F, -0.5F), 0.0F);
        const std::size_t below = std::min(static_cast<std::size_t>(position), source - 1);
        const float weight = std::clamp(position - static_cast<float>(below), 0.0F, 1.0F);
        taps.below.push_back(static_cast<std::uint32_t>(below));
        taps.above.push_back(static_cast<std::uint32_t>(std::min(below + 1, source - 1)));
        taps.weight_below.push_back(1.0F - weight);
        taps.weight_above.push_back(weight);
    }
    return taps;
}

// Rows of the picture that depend on the same rows of logits.
struct Segment {
    std::size_t begin, end;  // rows of the picture
    std::size_t low, high;   // rows of logits, both included
};

// One axis of the two resizes.
struct Axis {
    Taps frame;    // from logits to the valid part of the frame
    Taps picture;  // from there to the picture
    std::vector<Segment> segments;

    Axis(std::size_t low_res, std::size_t side, std::size_t valid, std::size_t size)
        : frame(bilinear_taps(low_res, side, valid)), picture(bilinear_taps(valid, size, size)) {
        for (std::size_t i = 0; i < size; ++i) {
            const std::size_t low = first_logit(i), high = last_logit(i);
            if (segments.empty() || segments.back().low != low || segments.back().high != high) {
                segments.push_back({i, i, low, high});
            }
            segments.back().end = i + 1;
        }
    }

    [[nodiscard]] std::size_t first_logit(std::size_t i) const { return frame.below[picture.below[i]]; }
    [[nodiscard]] std::size_t last_logit(std::size_t i) const { return frame.above[picture.above[i]]; }
};

// Alternating runs as they come, and what follows from them.
class Writer {
public:
    // `length` more pixels of `value`, of column `column` from `row` on.
    void add(bool value, std::size_t column, std::size_t row, std::size_t length) {
        if (value != value_) {
            runs_.push_back(run_);
            run_ = 0;
            value_ = value;
        }
        run_ += length;
        if (!value) return;
        left_ = std::min(left_, column);
        right_ = column + 1;
        top_ = std::min(top_, row);
        bottom_ = std::max(bottom_, row + length);
    }

    LogitMask finish() {
        runs_.push_back(run_);
        LogitMask mask{text_from_runs(runs_), area(runs_), {}};
        if (mask.area != 0) mask.box = {left_, top_, right_, bottom_};
        return mask;
    }

private:
    Runs runs_;
    std::size_t left_ = std::numeric_limits<std::size_t>::max(), right_ = 0;
    std::size_t top_ = std::numeric_limits<std::size_t>::max(), bottom_ = 0;
    std::uint64_t run_ = 0;
    bool value_ = false;
};

REGIONSPOT_INLINE float lerp(float below, float above, float weight_below, float weight_above) {
    return std::fma(below, weight_below, above * weight_above);
}

REGIONSPOT_SIMD_CLONES void classify(const float* logits, std::size_t count, std::uint8_t* classes) {
    for (std::size_t i = 0; i < count; ++i) {
        const float logit = logits[i];
        const bool foreground = logit > kTiny && logit <= kLargest;
        const bool background = logit <= 0.0F && logit >= -kLargest;
        classes[i] = static_cast<std::uint8_t>((foreground ? 0 : kMaybeBackground) | (background ? 0 : kMaybeForeground));
    }
}

// Rows [first, last] of logits as the frame has them in the columns that each lane needs: on its left and on its right.
struct LaneTaps {
    std::uint32_t left_below[kLanes], left_above[kLanes], right_below[kLanes], right_above[kLanes];
    float left_weight_below[kLanes], left_weight_above[kLanes], right_weight_below[kLanes], right_weight_above[kLanes];
    float weight_left[kLanes], weight_right[kLanes];
};

LaneTaps lane_taps(const Axis& columns, std::size_t first, std::size_t count) {
    LaneTaps taps{};
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const std::size_t column = first + std::min(lane, count - 1);  // lanes beyond the picture repeat its last column
        const std::uint32_t left = columns.picture.below[column], right = columns.picture.above[column];
        taps.left_below[lane] = columns.frame.below[left];
        taps.left_above[lane] = columns.frame.above[left];
        taps.left_weight_below[lane] = columns.frame.weight_below[left];
        taps.left_weight_above[lane] = columns.frame.weight_above[left];
        taps.right_below[lane] = columns.frame.below[right];
        taps.right_above[lane] = columns.frame.above[right];
        taps.right_weight_below[lane] = columns.frame.weight_below[right];
        taps.right_weight_above[lane] = columns.frame.weight_above[right];
        taps.weight_left[lane] = columns.picture.weight_below[column];
        taps.weight_right[lane] = columns.picture.weight_above[column];
    }
    return taps;
}

// One thread's buffers.
struct Scratch {
    std::vector<std::uint8_t> classes;      // of each logit
    std::vector<std::uint8_t> row_classes;  // of each row of logits, over a tile's columns
    std::vector<float> left, right;         // (logit rows, lanes)
    std::vector<float> frame;               // (frame rows, lanes)
    std::vector<std::uint8_t> signs;        // (picture rows, lanes)
    std::vector<std::uint64_t> bits;        // the same, (words of rows, lanes)
};

// Pixels of rows [begin, end) of the picture in a tile's columns: 1 where above 0, into signs.
REGIONSPOT_SIMD_CLONES void compute_signs(const float* logits, std::size_t low_width, const Axis& rows,
                                          const LaneTaps& taps, std::size_t begin, std::size_t end, Scratch& scratch) {
    const Taps& to_frame = rows.frame;
    const Taps& to_picture = rows.picture;
    const std::size_t first = to_picture.below[begin], last = to_picture.above[end - 1];  // rows of the frame
    float* const left = scratch.left.data();
    float* const right = scratch.right.data();
    for (std::size_t i = to_frame.below[first]; i <= to_frame.above[last]; ++i) {
        const float* const row = logits + i * low_width;
        float* const to_left = left + i * kLanes;
        float* const to_right = right + i * kLanes;
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            to_left[lane] = lerp(row[taps.left_below[lane]], row[taps.left_above[lane]], taps.left_weight_below[lane],
                                 taps.left_weight_above[lane]);
            to_right[lane] = lerp(row[taps.right_below[lane]], row[taps.right_above[lane]],
                                  taps.right_weight_below[lane], taps.right_weight_above[lane]);
        }
    }
    float* const frame = scratch.frame.data();
    for (std::size_t y = first; y <= last; ++y) {
        const std::size_t below = to_frame.below[y] * kLanes, above = to_frame.above[y] * kLanes;
        const float weight_below = to_frame.weight_below[y], weight_above = to_frame.weight_above[y];
        float* const to = frame + y * kLanes;
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            const float on_left = lerp(left[below + lane], left[above + lane], weight_below, weight_above);
            const float on_right = lerp(right[below + lane], right[above + lane], weight_below, weight_above);
            to[lane] = lerp(on_left, on_right, taps.weight_left[lane], taps.weight_right[lane]);
        }
    }
    std::uint8_t* const signs = scratch.signs.data();
    for (std::size_t y = begin; y < end; ++y) {
        const float* const below = frame + to_picture.below[y] * kLanes;
        const float* const above = frame + to_picture.above[y] * kLanes;
        const float weight_below = to_picture.weight_below[y], weight_above = to_picture.weight_above[y];
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
            signs[y * kLanes + lane] = lerp(below[lane], above[lane], weight_below, weight_above) > 0.0F;
        }
    }
}

// Signs of rows [begin, end) to bits, which were 0.
REGIONSPOT_SIMD_CLONES void pack_bits(const std::uint8_t* signs, std::size_t begin, std::size_t end, std::uint64_t* bits) {
    for (std::size_t word = begin / kBits; word * kBits < end; ++word) {
        std::uint64_t packed[kLanes] = {};
        for (std::size_t y = std::max(begin, word * kBits); y < std::min(end, (word + 1) * kBits); ++y) {
            for (std::size_t lane = 0; lane < kLanes; ++lane) {
                packed[lane] |= static_cast<std::uint64_t>(signs[y * kLanes + lane]) << y % kBits;
            }
        }
        for (std::size_t lane = 0; lane < kLanes; ++lane) bits[word * kLanes + lane] |= packed[lane];
    }
}

// What the logits [first, last] of each row may become.
REGIONSPOT_SIMD_CLONES void classify_rows(const std::uint8_t* classes, std::size_t height, std::size_t width,
                                          std::size_t first, std::size_t last, std::uint8_t* row_classes) {
    for (std::size_t i = 0; i < height; ++i) {
        std::uint8_t found = 0;
        for (std::size_t j = first; j <= last; ++j) found |= classes[i * width + j];
        row_classes[i] = found;
    }
}

// Rows of the picture that are all background, all foreground, or to be computed, over the columns of a tile.
struct Stretch {
    std::size_t begin, end;
    std::uint8_t kind;
};

void find_stretches(const Axis& rows, const std::vector<std::uint8_t>& row_classes, std::vector<Stretch>& stretches) {
    stretches.clear();
    for (const Segment& segment : rows.segments) {
        std::uint8_t kind = 0;
        for (std::size_t i = segment.low; i <= segment.high; ++i) kind |= row_classes[i];
        if (stretches.empty() || stretches.back().kind != kind) stretches.push_back({segment.begin, segment.begin, kind});
        stretches.back().end = segment.end;
    }
}

// Rows [begin, end) of a column, run by run.
void write_computed(const std::uint64_t* bits, std::size_t lane, std::size_t column, std::size_t begin, std::size_t end,
                    Writer& writer) {
    bool value = bits[begin / kBits * kLanes + lane] >> begin % kBits & 1;
    std::uint64_t before = value;  // the bit of the row above a word
    std::size_t first = begin;     // of the run
    for (std::size_t top = begin / kBits * kBits; top < end; top += kBits) {
        const std::uint64_t word = bits[top / kBits * kLanes + lane];
        std::uint64_t changes = word ^ (word << 1 | before);
        before = word >> (kBits - 1);
        if (top <= begin) changes &= ~std::uint64_t{1} << (begin - top);  // in rows below the first one
        if (end - top < kBits) changes &= (std::uint64_t{1} << (end - top)) - 1;
        for (; changes != 0; changes &= changes - 1) {
            const std::size_t row = top + static_cast<std::size_t>(std::countr_zero(changes));
            writer.add(value, column, first, row - first);
            first = row;
            value = !value;
        }
    }
    writer.add(value, column, first, end - first);
}

void write_column(const std::vector<Stretch>& stretches, const std::uint64_t* bits, std::size_t lane, std::size_t column,
                  Writer& writer) {
    for (const Stretch& stretch : stretches) {
        if (stretch.kind == kMixed) write_computed(bits, lane, column, stretch.begin, stretch.end, writer);
        else writer.add(stretch.kind == kMaybeForeground, column, stretch.begin, stretch.end - stretch.begin);
    }
}

LogitMask mask_from_logits(const float* logits, const MaskFrame& sizes, const Axis& rows, const Axis& columns,
                           Scratch& scratch) {
    const std::size_t low_height = rows.last_logit(sizes.picture[0] - 1) + 1;  // below them there is padding
    const std::size_t low_width = sizes.low_res[1];
    scratch.classes.resize(low_height * low_width);
    scratch.row_classes.resize(low_height);
    scratch.left.resize(low_height * kLanes);
    scratch.right.resize(low_height * kLanes);
    scratch.frame.resize(sizes.valid[0] * kLanes);
    scratch.signs.resize(sizes.picture[0] * kLanes);
    scratch.bits.resize((sizes.picture[0] + kBits - 1) / kBits * kLanes);
    classify(logits, low_height * low_width, scratch.classes.data());
    std::vector<Stretch> stretches;
    Writer writer;
    for (std::size_t first = 0; first < sizes.picture[1]; first += kLanes) {
        const std::size_t count = std::min(kLanes, sizes.picture[1] - first);
        classify_rows(scratch.classes.data(), low_height, low_width, columns.first_logit(first),
                      columns.last_logit(first + count - 1), scratch.row_classes.data());
        find_stretches(rows, scratch.row_classes, stretches);
        const LaneTaps taps = lane_taps(columns, first, count);
        std::fill(scratch.bits.begin(), scratch.bits.end(), 0);
        for (const Stretch& stretch : stretches) {
            if (stretch.kind != kMixed) continue;
            compute_signs(logits, low_width, rows, taps, stretch.begin, stretch.end, scratch);
            pack_bits(scratch.signs.data(), stretch.begin, stretch.end, scratch.bits.data());
        }
        for (std::size_t lane = 0; lane < count; ++lane) {
            write_column(stretches, scratch.bits.data(), lane, first + lane, writer);
        }
    }
    return writer.finish();
}

}  // namespace

std::vector<LogitMask> masks_from_logits(const float* logits, std::size_t count, const MaskFrame& frame,
                                         std::size_t threads) {
    const Axis rows(frame.low_res[0], frame.frame, frame.valid[0], frame.picture[0]);
    const Axis columns(frame.low_res[1], frame.frame, frame.valid[1], frame.picture[1]);
    std::vector<LogitMask> masks(count);
    threads = std::max<std::size_t>(1, std::min(threads, count));
    std::vector<Scratch> scratch(threads);
    parallel_for(count, threads, [&](std::size_t index, std::size_t thread) {
        const float* const own = logits + index * frame.low_res[0] * frame.low_res[1];
        masks[index] = mask_from_logits(own, frame, rows, columns, scratch[thread]);
    });
    return masks;
}

}  // namespace regionspot
