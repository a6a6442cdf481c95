#include "linear.hpp"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>

#include "matrix.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kDepth = 1024;  // inputs at a time, at most: a panel of their weights stays in the second-level cache
constexpr std::size_t kChunk = 360;  // rows at a time, about, for which a panel of weights is read once
constexpr std::size_t kPieces = 2;   // of work for each thread, at least: one that is held up leaves them to others

struct TileShape {
    std::size_t rows, width, lanes;
};

// Rows and outputs of a layer that one thread works on.
struct LinearPiece {
    const float* x;
    float* y;
    std::size_t inputs, outputs, depth;
    const float *weight, *bias;
    Activation activation;
    std::size_t first_row, end_row, first_column, end_column;
};

// Pieces of nearly equal depth.
std::size_t depth_for(std::size_t inputs) {
    return rounded_up(divided_up(inputs, std::max<std::size_t>(1, divided_up(inputs, kDepth))));
}

}  // namespace
}  // namespace regionspot

#define REGIONSPOT_KERNELS "linear.inl"
#include "levels.hpp"

namespace regionspot {

LinearLayer::LinearLayer(const float* weight, const float* bias, std::size_t inputs, std::size_t outputs,
                         Activation activation)
    : inputs_(inputs), outputs_(outputs), depth_(depth_for(inputs)), activation_(activation), weight_(inputs * outputs),
      bias_(outputs) {
    if (inputs == 0 || outputs == 0 || inputs % kGrain != 0 || outputs % kGrain != 0) {
        throw std::invalid_argument("a layer's inputs and outputs must be multiples of 16");
    }
    std::copy_n(bias, outputs, bias_.get());
    const std::size_t width = REGIONSPOT_BEST(tile_shape)().width;
    float* to = weight_.get();
    for (std::size_t first = 0; first < inputs; first += depth_) {
        for (std::size_t column = 0; column < outputs; column += width) {
            for (std::size_t k = first; k < std::min(first + depth_, inputs); ++k) {
                to = std::copy_n(weight + k * outputs + column, std::min(width, outputs - column), to);
            }
        }
    }
}

std::size_t LinearLayer::lanes() { return REGIONSPOT_BEST(tile_shape)().lanes; }

void LinearLayer::apply(const float* x, std::size_t rows, float* y, std::size_t threads) const {
    if (rows == 0) return;
    threads = std::max<std::size_t>(1, threads);
    const TileShape tile = REGIONSPOT_BEST(tile_shape)();
    const auto multiply = REGIONSPOT_BEST(multiply_piece);
    const std::size_t tiles = divided_up(rows, tile.rows), panels = divided_up(outputs_, tile.width);
    const std::size_t chunk = divided_up(tiles, divided_up(tiles, kChunk / tile.rows));  // tiles
    const std::size_t chunks = divided_up(tiles, chunk);
    const std::size_t parts = std::min(panels, divided_up(kPieces * threads, chunks));  // of the outputs
    threads = std::min(threads, chunks * parts);
    std::vector<AlignedFloats> packed;
    for (std::size_t i = 0; i < threads; ++i) packed.emplace_back(depth_ == inputs_ ? 0 : chunk * tile.rows * depth_);
    parallel_for(chunks * parts, threads, [&](std::size_t index, std::size_t thread) {
        const std::size_t row = index / parts * chunk * tile.rows, part = index % parts;
        const auto column = [&](std::size_t begin) { return std::min(outputs_, panels * begin / parts * tile.width); };
        multiply({x, y, inputs_, outputs_, depth_, weight_.get(), bias_.get(), activation_, row,
                  std::min(rows, row + chunk * tile.rows), column(part), column(part + 1)},
                 packed[thread].get());
    });
}

}  // namespace regionspot
