// Products of matrices against sums in double precision, and functions against those of <cmath>, at each level of an instruction set.
#include "matrix.hpp"

#include "check.hpp"
#include "random.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#define REGIONSPOT_KERNELS "test_matrix.inl"
#include "levels.hpp"

namespace {

constexpr float kUntouched = 7;

void test_product(std::size_t rows, std::size_t depth, std::size_t width, bool add) {
    std::mt19937 random(5);
    std::normal_distribution<float> draw(0, 1);
    const std::size_t of_a = depth + 3, of_b = width + 16, of_c = width + 5;  // strides
    std::vector<float> a(rows * of_a), b((depth + 1) * of_b), c((rows + 1) * of_c, kUntouched);
    for (float& value : a) value = draw(random);
    for (float& value : b) value = draw(random);
    REGIONSPOT_BEST(multiply)({a.data(), of_a}, rows, {b.data(), of_b}, depth, width, {c.data(), of_c}, add);
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t column = 0; column < width; ++column) {
            double sum = add ? kUntouched : 0;
            for (std::size_t k = 0; k < depth; ++k) sum += static_cast<double>(a[row * of_a + k]) * b[k * of_b + column];
            CHECK(std::abs(c[row * of_c + column] - sum) < 1e-4);
        }
        CHECK(std::all_of(c.begin() + static_cast<std::ptrdiff_t>(row * of_c + width),
                          c.begin() + static_cast<std::ptrdiff_t>((row + 1) * of_c),
                          [](float value) { return value == kUntouched; }));
    }
    CHECK(std::all_of(c.end() - static_cast<std::ptrdiff_t>(of_c), c.end(), [](float value) { return value == kUntouched; }));
}

// c = bias + a b, the bias in all rows; what is read ahead changes nothing.
void test_bias(std::size_t rows) {
    constexpr std::size_t kDepth = 40, kWidth = 64;
    std::mt19937 random(6);
    const std::vector<float> a = normal(rows * kDepth, 1, random), b = normal(2 * kDepth * kWidth, 1, random);
    const std::vector<float> bias = normal(kWidth, 1, random);
    std::vector<float> c(rows * kWidth), plain(rows * kWidth);
    REGIONSPOT_BEST(accumulate)({bias.data(), 0}, {a.data(), kDepth}, rows, {b.data(), kWidth}, kDepth, kWidth,
                                {c.data(), kWidth}, b.data() + kDepth * kWidth);
    REGIONSPOT_BEST(multiply)({a.data(), kDepth}, rows, {b.data(), kWidth}, kDepth, kWidth, {plain.data(), kWidth}, false);
    for (std::size_t i = 0; i < c.size(); ++i) CHECK(std::abs(c[i] - plain[i] - bias[i % kWidth]) < 1e-4);
}

void test_functions() {
    std::vector<float> x;
    for (int i = -12000; i < 8000; ++i) x.push_back(static_cast<float>(i) * 0.011F);
    for (const float value : {-200.0F, -1e9F, -1e30F, std::numeric_limits<float>::lowest()}) x.push_back(value);
    x.resize((x.size() / 16 + 1) * 16);
    std::vector<float> found(x.size());
    REGIONSPOT_BEST(exponentials)(x.data(), x.size(), found.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double wanted = std::exp(static_cast<double>(x[i]));
        CHECK(std::abs(found[i] - wanted) <= (x[i] > -87 ? 3e-7 + 1.2e-7 * std::abs(x[i]) : 0) * wanted + 2e-38);
    }
    REGIONSPOT_BEST(gelus)(x.data(), x.size(), found.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double wanted = 0.5 * x[i] * std::erfc(-x[i] * std::sqrt(0.5));
        CHECK(std::abs(found[i] - wanted) <= 1e-6 * std::max(1.0, std::abs(wanted)));
    }
    REGIONSPOT_BEST(quick_gelus)(x.data(), x.size(), found.data());
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double wanted = x[i] / (1 + std::exp(-1.702 * x[i]));
        CHECK(std::abs(found[i] - wanted) <= 1e-6 * std::max(1.0, std::abs(wanted)) + 2e-38 * std::abs(x[i]));
    }
}

}  // namespace

int main() {
    for (std::size_t rows = 1; rows <= 19; ++rows) test_bias(rows);
    test_functions();
    for (std::size_t rows = 1; rows <= 19; ++rows) {
        for (const std::size_t depth : {0, 1, 3, 4, 5, 16, 27, 128}) {
            for (const std::size_t width : {16, 48, 64, 80, 192}) {
                for (const bool add : {false, true}) test_product(rows, depth, width, add);
            }
        }
    }
    return 0;
}
