// A linear layer over many tokens, in single precision: the greater part of an image encoder's time.
#pragma once

#include <cstddef>
#include <memory>
#include <new>

namespace regionspot {

// Values that begin where a cache line does; not set to zero.
class AlignedFloats {
public:
    explicit AlignedFloats(std::size_t count)
        : values_(static_cast<float*>(::operator new(count * sizeof(float), std::align_val_t{kAlignment}))) {}

    [[nodiscard]] float* get() const { return values_.get(); }

private:
    static constexpr std::size_t kAlignment = 64;
    struct Release {
        void operator()(float* values) const { ::operator delete(values, std::align_val_t{kAlignment}); }
    };
    std::unique_ptr<float, Release> values_;
};

class LinearLayer {
public:
    // weight (inputs, outputs), bias (outputs); they are copied. With `gelu`, x Phi(x) of each output, Phi the normal
    // distribution's own, not its approximation by tanh. Throws std::invalid_argument for widths that are not multiples of 16.
    LinearLayer(const float* weight, const float* bias, std::size_t inputs, std::size_t outputs, bool gelu);

    // x (rows, inputs) to y (rows, outputs): x weight + bias. Both are dense.
    void apply(const float* x, std::size_t rows, float* y, std::size_t threads) const;

    // Of the vectors that the processor has: 16 with AVX-512, the only one that the kernel was tuned for.
    [[nodiscard]] static std::size_t lanes();
    [[nodiscard]] std::size_t inputs() const { return inputs_; }
    [[nodiscard]] std::size_t outputs() const { return outputs_; }

private:
    std::size_t inputs_, outputs_, depth_;  // inputs that are worked on at a time
    bool gelu_;
    AlignedFloats weight_;  // for each `depth_` inputs, panels of a tile's width, one after the other: (inputs, width)
    AlignedFloats bias_;
};

}  // namespace regionspot
