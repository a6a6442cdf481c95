// The kernels behind linear.cpp, see levels.hpp.

#include "matrix.inl"

inline TileShape tile_shape() { return {kRows, kVectors * kLanes, kLanes}; }

inline void fill_rows(const float* values, std::size_t rows, std::size_t width, Matrix c) {
    for (std::size_t row = 0; row < rows; ++row) std::copy_n(values, width, c.data + row * c.stride);
}

// So that storing to them does not wait for memory.
inline void prefetch_rows(std::size_t rows, std::size_t width, Matrix c) {
    constexpr std::size_t kLine = 16;
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < width; i += kLine) __builtin_prefetch(c.data + row * c.stride + i, 1);
    }
}

inline void apply_gelu(std::size_t rows, std::size_t width, Matrix c) {
    for (std::size_t row = 0; row < rows; ++row) {
        float* const values = c.data + row * c.stride;
        for (std::size_t i = 0; i < width; i += kLanes) store(values + i, gelu(load(values + i)));
    }
}

inline void multiply_piece(const LinearPiece& piece, float* packed) {
    constexpr std::size_t kWidth = kVectors * kLanes;
    const std::size_t rows = piece.end_row - piece.first_row;
    for (std::size_t first = 0; first < piece.inputs; first += piece.depth) {
        const std::size_t depth = std::min(piece.depth, piece.inputs - first);
        const float* const x = piece.x + piece.first_row * piece.inputs + first;
        for (std::size_t row = 0; row < rows; ++row) std::copy_n(x + row * piece.inputs, depth, packed + row * depth);
        for (std::size_t column = piece.first_column; column < piece.end_column; column += kWidth) {
            const std::size_t width = std::min(kWidth, piece.outputs - column);
            const Matrix y{piece.y + piece.first_row * piece.outputs + column, piece.outputs};
            const ConstMatrix weights{piece.weight + first * piece.outputs + column * depth, width};
            for (std::size_t row = 0; row < rows; row += kRows) {
                const std::size_t count = std::min<std::size_t>(kRows, rows - row);
                const Matrix tile{y.data + row * y.stride, y.stride};
                prefetch_rows(std::min<std::size_t>(kRows, rows - row - count), width, {tile.data + count * y.stride, y.stride});
                if (first == 0) fill_rows(piece.bias + column, count, width, tile);
                multiply({packed + row * depth, depth}, count, weights, depth, width, tile, true);
                if (piece.gelu && first + depth == piece.inputs) apply_gelu(count, width, tile);
            }
        }
    }
}
