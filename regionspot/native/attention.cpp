#include "attention.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "aligned.hpp"
#include "matrix.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kQueries = 128;  // of a block, about: whole rows of a window
constexpr std::size_t kKeys = 512;     // of a block, whose scores stay in the second-level cache
constexpr std::size_t kPanel = 64;     // keys that lie side by side, channel after channel
constexpr float kLogOfE = 1.44269504088896340736F;  // to base 2, the one of all scores

// What follows from a task's sizes.
struct GridSizes {
    std::size_t down, across;          // windows of an image
    std::size_t items;                 // windows of all images and heads
    std::size_t queries;               // of a window
    std::size_t padded_rows;           // of a window, rounded up
    std::size_t padded_columns, keys;  // rows of keys are filled up to whole grains
    std::size_t block_rows, blocks;    // rows of queries in a block, and blocks of a window

    explicit GridSizes(const GridAttention& task)
        : down(divided_up(task.height, task.rows)), across(divided_up(task.width, task.columns)),
          items(task.images * down * across * task.heads), queries(task.rows * task.columns),
          padded_rows(rounded_up(task.rows)), padded_columns(rounded_up(task.columns)), keys(task.rows * padded_columns),
          block_rows(std::max<std::size_t>(1, std::min(task.rows, kQueries / task.columns))),
          blocks(divided_up(task.rows, block_rows)) {}
};

// One window of one head, brought into the order in which it is worked on.
struct PackedWindow {
    float* queries;       // (queries, channels), scaled, for scores to base 2
    float* keys;          // panels of kPanel keys, (channels, kPanel) each, the last one as wide as is left
    float* values;        // (keys, channels)
    float* with_rows;     // (queries, padded rows)
    float* with_columns;  // (queries, padded columns)

    PackedWindow(const GridAttention& task, const GridSizes& sizes)
        : memory_(size(task, sizes)) {
        float* next = memory_.get();
        const auto take = [&next](std::size_t count) { return (next += count) - count; };
        queries = take(sizes.queries * task.channels);
        keys = take(sizes.keys * task.channels);
        values = take(sizes.keys * task.channels);
        with_rows = take(sizes.queries * sizes.padded_rows);
        with_columns = take(sizes.queries * sizes.padded_columns);
    }

    static std::size_t size(const GridAttention& task, const GridSizes& sizes) {
        return sizes.queries * (task.channels + sizes.padded_rows + sizes.padded_columns) + 2 * sizes.keys * task.channels;
    }

private:
    AlignedFloats memory_;
};

std::vector<PackedWindow> packed_windows(std::size_t count, const GridAttention& task, const GridSizes& sizes) {
    std::vector<PackedWindow> windows;
    for (std::size_t i = 0; i < count; ++i) windows.emplace_back(task, sizes);
    return windows;
}

// One thread's buffers for a block of queries.
struct AttentionScratch {
    AlignedVector scores, total, largest, sums;

    AttentionScratch(const GridAttention& task, const GridSizes& sizes) {
        const std::size_t count = sizes.block_rows * task.columns;
        scores.resize(count * kKeys), total.resize(count * task.channels), largest.resize(count), sums.resize(count);
    }
};

// The tables of positions with rows of whole grains, for scores to base 2.
struct PositionTables {
    AlignedVector rows, columns;

    PositionTables(const GridAttention& task, const GridSizes& sizes)
        : rows(widened(task.relative_rows, task.rows * task.channels, task.rows, sizes.padded_rows)),
          columns(widened(task.relative_columns, task.columns * task.channels, task.columns, sizes.padded_columns)) {}

private:
    static AlignedVector widened(const float* from, std::size_t count, std::size_t width, std::size_t padded) {
        AlignedVector to(count * padded);
        for (std::size_t row = 0; row < count; ++row) {
            for (std::size_t i = 0; i < width; ++i) to[row * padded + i] = from[row * width + i] * kLogOfE;
        }
        return to;
    }
};

}  // namespace
}  // namespace regionspot

#define REGIONSPOT_KERNELS "attention.inl"
#include "levels.hpp"

namespace regionspot {

void grid_attention(const GridAttention& task, std::size_t threads) {
    const GridSizes sizes(task);
    const PositionTables tables(task, sizes);
    const auto pack = REGIONSPOT_BEST(pack_window);
    const auto attend = REGIONSPOT_BEST(attend_block);
    threads = std::max<std::size_t>(1, std::min(threads, sizes.items * sizes.blocks));
    std::vector<AttentionScratch> scratch(threads, AttentionScratch(task, sizes));
    if (sizes.items >= 8 * threads) {  // each thread packs a window, and uses it while it is in its cache
        const std::vector<PackedWindow> packed = packed_windows(threads, task, sizes);
        parallel_for(sizes.items, threads, [&](std::size_t item, std::size_t thread) {
            pack(task, sizes, tables, item, packed[thread]);
            for (std::size_t block = 0; block < sizes.blocks; ++block) {
                attend(task, sizes, item, block, packed[thread], scratch[thread]);
            }
        });
        return;
    }
    const std::size_t wave = std::min(sizes.items, threads);
    const std::vector<PackedWindow> packed = packed_windows(wave, task, sizes);
    for (std::size_t first = 0; first < sizes.items; first += wave) {
        const std::size_t count = std::min(wave, sizes.items - first);
        parallel_for(count, threads, [&](std::size_t index, std::size_t) {
            pack(task, sizes, tables, first + index, packed[index]);
        });
        parallel_for(count * sizes.blocks, threads, [&](std::size_t index, std::size_t thread) {
            const std::size_t own = index / sizes.blocks;
            attend(task, sizes, first + own, index % sizes.blocks, packed[own], scratch[thread]);
        });
    }
}

}  // namespace regionspot
