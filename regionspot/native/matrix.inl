// Products of small matrices and what stands between them. For kernels, see levels.hpp.

constexpr std::size_t kLanes = REGIONSPOT_LANES;
constexpr int kRows = 6;  // of a tile: kRows x kVectors accumulators fit into the registers beside the operands
constexpr int kVectors = REGIONSPOT_VECTORS;

using Floats [[gnu::vector_size(REGIONSPOT_LANES * sizeof(float))]] = float;
using Ints [[gnu::vector_size(REGIONSPOT_LANES * sizeof(float))]] = std::int32_t;

REGIONSPOT_INLINE Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

REGIONSPOT_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// In one instruction: 0 + value is not, for the sake of -0.
REGIONSPOT_INLINE Floats broadcast(float value) { return value - Floats{}; }

REGIONSPOT_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

REGIONSPOT_INLINE float sum_of(Floats value) {
    float lanes[kLanes];
    store(lanes, value);
#pragma GCC unroll 4
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
}

REGIONSPOT_INLINE float largest_of(Floats value) {
    float lanes[kLanes];
    store(lanes, value);
#pragma GCC unroll 4
    for (std::size_t half = kLanes / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (std::size_t i = 0; i < half; ++i) lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
    return lanes[0];
}

// 2^x within 2e-7 of it, for x below 127; 1e-38 for all below -126. The polynomial was fitted for the least relative error.
REGIONSPOT_INLINE Floats power_of_two(Floats x) {
    constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: added, it leaves the nearest integer in the lowest bits
    x = larger(x, broadcast(-126.0F));
    const Floats shifted = x + kRound;
    const Floats rest = x - (shifted - kRound);
    Floats series = rest * 0.0013264726899369624F + 0.009671512660600968F;
    series = series * rest + 0.05550733744243561F;
    series = series * rest + 0.24022242084918413F;
    series = series * rest + 0.6931469775984721F;
    series = series * rest + 1.0F;
    const Ints scale = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
    return series * reinterpret_cast<Floats>(scale);
}

REGIONSPOT_INLINE Floats exponential(Floats x) { return power_of_two(x * 1.44269504088896340736F); }

template <int Rows, int Vectors>
REGIONSPOT_INLINE void multiply_tile(ConstMatrix a, ConstMatrix b, std::size_t depth, Matrix c, bool add) {
    Floats total[Rows][Vectors];
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) {
            total[row][v] = add ? load(c.data + row * c.stride + v * kLanes) : Floats{};
        }
    }
    for (std::size_t k = 0; k < depth; ++k) {
        Floats right[Vectors];
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) right[v] = load(b.data + k * b.stride + v * kLanes);
#pragma GCC unroll 6
        for (int row = 0; row < Rows; ++row) {
            const Floats left = broadcast(a.data[row * a.stride + k]);
#pragma GCC unroll 4
            for (int v = 0; v < Vectors; ++v) total[row][v] += left * right[v];
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) store(c.data + row * c.stride + v * kLanes, total[row][v]);
    }
}

template <int Vectors>
inline void multiply_columns(ConstMatrix a, std::size_t rows, ConstMatrix b, std::size_t depth, Matrix c, bool add) {
    for (std::size_t tiles = (rows + kRows - 1) / kRows; tiles > 0; --tiles) {  // of nearly equal height
        const std::size_t height = (rows + tiles - 1) / tiles;
        switch (height) {
            case 1: multiply_tile<1, Vectors>(a, b, depth, c, add); break;
            case 2: multiply_tile<2, Vectors>(a, b, depth, c, add); break;
            case 3: multiply_tile<3, Vectors>(a, b, depth, c, add); break;
            case 4: multiply_tile<4, Vectors>(a, b, depth, c, add); break;
            case 5: multiply_tile<5, Vectors>(a, b, depth, c, add); break;
            default: multiply_tile<6, Vectors>(a, b, depth, c, add);
        }
        a.data += height * a.stride;
        c.data += height * c.stride;
        rows -= height;
    }
}

// c = a b, or c += a b: (rows, depth) times (depth, width). The width is a multiple of kGrain.
inline void multiply(ConstMatrix a, std::size_t rows, ConstMatrix b, std::size_t depth, std::size_t width, Matrix c,
                     bool add = false) {
    constexpr std::size_t kWide = kLanes * kVectors;
    std::size_t column = 0;
    for (; column + kWide <= width; column += kWide) {
        multiply_columns<kVectors>(a, rows, {b.data + column, b.stride}, depth, {c.data + column, c.stride}, add);
    }
    for (; column < width; column += kLanes) {
        multiply_columns<1>(a, rows, {b.data + column, b.stride}, depth, {c.data + column, c.stride}, add);
    }
}

// The transposition of kGrain x kGrain values. A perfect shuffle takes the highest bit of a value's place, its row before
// its column, to the lowest: after as many as a row has bits, they have changed places.
inline void transpose(ConstMatrix from, Matrix to) {
    constexpr std::size_t kHalf = kGrain * kGrain / 2;
    float blocks[2][2 * kHalf];
    for (std::size_t row = 0; row < kGrain; ++row) {
        std::memcpy(blocks[0] + row * kGrain, from.data + row * from.stride, kGrain * sizeof(float));
    }
    for (std::size_t round = 0; (1U << round) < kGrain; ++round) {
        const float* const source = blocks[round % 2];
        float* const target = blocks[1 - round % 2];
        for (std::size_t i = 0; i < kHalf; ++i) {
            target[2 * i] = source[i];
            target[2 * i + 1] = source[i + kHalf];
        }
    }
    for (std::size_t row = 0; row < kGrain; ++row) {
        std::memcpy(to.data + row * to.stride, blocks[0] + row * kGrain, kGrain * sizeof(float));
    }
}
