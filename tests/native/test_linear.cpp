// Linear layers against sums in double precision.
#include "linear.hpp"

#include "check.hpp"
#include "random.hpp"

#include <cmath>
#include <stdexcept>
#include <vector>

namespace {

using regionspot::Activation;
using regionspot::LinearLayer;

double expected(const std::vector<float>& x, const std::vector<float>& weight, float bias, std::size_t row,
                std::size_t column, std::size_t inputs, std::size_t outputs, Activation activation) {
    double sum = bias;
    for (std::size_t k = 0; k < inputs; ++k) {
        sum += static_cast<double>(x[row * inputs + k]) * weight[k * outputs + column];
    }
    if (activation == Activation::kGelu) return sum / 2 * (1 + std::erf(sum / std::sqrt(2.0)));
    return activation == Activation::kQuickGelu ? sum / (1 + std::exp(-1.702 * sum)) : sum;
}

void test_layer(std::size_t rows, std::size_t inputs, std::size_t outputs, Activation activation) {
    std::mt19937 random(3);
    const std::vector<float> x = normal(rows * inputs, 1, random), bias = normal(outputs, 1, random);
    const std::vector<float> weight = normal(inputs * outputs, 1 / std::sqrt(static_cast<float>(inputs)), random);
    const LinearLayer layer(weight.data(), bias.data(), inputs, outputs, activation);
    CHECK(layer.inputs() == inputs && layer.outputs() == outputs);
    std::vector<float> y(rows * outputs + 1, NAN), again(y);
    layer.apply(x.data(), rows, y.data(), 1);
    for (std::size_t i = 0; i < rows * outputs; i += 1 + rows * outputs / 5000) {
        const std::size_t row = i / outputs, column = i % outputs;
        CHECK(std::abs(y[i] - expected(x, weight, bias[column], row, column, inputs, outputs, activation)) < 1e-5);
    }
    CHECK(std::isnan(y.back()));  // nothing is written behind the end
    layer.apply(x.data(), rows, again.data(), 3);  // the same bits, however the work is divided
    y.back() = again.back() = 0;
    CHECK(y == again);
}

// All of what GELU is where it bends, and where it is 0 or its argument.
void test_gelu() {
    constexpr std::size_t kOutputs = 16, kRows = 2001;
    std::vector<float> x(kRows * kOutputs), weight(kOutputs * kOutputs), bias(kOutputs), y(x.size(), NAN);
    for (std::size_t i = 0; i < kOutputs; ++i) weight[i * kOutputs + i] = 1;
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = (static_cast<float>(i) - static_cast<float>(x.size()) / 2) / 1600;
    LinearLayer(weight.data(), bias.data(), kOutputs, kOutputs, Activation::kGelu).apply(x.data(), kRows, y.data(), 1);
    for (std::size_t i = 0; i < x.size(); ++i) {
        const double value = x[i];
        CHECK(std::abs(y[i] - value / 2 * (1 + std::erf(value / std::sqrt(2.0)))) < 1.5e-6);
    }
}

void test_widths_that_do_not_fit() {
    const std::vector<float> values(64 * 64);
    for (const auto& [inputs, outputs] : {std::pair<std::size_t, std::size_t>{24, 16}, {16, 40}, {0, 16}, {16, 0}}) {
        bool thrown = false;
        try {
            LinearLayer(values.data(), values.data(), inputs, outputs, Activation::kNone);
        } catch (const std::invalid_argument&) {
            thrown = true;
        }
        CHECK(thrown);
    }
}

}  // namespace

int main() {
    test_layer(1, 16, 16, Activation::kNone);
    test_layer(9, 32, 48, Activation::kGelu);      // whole tiles
    test_layer(13, 1200, 80, Activation::kNone);   // two pieces of inputs, the last tile not full, the last panel neither
    test_layer(100, 768, 144, Activation::kGelu);  // GELU once, of the whole sum
    test_layer(800, 48, 32, Activation::kNone);   // several chunks of rows
    test_layer(30, 1040, 336, Activation::kGelu);
    test_layer(30, 1072, 64, Activation::kQuickGelu);
    test_layer(0, 16, 16, Activation::kNone);
    test_gelu();
    test_widths_that_do_not_fit();
    return 0;
}
