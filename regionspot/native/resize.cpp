#include "resize.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kChannels = 3;
constexpr std::size_t kLanes = 16;                  // rows of the source that are resized side by side
constexpr std::size_t kPixel = kChannels * kLanes;  // values of those rows in one column of pixels
constexpr std::size_t kTile = kLanes * kLanes;      // bytes that are turned at once
constexpr std::size_t kGroup = 16;                  // pixels of a target's row that are turned back at once: 3 tiles
constexpr std::size_t kChunk = 64;                  // bytes of a row that are summed at once
constexpr std::size_t kMaxTurnedWidth = std::size_t{1} << 16;   // wider rows are not turned: it takes 96 bytes a pixel
constexpr std::size_t kPixelsPerThread = std::size_t{1} << 18;  // what is worth starting a thread for

constexpr int kFractionBits = 22;
constexpr std::int32_t kOne = std::int32_t{1} << kFractionBits;
constexpr std::int32_t kHalf = kOne / 2;

// Rounds a sum of bytes times weights. It is never negative; rounded weights may add up to a little more than 1.
REGIONSPOT_INLINE std::uint8_t to_byte(std::int32_t sum) {
    const std::int32_t value = sum >> kFractionBits;
    return static_cast<std::uint8_t>(value < 255 ? value : 255);
}

// The pixels of the source that one pixel of the target is made of.
struct Window {
    std::uint32_t first;
    std::uint32_t count;
};

// One axis of a resize.
struct Axis {
    std::vector<Window> windows;        // of each pixel of the target
    std::vector<std::int32_t> weights;  // `stride` for each window
    std::size_t stride = 0;             // the size of the largest window

    Axis(std::size_t source, std::size_t target) {
        const double scale = static_cast<double>(source) / static_cast<double>(target);
        const double support = std::max(scale, 1.0);  // half the triangle's base
        for (std::size_t i = 0; i < target; ++i) {
            const double centre = (static_cast<double>(i) + 0.5) * scale;
            const auto first = static_cast<std::uint32_t>(std::max(centre - support + 0.5, 0.0));
            const double end = std::min(centre + support + 0.5, static_cast<double>(source));
            windows.push_back({first, static_cast<std::uint32_t>(end) - first});
            stride = std::max<std::size_t>(stride, windows.back().count);
        }
        weights.resize(stride * target);
        std::vector<double> heights(stride);
        for (std::size_t i = 0; i < target; ++i) {
            const double centre = (static_cast<double>(i) + 0.5) * scale;
            const Window window = windows[i];
            double total = 0;
            for (std::size_t k = 0; k < window.count; ++k) {
                const double distance = (static_cast<double>(window.first + k) - centre + 0.5) * (1.0 / support);
                heights[k] = std::max(1.0 - std::abs(distance), 0.0);
                total += heights[k];
            }
            for (std::size_t k = 0; k < window.count; ++k) {
                weights[i * stride + k] = static_cast<std::int32_t>(heights[k] / total * kOne + 0.5);
            }
        }
    }
};

// The perfect shuffle of a tile's bytes. Done four times it is the transposition: each takes the highest of the eight
// bits of a byte's place, row and column of four each, to the lowest.
REGIONSPOT_INLINE void shuffle(const std::uint8_t* __restrict tile, std::uint8_t* __restrict shuffled) {
    for (std::size_t i = 0; i < kTile / 2; ++i) {
        shuffled[2 * i] = tile[i];
        shuffled[2 * i + 1] = tile[i + kTile / 2];
    }
}

// Transposes `tile`, which is overwritten.
REGIONSPOT_INLINE void turn(std::uint8_t* tile) {
    alignas(64) std::uint8_t other[kTile];
    shuffle(tile, other);
    shuffle(other, tile);
    shuffle(tile, other);
    shuffle(other, tile);
}

// Rows to columns of kLanes values, widened: compilers find the best instructions for those. What the last tile is
// filled up with is never read.
void turn_rows(const std::uint8_t* const* rows, std::size_t bytes, std::int16_t* columns) {
    alignas(64) std::uint8_t tile[kTile] = {};
    for (std::size_t start = 0; start < bytes; start += kLanes) {
        if (bytes - start >= kLanes) {
            for (std::size_t row = 0; row < kLanes; ++row) std::memcpy(tile + row * kLanes, rows[row] + start, kLanes);
        } else {
            for (std::size_t row = 0; row < kLanes; ++row) {
                std::memcpy(tile + row * kLanes, rows[row] + start, bytes - start);
            }
        }
        turn(tile);
        for (std::size_t i = 0; i < kTile; ++i) columns[i] = tile[i];
        columns += kTile;
    }
}

// Columns of kLanes bytes, which are overwritten, to `count` rows from byte `offset` on.
void turn_columns(std::uint8_t* columns, std::size_t bytes, std::uint8_t* const* rows, std::size_t count,
                  std::size_t offset) {
    for (std::size_t start = 0; start < bytes; start += kLanes) {
        std::uint8_t* const tile = columns + start * kLanes;
        turn(tile);
        if (bytes - start >= kLanes) {  // a copy of a known size is one instruction
            for (std::size_t row = 0; row < count; ++row) {
                std::memcpy(rows[row] + offset + start, tile + row * kLanes, kLanes);
            }
        } else {
            for (std::size_t row = 0; row < count; ++row) {
                std::memcpy(rows[row] + offset + start, tile + row * kLanes, bytes - start);
            }
        }
    }
}

// `count` pixels of kLanes rows, as columns, out of all columns of the source.
REGIONSPOT_SIMD_CLONES void weigh_columns(const std::int16_t* __restrict columns, const Window* windows,
                                          const std::int32_t* __restrict weights, std::size_t stride,
                                          std::size_t count, std::uint8_t* __restrict weighed) {
    for (std::size_t i = 0; i < count; ++i) {
        const std::int16_t* pixel = columns + windows[i].first * kPixel;
        std::int32_t sums[kPixel];
        for (std::size_t lane = 0; lane < kPixel; ++lane) sums[lane] = kHalf;
        for (std::size_t k = 0; k < windows[i].count; ++k) {
            const std::int32_t weight = weights[k];
            for (std::size_t lane = 0; lane < kPixel; ++lane) sums[lane] += pixel[lane] * weight;
            pixel += kPixel;
        }
        for (std::size_t lane = 0; lane < kPixel; ++lane) weighed[lane] = to_byte(sums[lane]);
        weights += stride;
        weighed += kPixel;
    }
}

// One row of a source that is too wide to be turned.
void weigh_row(const std::uint8_t* row, const Axis& axis, std::uint8_t* to) {
    for (std::size_t i = 0; i < axis.windows.size(); ++i) {
        const std::int32_t* const weights = &axis.weights[i * axis.stride];
        const std::uint8_t* pixel = row + axis.windows[i].first * kChannels;
        std::int32_t sums[kChannels] = {kHalf, kHalf, kHalf};
        for (std::size_t k = 0; k < axis.windows[i].count; ++k) {
            for (std::size_t channel = 0; channel < kChannels; ++channel) sums[channel] += *pixel++ * weights[k];
        }
        for (const std::int32_t sum : sums) *to++ = to_byte(sum);
    }
}

// The weighted mean of `count` rows.
REGIONSPOT_SIMD_CLONES void weigh_rows(const std::uint8_t* __restrict rows, std::ptrdiff_t row_stride,
                                       const std::int32_t* __restrict weights, std::size_t count,
                                       std::size_t bytes, std::uint8_t* __restrict to) {
    for (std::size_t start = 0; start < bytes && bytes >= kChunk; start += kChunk) {
        const std::size_t at = std::min(start, bytes - kChunk);  // the last chunk overlaps the one before
        const std::uint8_t* row = rows + at;
        std::int32_t sums[kChunk];
        for (std::size_t i = 0; i < kChunk; ++i) sums[i] = kHalf;
        for (std::size_t k = 0; k < count; ++k) {
            const std::int32_t weight = weights[k];
            for (std::size_t i = 0; i < kChunk; ++i) sums[i] += row[i] * weight;
            row += row_stride;
        }
        for (std::size_t i = 0; i < kChunk; ++i) to[at + i] = to_byte(sums[i]);
    }
    for (std::size_t i = 0; i < bytes && bytes < kChunk; ++i) {
        const std::uint8_t* row = rows + i;
        std::int32_t sum = kHalf;
        for (std::size_t k = 0; k < count; ++k, row += row_stride) sum += *row * weights[k];
        to[i] = to_byte(sum);
    }
}

// A resize of widths alone.
struct ColumnPass {
    Axis axis;
    RgbTarget to;
};

// Those that read the same picture.
struct Columns {
    RgbSource from;
    std::vector<ColumnPass> passes;
};

// A resize of heights alone.
struct RowPass {
    Axis axis;
    RgbSource from;
    RgbTarget to;
};

// Passes that do not wait for each other.
struct Stage {
    std::vector<Columns> columns;
    std::vector<RowPass> rows;
};

const std::uint8_t* row_of(const RgbSource& picture, std::size_t y) {
    return picture.data + static_cast<std::ptrdiff_t>(y) * picture.row_stride;
}

std::uint8_t* row_of(const RgbTarget& picture, std::size_t y) {
    return picture.data + static_cast<std::ptrdiff_t>(y) * picture.row_stride;
}

// Rows [begin, begin + count) of the source, at most kLanes, for all passes. `turned` is a thread's buffer.
void resize_columns(const Columns& columns, std::size_t begin, std::size_t count, std::int16_t* turned) {
    const RgbSource& from = columns.from;
    if (from.width > kMaxTurnedWidth) {
        for (const ColumnPass& pass : columns.passes) {
            for (std::size_t y = begin; y < begin + count; ++y) {
                weigh_row(row_of(from, y), pass.axis, row_of(pass.to, y));
            }
        }
        return;
    }
    const std::uint8_t* rows[kLanes];  // those beyond the last repeat it
    for (std::size_t row = 0; row < kLanes; ++row) rows[row] = row_of(from, begin + std::min(row, count - 1));
    turn_rows(rows, from.width * kChannels, turned);
    for (const ColumnPass& pass : columns.passes) {
        std::uint8_t* to[kLanes];
        for (std::size_t row = 0; row < count; ++row) to[row] = row_of(pass.to, begin + row);
        alignas(64) std::uint8_t weighed[kGroup * kPixel];
        for (std::size_t x = 0; x < pass.to.width; x += kGroup) {
            const std::size_t width = std::min(kGroup, pass.to.width - x);
            const Axis& axis = pass.axis;
            weigh_columns(turned, &axis.windows[x], &axis.weights[x * axis.stride], axis.stride, width, weighed);
            turn_columns(weighed, width * kChannels, to, count, x * kChannels);
        }
    }
}

// Rows [begin, begin + count) of the target.
void resize_rows(const RowPass& pass, std::size_t begin, std::size_t count) {
    for (std::size_t y = begin; y < begin + count; ++y) {
        const Window window = pass.axis.windows[y];
        weigh_rows(row_of(pass.from, window.first), pass.from.row_stride, &pass.axis.weights[y * pass.axis.stride],
                   window.count, pass.to.width * kChannels, row_of(pass.to, y));
    }
}

void run(const Stage& stage, std::size_t threads) {
    struct Unit {
        const Columns* columns;
        const RowPass* rows;
        std::size_t begin, count;
    };
    std::vector<Unit> units;
    const auto add = [&units](const Columns* columns, const RowPass* rows, std::size_t height) {
        for (std::size_t y = 0; y < height; y += kLanes) {
            units.push_back({columns, rows, y, std::min(kLanes, height - y)});
        }
    };
    std::size_t widest = 0;
    for (const Columns& columns : stage.columns) {
        add(&columns, nullptr, columns.from.height);
        if (columns.from.width <= kMaxTurnedWidth) widest = std::max(widest, columns.from.width);
    }
    for (const RowPass& rows : stage.rows) add(nullptr, &rows, rows.to.height);
    const std::size_t tiles = (widest * kChannels + kLanes - 1) / kLanes;
    std::vector<std::vector<std::int16_t>> turned(threads);
    for (auto& buffer : turned) buffer.resize(tiles * kTile);
    parallel_for(units.size(), threads, [&](std::size_t index, std::size_t thread) {
        const Unit& unit = units[index];
        if (unit.rows != nullptr) {
            resize_rows(*unit.rows, unit.begin, unit.count);
        } else {
            resize_columns(*unit.columns, unit.begin, unit.count, turned[thread].data());
        }
    });
}

// Whether the height is resized before the width.
bool rows_first(const RgbSource& source, const RgbTarget& target) {
    const auto less = [](std::size_t before, std::size_t after) {
        return static_cast<std::int64_t>(before) - static_cast<std::int64_t>(after);
    };
    return source.height > target.height && less(source.height, target.height) > 2 * less(source.width, target.width);
}

void check_sizes(const RgbSource& source, std::span<const RgbTarget> targets) {
    const auto check = [](std::size_t height, std::size_t width) {
        constexpr std::size_t kMost = std::numeric_limits<std::int32_t>::max();
        if (height == 0 || width == 0 || height > kMost || width > kMost) {
            throw std::invalid_argument("a picture has from 1 to 2^31 - 1 rows and columns");
        }
    };
    check(source.height, source.width);
    for (const RgbTarget& target : targets) check(target.height, target.width);
}

std::size_t useful_threads(const RgbSource& source, std::span<const RgbTarget> targets, std::size_t threads) {
    std::size_t pixels = source.height * source.width;
    for (const RgbTarget& target : targets) pixels += target.height * target.width;
    return std::clamp<std::size_t>(pixels / kPixelsPerThread, 1, std::max<std::size_t>(threads, 1));
}

}  // namespace

void resize_rgb(const RgbSource& source, std::span<const RgbTarget> targets, std::size_t threads) {
    check_sizes(source, targets);
    Stage first, second;
    first.columns.push_back({source, {}});
    std::vector<std::unique_ptr<std::uint8_t[]>> between;  // what the first passes leave to the second ones
    for (const RgbTarget& target : targets) {
        const bool columns = source.width != target.width, rows = source.height != target.height;
        if (!columns && !rows) {
            for (std::size_t y = 0; y < source.height; ++y) {
                std::memcpy(row_of(target, y), row_of(source, y), source.width * kChannels);
            }
        } else if (!columns) {
            first.rows.push_back({Axis(source.height, target.height), source, target});
        } else if (!rows) {
            first.columns[0].passes.push_back({Axis(source.width, target.width), target});
        } else {
            const bool by_rows = rows_first(source, target);
            const std::size_t height = by_rows ? target.height : source.height;
            const std::size_t width = by_rows ? source.width : target.width;
            const auto stride = static_cast<std::ptrdiff_t>(width * kChannels);
            between.emplace_back(new std::uint8_t[height * width * kChannels]);  // not initialised
            const RgbTarget to{between.back().get(), height, width, stride};
            const RgbSource from{to.data, height, width, stride};
            if (by_rows) {
                first.rows.push_back({Axis(source.height, target.height), source, to});
                second.columns.push_back({from, {{Axis(source.width, target.width), target}}});
            } else {
                first.columns[0].passes.push_back({Axis(source.width, target.width), to});
                second.rows.push_back({Axis(source.height, target.height), from, target});
            }
        }
    }
    if (first.columns[0].passes.empty()) first.columns.clear();
    threads = useful_threads(source, targets, threads);
    run(first, threads);
    run(second, threads);
}

}  // namespace regionspot
