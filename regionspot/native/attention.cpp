#include "attention.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "matrix.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kQueries = 96;  // of a block, whole tiles of rows
constexpr std::size_t kKeys = 512;    // of a block, whose scores stay in the second-level cache
constexpr std::size_t kPanel = 64;    // keys that lie side by side, channel after channel

// One thread's buffers.
struct AttentionScratch {
    std::vector<float> scores, total, largest, sums;

    explicit AttentionScratch(std::size_t channels)
        : scores(kQueries * kKeys), total(kQueries * channels), largest(kQueries), sums(kQueries) {}
};

// (M, channels) to panels of kPanel keys, (M / kPanel, channels, kPanel), the last one as wide as what is left.
void turn_keys(const float* key, std::size_t count, std::size_t channels, float* panels) {
    for (std::size_t first = 0; first < count; first += kPanel) {
        const std::size_t width = std::min(kPanel, count - first);
        float* const panel = panels + first * channels;
        for (std::size_t block = 0; block < channels; block += kGrain) {
            for (std::size_t i = 0; i < width; ++i) {
                const float* const from = key + (first + i) * channels + block;
                for (std::size_t c = 0; c < kGrain; ++c) panel[(block + c) * width + i] = from[c];
            }
        }
    }
}

}  // namespace
}  // namespace regionspot

#define REGIONSPOT_KERNELS "attention.inl"
#include "levels.hpp"

namespace regionspot {

void grid_attention(const GridAttention& task, std::size_t threads) {
    const std::size_t all = task.rows * task.columns, of_head = all * task.channels;
    const std::size_t blocks = (all + kQueries - 1) / kQueries;
    const auto attend = REGIONSPOT_BEST(attend);
    std::vector<float> panels(task.heads * of_head);
    parallel_for(task.heads, threads, [&](std::size_t head, std::size_t) {
        turn_keys(task.key + head * of_head, all, task.channels, panels.data() + head * of_head);
    });
    threads = std::max<std::size_t>(1, std::min(threads, task.heads * blocks));
    std::vector<AttentionScratch> scratch(threads, AttentionScratch(task.channels));
    parallel_for(task.heads * blocks, threads, [&](std::size_t index, std::size_t thread) {
        const std::size_t head = index / blocks, first = index % blocks * kQueries;
        attend(task, panels.data() + head * of_head, head, first, std::min(kQueries, all - first), scratch[thread]);
    });
}

}  // namespace regionspot
