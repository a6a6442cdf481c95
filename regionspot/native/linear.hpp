// A linear layer over many tokens, in single precision: the greater part of an image encoder's time.
#pragma once

#include <cstddef>

#include "aligned.hpp"

namespace regionspot {

// What follows a layer, of each output x: nothing; x Phi(x), Phi the normal distribution's own, not its approximation by
// tanh; or x / (1 + exp(-1.702 x)).
enum class Activation { kNone, kGelu, kQuickGelu };

class LinearLayer {
public:
    // weight (inputs, outputs), bias (outputs); they are copied. Throws std::invalid_argument for widths that are not multiples of 16.
    LinearLayer(const float* weight, const float* bias, std::size_t inputs, std::size_t outputs, Activation activation);

    // x (rows, inputs) to y (rows, outputs): x weight + bias. Both are dense.
    void apply(const float* x, std::size_t rows, float* y, std::size_t threads) const;

    // Of the vectors that the processor has: 16 with AVX-512, the only one that the kernel was tuned for.
    [[nodiscard]] static std::size_t lanes();
    [[nodiscard]] std::size_t inputs() const { return inputs_; }
    [[nodiscard]] std::size_t outputs() const { return outputs_; }

private:
    std::size_t inputs_, outputs_, depth_;  // inputs that are worked on at a time
    Activation activation_;
    AlignedFloats weight_;  // for each `depth_` inputs, panels of a tile's width, one after the other: (inputs, width)
    AlignedFloats bias_;
};

}  // namespace regionspot
