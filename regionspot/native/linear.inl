// The kernels behind linear.cpp, see levels.hpp.

#include "matrix.inl"

// A tile of sums: with a panel's weights and a value of x, they fill the registers.
#if REGIONSPOT_LANES == 16
constexpr std::size_t kTileRows = 9, kTileVectors = 3;
#elif REGIONSPOT_LANES == 8
constexpr std::size_t kTileRows = 4, kTileVectors = 3;
#else
constexpr std::size_t kTileRows = 6, kTileVectors = 2;
#endif
constexpr std::size_t kTileWidth = kTileVectors * kLanes;

inline TileShape tile_shape() { return {kTileRows, kTileWidth, kLanes}; }

// sums (kTileRows, Vectors * kLanes) = x (depth, kTileRows)^T weights (depth, Vectors * kLanes). `depth` is a multiple of 4.
template <std::size_t Vectors>
inline void sum_products(const float* x, const float* weights, std::size_t depth, float* sums) {
    Floats total[kTileRows][Vectors] = {};
    for (std::size_t k = 0; k < depth; ++k) {
        Floats right[Vectors];
#pragma GCC unroll 3
        for (std::size_t v = 0; v < Vectors; ++v) right[v] = load(weights + (k * Vectors + v) * kLanes);
#pragma GCC unroll 9
        for (std::size_t row = 0; row < kTileRows; ++row) {
            const Floats left = broadcast(x[k * kTileRows + row]);
#pragma GCC unroll 3
            for (std::size_t v = 0; v < Vectors; ++v) total[row][v] += left * right[v];
        }
    }
#pragma GCC unroll 9
    for (std::size_t row = 0; row < kTileRows; ++row) {
#pragma GCC unroll 3
        for (std::size_t v = 0; v < Vectors; ++v) store(sums + (row * Vectors + v) * kLanes, total[row][v]);
    }
}

#if REGIONSPOT_LANES == 16
// A core's other thread leaves this one about two instructions a cycle, so that each one which is no product costs. A
// product can take its value of x straight from memory, but not all of them, since only two loads go in a cycle: every
// third row doing so was the fastest, by a tenth or two. Compilers choose the one or the other for all rows, and move
// registers; hence by hand. Sums are in zmm5 to zmm31, weights in zmm0 to zmm2.
#define REGIONSPOT_WEIGHTS(i)                        \
    "vmovups 192*" #i "(%[weights]), %%zmm0\n\t"     \
    "vmovups 192*" #i "+64(%[weights]), %%zmm1\n\t"  \
    "vmovups 192*" #i "+128(%[weights]), %%zmm2\n\t"
#define REGIONSPOT_ROW_FROM_MEMORY(i, row, a, b, c)                                     \
    "vfmadd231ps 36*" #i "+4*" #row "(%[x])%{1to16%}, %%zmm0, %%zmm" #a "\n\t" \
    "vfmadd231ps 36*" #i "+4*" #row "(%[x])%{1to16%}, %%zmm1, %%zmm" #b "\n\t" \
    "vfmadd231ps 36*" #i "+4*" #row "(%[x])%{1to16%}, %%zmm2, %%zmm" #c "\n\t"
#define REGIONSPOT_ROW(i, row, value, a, b, c)                             \
    "vbroadcastss 36*" #i "+4*" #row "(%[x]), %%zmm" #value "\n\t" \
    "vfmadd231ps %%zmm" #value ", %%zmm0, %%zmm" #a "\n\t"           \
    "vfmadd231ps %%zmm" #value ", %%zmm1, %%zmm" #b "\n\t"           \
    "vfmadd231ps %%zmm" #value ", %%zmm2, %%zmm" #c "\n\t"
#define REGIONSPOT_INPUT(i)                      \
    REGIONSPOT_WEIGHTS(i)                        \
    REGIONSPOT_ROW_FROM_MEMORY(i, 0, 5, 6, 7)    \
    REGIONSPOT_ROW(i, 1, 3, 8, 9, 10)            \
    REGIONSPOT_ROW(i, 2, 4, 11, 12, 13)          \
    REGIONSPOT_ROW_FROM_MEMORY(i, 3, 14, 15, 16) \
    REGIONSPOT_ROW(i, 4, 3, 17, 18, 19)          \
    REGIONSPOT_ROW(i, 5, 4, 20, 21, 22)          \
    REGIONSPOT_ROW_FROM_MEMORY(i, 6, 23, 24, 25) \
    REGIONSPOT_ROW(i, 7, 3, 26, 27, 28)          \
    REGIONSPOT_ROW(i, 8, 4, 29, 30, 31)
#define REGIONSPOT_CLEAR(row, a, b, c)                 \
    "vpxord %%zmm" #a ", %%zmm" #a ", %%zmm" #a "\n\t" \
    "vpxord %%zmm" #b ", %%zmm" #b ", %%zmm" #b "\n\t" \
    "vpxord %%zmm" #c ", %%zmm" #c ", %%zmm" #c "\n\t"
#define REGIONSPOT_STORE(row, a, b, c)                        \
    "vmovups %%zmm" #a ", 192*" #row "(%[sums])\n\t"     \
    "vmovups %%zmm" #b ", 192*" #row "+64(%[sums])\n\t"  \
    "vmovups %%zmm" #c ", 192*" #row "+128(%[sums])\n\t"
#define REGIONSPOT_EACH_ROW(DO)                                                                   \
    DO(0, 5, 6, 7) DO(1, 8, 9, 10) DO(2, 11, 12, 13) DO(3, 14, 15, 16) DO(4, 17, 18, 19)          \
    DO(5, 20, 21, 22) DO(6, 23, 24, 25) DO(7, 26, 27, 28) DO(8, 29, 30, 31)

template <>
inline void sum_products<3>(const float* x, const float* weights, std::size_t depth, float* sums) {
    static_assert(kTileRows == 9);
    __asm__ volatile(
        REGIONSPOT_EACH_ROW(REGIONSPOT_CLEAR)
        "1:\n\t"
        REGIONSPOT_INPUT(0) REGIONSPOT_INPUT(1) REGIONSPOT_INPUT(2) REGIONSPOT_INPUT(3)
        "add $4*36, %[x]\n\t"
        "add $4*192, %[weights]\n\t"
        "sub $4, %[depth]\n\t"
        "jnz 1b\n\t"
        REGIONSPOT_EACH_ROW(REGIONSPOT_STORE)
        : [x] "+r"(x), [weights] "+r"(weights), [depth] "+r"(depth)
        : [sums] "r"(sums)
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm7", "xmm8", "xmm9", "xmm10", "xmm11",
          "xmm12", "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23",
          "xmm24", "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}
#undef REGIONSPOT_WEIGHTS
#undef REGIONSPOT_ROW_FROM_MEMORY
#undef REGIONSPOT_ROW
#undef REGIONSPOT_INPUT
#undef REGIONSPOT_CLEAR
#undef REGIONSPOT_STORE
#undef REGIONSPOT_EACH_ROW
#endif

// x Phi(x) = x / 2 (1 + erf(x / sqrt(2))), within 1e-6 of it. erf is a quotient of two polynomials that were fitted for the
// least error up to 3.92, from where it is 1 in single precision.
REGIONSPOT_INLINE Floats gelu(Floats x) {
    constexpr float kOne = 3.92F;
    const Floats scaled = x * 0.70710678118654752440F;
    const Floats limited = larger(-larger(-scaled, broadcast(-kOne)), broadcast(-kOne));
    const Floats y = limited * limited * (1.0F / (kOne * kOne));
    Floats above = y * 1.7432427654730118F + 16.027939458717313F;
    above = above * y + 14.03509073264157F;
    above = above * y + 12.528817995665126F;
    above = above * y + 2.9620258197563474F;
    above = above * y + 1.1283790227793828F;
    Floats below = y * 32.61653875618407F + 66.24039139678656F;
    below = below * y + 55.04981060960779F;
    below = below * y + 27.17407050819307F;
    below = below * y + 7.747134817531249F;
    below = below * y + 1.0F;
    const Floats half = x * 0.5F;
    return half + half * (limited * above / below);
}

// What comes before and after the products of a tile of results.
struct TileEnds {
    const float* bias;
    bool add;   // to what is there, instead of the bias
    bool gelu;  // of the sum
};

template <std::size_t Vectors>
inline void finish_tile(const float* sums, std::size_t rows, const TileEnds& ends, Matrix c) {
    for (std::size_t row = 0; row < rows; ++row) {
        float* const to = c.data + row * c.stride;
        for (std::size_t v = 0; v < Vectors * kLanes; v += kLanes) {
            const Floats value = load(sums + row * Vectors * kLanes + v) + load((ends.add ? to : ends.bias) + v);
            store(to + v, ends.gelu ? gelu(value) : value);
        }
    }
}

// All rows of a piece times a panel.
template <std::size_t Vectors>
inline void multiply_panel(const float* packed, std::size_t rows, const float* weights, std::size_t depth,
                           const TileEnds& ends, Matrix c) {
    alignas(64) float sums[kTileRows * Vectors * kLanes];
    for (std::size_t first = 0; first < rows; first += kTileRows) {
        const std::size_t count = std::min(kTileRows, rows - first);
        for (std::size_t row = first; row < first + count; ++row) {
            for (std::size_t v = 0; v < Vectors; ++v) __builtin_prefetch(c.data + row * c.stride + v * kLanes, 1);
        }
        sum_products<Vectors>(packed + first * depth, weights, depth, sums);
        finish_tile<Vectors>(sums, count, ends, {c.data + first * c.stride, c.stride});
    }
}

// `depth` inputs of some rows of x, to tiles (depth, kTileRows); zeros where the last one has no row. A grain of inputs is
// turned with kGrain rows where x has as many; what is too much of each is written over by the next.
inline void pack_rows(ConstMatrix x, std::size_t rows, std::size_t depth, float* packed) {
    for (std::size_t first = 0; first < rows; first += kTileRows, packed += kTileRows * depth) {
        const float* const from = x.data + first * x.stride;
        if (first + kGrain <= rows) {
            for (std::size_t k = 0; k < depth; k += kGrain) transpose({from + k, x.stride}, {packed + k * kTileRows, kTileRows});
            continue;
        }
        std::fill_n(packed, kTileRows * depth, 0.0F);
        for (std::size_t row = 0; row < std::min(kTileRows, rows - first); ++row) {
            for (std::size_t k = 0; k < depth; ++k) packed[k * kTileRows + row] = from[row * x.stride + k];
        }
    }
}

inline void multiply_piece(const LinearPiece& piece, float* packed) {
    const std::size_t rows = piece.end_row - piece.first_row;
    for (std::size_t first = 0; first < piece.inputs; first += piece.depth) {
        const std::size_t depth = std::min(piece.depth, piece.inputs - first);
        pack_rows({piece.x + piece.first_row * piece.inputs + first, piece.inputs}, rows, depth, packed);
        for (std::size_t column = piece.first_column; column < piece.end_column; column += kTileWidth) {
            const float* const weights = piece.weight + first * piece.outputs + column * depth;
            const TileEnds ends{piece.bias + column, first > 0, piece.gelu && first + depth == piece.inputs};
            const Matrix c{piece.y + piece.first_row * piece.outputs + column, piece.outputs};
            switch (std::min(kTileWidth, piece.outputs - column) / kLanes) {
                case 1: multiply_panel<1>(packed, rows, weights, depth, ends, c); break;
                case 2: multiply_panel<2>(packed, rows, weights, depth, ends, c); break;
                default: multiply_panel<kTileVectors>(packed, rows, weights, depth, ends, c);
            }
        }
    }
}
