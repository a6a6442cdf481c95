// The kernels behind linear.cpp, see levels.hpp.

#include "matrix.inl"

inline TileShape tile_shape() { return {kRows, kVectors * kLanes, kLanes}; }

// So that storing to them does not wait for memory.
inline void prefetch_rows(std::size_t rows, std::size_t width, Matrix c) {
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < width; i += kLine) __builtin_prefetch(c.data + row * c.stride + i, 1);
    }
}

template <typename Function>
inline void apply_each(const Function& function, std::size_t rows, std::size_t width, Matrix c) {
    for (std::size_t row = 0; row < rows; ++row) {
        float* const values = c.data + row * c.stride;
        for (std::size_t i = 0; i < width; i += kLanes) store(values + i, function(load(values + i)));
    }
}

inline void activate(Activation activation, std::size_t rows, std::size_t width, Matrix c) {
    if (activation == Activation::kGelu) apply_each([](Floats x) { return gelu(x); }, rows, width, c);
    if (activation == Activation::kQuickGelu) apply_each([](Floats x) { return quick_gelu(x); }, rows, width, c);
}

// Inputs from `first` on of a piece's rows, copied where they lie far apart.
inline ConstMatrix inputs_of(const LinearPiece& piece, std::size_t first, std::size_t depth, float* packed) {
    const float* const x = piece.x + piece.first_row * piece.inputs + first;
    if (depth == piece.inputs) return {x, depth};
    for (std::size_t row = 0; row < piece.end_row - piece.first_row; ++row) {
        std::copy_n(x + row * piece.inputs, depth, packed + row * depth);
    }
    return {packed, depth};
}

inline void multiply_piece(const LinearPiece& piece, float* packed) {
    constexpr std::size_t kWidth = kVectors * kLanes;
    const std::size_t rows = piece.end_row - piece.first_row;
    for (std::size_t first = 0; first < piece.inputs; first += piece.depth) {
        const std::size_t depth = std::min(piece.depth, piece.inputs - first);
        const ConstMatrix x = inputs_of(piece, first, depth, packed);
        for (std::size_t column = piece.first_column; column < piece.end_column; column += kWidth) {
            const std::size_t width = std::min(kWidth, piece.outputs - column);
            const float* const weights = piece.weight + first * piece.outputs + column * depth;
            const float* const next = weights + depth * width;
            for (std::size_t row = 0; row < rows; row += kRows) {
                const std::size_t count = std::min<std::size_t>(kRows, rows - row), left = rows - row - count;
                const Matrix y{piece.y + (piece.first_row + row) * piece.outputs + column, piece.outputs};
                prefetch_rows(std::min<std::size_t>(kRows, left), width, {y.data + count * y.stride, y.stride});
                accumulate(first == 0 ? ConstMatrix{piece.bias + column, 0} : ConstMatrix{y}, {x.data + row * x.stride, x.stride},
                           count, {weights, width}, depth, width, y, next + row / kRows * kLine);
                if (first + depth == piece.inputs) activate(piece.activation, count, width, y);
            }
        }
    }
}
