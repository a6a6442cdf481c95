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

REGIONSPOT_INLINE Floats larger(Floats a, Floats b) {
#if REGIONSPOT_LANES == 16  // compilers make two instructions of it
    Floats value;
    __asm__("vmaxps %2, %1, %0" : "=v"(value) : "v"(a), "v"(b));
    return value;
#else
    return a > b ? a : b;
#endif
}

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

constexpr float kNever = -1e30F;  // a score below all others, whose exponential is none

// 2^x within 2e-7 of it, for finite x below 127; of x below -126, less than 2e-38. The polynomial was fitted for the least relative
// error.
REGIONSPOT_INLINE Floats power_of_two(Floats x) {
    constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: added, it leaves the nearest integer in the lowest bits
#if REGIONSPOT_LANES != 16
    x = larger(x, broadcast(-126.0F));
#endif
    const Floats shifted = x + kRound;
    const Floats whole = shifted - kRound;
    const Floats rest = x - whole;
    Floats series = rest * 0.0013264726899369624F + 0.009671512660600968F;
    series = series * rest + 0.05550733744243561F;
    series = series * rest + 0.24022242084918413F;
    series = series * rest + 0.6931469775984721F;
    series = series * rest + 1.0F;
#if REGIONSPOT_LANES == 16
    __asm__("vscalefps %2, %1, %0" : "=v"(series) : "v"(series), "v"(whole));  // times 2^whole, however small
    return series;
#else
    const Ints scale = (reinterpret_cast<Ints>(shifted) << 23) + (127 << 23);
    return series * reinterpret_cast<Floats>(scale);
#endif
}

// Of any x below 88. What it is cut to comes to nothing; a product that is fused with what follows must not be large.
REGIONSPOT_INLINE Floats exponential(Floats x) { return power_of_two(larger(x, broadcast(-110.0F)) * 1.44269504088896340736F); }

// x Phi(x), GELU with the error function: a rational function fitted to that by least squares, within 1e-6 of it, or of its
// size above 1.
REGIONSPOT_INLINE Floats gelu(Floats x) {
    constexpr float kEnd = 3.92F;  // in single precision erf is 1 from about there
    Floats z = larger(x * 0.70710678F, broadcast(-kEnd));
    z = z > kEnd ? broadcast(kEnd) : z;
    const Floats y = z * z * (1.0F / (kEnd * kEnd));
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
    return x * 0.5F * (z * above / below + 1.0F);
}

// x / (1 + exp(-1.702 x)), by exponentials that do not overflow.
REGIONSPOT_INLINE Floats quick_gelu(Floats x) {
    const Floats z = x * 1.702F;
    const Floats small = exponential(z < 0.0F ? z : -z);
    return x * (z < 0.0F ? small : broadcast(1.0F)) / (1.0F + small);
}

template <int Rows, int Vectors>
REGIONSPOT_INLINE void multiply_tile(ConstMatrix a, ConstMatrix b, std::size_t depth, ConstMatrix from, Matrix c,
                                     std::intptr_t /*ahead*/) {
    Floats total[Rows][Vectors];
#pragma GCC unroll 6
    for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) total[row][v] = load(from.data + row * from.stride + v * kLanes);
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

#if REGIONSPOT_LANES == 16
// The same for whole tiles of AVX-512, by hand, as most of the time is spent here. A product can take its value of a straight
// from memory, but not all of them, since only two loads go in a cycle: of two rows in six they do, which was the fastest, by
// a tenth. Compilers choose the one or the other for all rows, and move registers. On a Xeon of 2019 a core did 152 GFLOP/s of
// products that need no memory, and 139 to 147 of these.
//
// Sums are in zmm8 to zmm31, a row of b in zmm0 to zmm3, values of a in zmm4 to zmm6. Rows 0 to 2 of the tile are found from
// `a`, rows 3 to 5 from `a3`; three rows of b from `b`, the fourth from `b3`. With every four rows of b a line is fetched
// that lies `ahead` of them.
#define REGIONSPOT_PRODUCTS(value, s0, s1, s2, s3)     \
    "vfmadd231ps " value ", %%zmm0, %%zmm" #s0 "\n\t" \
    "vfmadd231ps " value ", %%zmm1, %%zmm" #s1 "\n\t" \
    "vfmadd231ps " value ", %%zmm2, %%zmm" #s2 "\n\t" \
    "vfmadd231ps " value ", %%zmm3, %%zmm" #s3 "\n\t"
#define REGIONSPOT_BROADCAST(k, place, value) "vbroadcastss 4*" #k place ", " value "\n\t"
#define REGIONSPOT_STEP(k, row_of_b)                                        \
    "vmovups " row_of_b ", %%zmm0\n\t"                                      \
    "vmovups 64" row_of_b ", %%zmm1\n\t"                                    \
    "vmovups 128" row_of_b ", %%zmm2\n\t"                                   \
    "vmovups 192" row_of_b ", %%zmm3\n\t"                                   \
    REGIONSPOT_BROADCAST(k, "(%[a],%[as])", "%%zmm4")                       \
    REGIONSPOT_PRODUCTS("4*" #k "(%[a])%{1to16%}", 8, 9, 10, 11)            \
    REGIONSPOT_BROADCAST(k, "(%[a],%[as],2)", "%%zmm5")                     \
    REGIONSPOT_PRODUCTS("%%zmm4", 12, 13, 14, 15)                           \
    REGIONSPOT_BROADCAST(k, "(%[a3],%[as])", "%%zmm6")                      \
    REGIONSPOT_PRODUCTS("%%zmm5", 16, 17, 18, 19)                           \
    REGIONSPOT_BROADCAST(k, "(%[a3],%[as],2)", "%%zmm4")                    \
    REGIONSPOT_PRODUCTS("4*" #k "(%[a3])%{1to16%}", 20, 21, 22, 23)         \
    REGIONSPOT_PRODUCTS("%%zmm6", 24, 25, 26, 27)                           \
    REGIONSPOT_PRODUCTS("%%zmm4", 28, 29, 30, 31)
#define REGIONSPOT_ROW(DO, place, s0, s1, s2, s3) DO(place, s0) DO("64" place, s1) DO("128" place, s2) DO("192" place, s3)
#define REGIONSPOT_EACH_ROW(DO, matrix)                                            \
    REGIONSPOT_ROW(DO, "(%[" #matrix "])", 8, 9, 10, 11)                           \
    REGIONSPOT_ROW(DO, "(%[" #matrix "],%[" #matrix "s])", 12, 13, 14, 15)         \
    REGIONSPOT_ROW(DO, "(%[" #matrix "],%[" #matrix "s],2)", 16, 17, 18, 19)       \
    "lea (%[" #matrix "],%[" #matrix "s],2), %[" #matrix "]\n\t"                   \
    "add %[" #matrix "s], %[" #matrix "]\n\t"                                      \
    REGIONSPOT_ROW(DO, "(%[" #matrix "])", 20, 21, 22, 23)                         \
    REGIONSPOT_ROW(DO, "(%[" #matrix "],%[" #matrix "s])", 24, 25, 26, 27)         \
    REGIONSPOT_ROW(DO, "(%[" #matrix "],%[" #matrix "s],2)", 28, 29, 30, 31)
#define REGIONSPOT_LOAD(place, sum) "vmovups " place ", %%zmm" #sum "\n\t"
#define REGIONSPOT_STORE(place, sum) "vmovups %%zmm" #sum ", " place "\n\t"

template <>
inline void multiply_tile<6, 4>(ConstMatrix a, ConstMatrix b, std::size_t depth, ConstMatrix from, Matrix c,
                                std::intptr_t ahead) {
    const float *a3 = a.data + 3 * a.stride, *b3 = b.data + 3 * b.stride;
    std::size_t left = depth % 4, steps = depth / 4;
    const std::size_t as = a.stride * sizeof(float), bs = b.stride * sizeof(float);
    const std::size_t fs = from.stride * sizeof(float), cs = c.stride * sizeof(float);
    __asm__ volatile(
        REGIONSPOT_EACH_ROW(REGIONSPOT_LOAD, f)
        "test %[steps], %[steps]\n\t"
        "jz 2f\n"
        "1:\n\t"
        "prefetcht1 (%[b],%[ahead])\n\t"
        REGIONSPOT_STEP(0, "(%[b])") REGIONSPOT_STEP(1, "(%[b],%[bs])")
        REGIONSPOT_STEP(2, "(%[b],%[bs],2)") REGIONSPOT_STEP(3, "(%[b3])")
        "add $16, %[a]\n\t"
        "add $16, %[a3]\n\t"
        "lea (%[b],%[bs],4), %[b]\n\t"
        "lea (%[b3],%[bs],4), %[b3]\n\t"
        "dec %[steps]\n\t"
        "jnz 1b\n"
        "2:\n\t"
        "test %[left], %[left]\n\t"
        "jz 4f\n"
        "3:\n\t"
        REGIONSPOT_STEP(0, "(%[b])")
        "add $4, %[a]\n\t"
        "add $4, %[a3]\n\t"
        "add %[bs], %[b]\n\t"
        "dec %[left]\n\t"
        "jnz 3b\n"
        "4:\n\t"
        REGIONSPOT_EACH_ROW(REGIONSPOT_STORE, c)
        : [a] "+&r"(a.data), [a3] "+&r"(a3), [b] "+&r"(b.data), [b3] "+&r"(b3), [f] "+&r"(from.data), [c] "+&r"(c.data),
          [steps] "+&r"(steps), [left] "+&r"(left)
        : [as] "r"(as), [bs] "r"(bs), [fs] "r"(fs), [cs] "r"(cs), [ahead] "r"(ahead)
        : "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6", "xmm8", "xmm9", "xmm10", "xmm11", "xmm12",
          "xmm13", "xmm14", "xmm15", "xmm16", "xmm17", "xmm18", "xmm19", "xmm20", "xmm21", "xmm22", "xmm23", "xmm24",
          "xmm25", "xmm26", "xmm27", "xmm28", "xmm29", "xmm30", "xmm31");
}

#undef REGIONSPOT_PRODUCTS
#undef REGIONSPOT_BROADCAST
#undef REGIONSPOT_STEP
#undef REGIONSPOT_ROW
#undef REGIONSPOT_EACH_ROW
#undef REGIONSPOT_LOAD
#undef REGIONSPOT_STORE
#endif

template <int Vectors>
inline void multiply_columns(ConstMatrix a, std::size_t rows, ConstMatrix b, std::size_t depth, ConstMatrix from, Matrix c,
                             const float* next) {
    const auto address = [](const float* values) { return reinterpret_cast<std::intptr_t>(values); };
    std::intptr_t ahead = next == nullptr ? 0 : address(next) - address(b.data);
    for (std::size_t tiles = divided_up(rows, kRows); tiles > 0; --tiles) {  // of nearly equal height
        const std::size_t height = divided_up(rows, tiles);
        switch (height) {
            case 1: multiply_tile<1, Vectors>(a, b, depth, from, c, ahead); break;
            case 2: multiply_tile<2, Vectors>(a, b, depth, from, c, ahead); break;
            case 3: multiply_tile<3, Vectors>(a, b, depth, from, c, ahead); break;
            case 4: multiply_tile<4, Vectors>(a, b, depth, from, c, ahead); break;
            case 5: multiply_tile<5, Vectors>(a, b, depth, from, c, ahead); break;
            default: multiply_tile<6, Vectors>(a, b, depth, from, c, ahead);
        }
        a.data += height * a.stride;
        from.data += height * from.stride;
        c.data += height * c.stride;
        rows -= height;
        if (next != nullptr) ahead += kCacheLine;
    }
}

// c = from + a b: (rows, depth) times (depth, width), where `from` without data stands for zeros. The width is a multiple of
// kGrain.
//
// `next`, where it is given, is what will be read after b, laid out as b is. Each tile of rows fetches a line of it to the
// second-level cache for every four rows of b: where b is as wide as a tile, 16 tiles have fetched all of it.
inline void accumulate(ConstMatrix from, ConstMatrix a, std::size_t rows, ConstMatrix b, std::size_t depth, std::size_t width,
                       Matrix c, const float* next = nullptr) {
    constexpr std::size_t kWide = kLanes * kVectors;
    alignas(kCacheLine) static constexpr float kZeros[kWide]{};
    const auto start = [from](std::size_t column) {
        return from.data == nullptr ? ConstMatrix{kZeros, 0} : ConstMatrix{from.data + column, from.stride};
    };
    std::size_t column = 0;
    for (; column + kWide <= width; column += kWide) {
        multiply_columns<kVectors>(a, rows, {b.data + column, b.stride}, depth, start(column), {c.data + column, c.stride}, next);
    }
    for (; column < width; column += kLanes) {
        multiply_columns<1>(a, rows, {b.data + column, b.stride}, depth, start(column), {c.data + column, c.stride}, nullptr);
    }
}

// c = a b, or c += a b.
inline void multiply(ConstMatrix a, std::size_t rows, ConstMatrix b, std::size_t depth, std::size_t width, Matrix c,
                     bool add = false) {
    accumulate(add ? ConstMatrix{c} : ConstMatrix{nullptr, 0}, a, rows, b, depth, width, c);
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
