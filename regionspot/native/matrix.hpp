// Matrices as kernels see them.
#pragma once

#include <cstddef>

#include "aligned.hpp"

namespace regionspot {

constexpr std::size_t kGrain = 16;  // widths of matrices in kernels are multiples of it
constexpr std::size_t kLine = kCacheLine / sizeof(float);  // values in a line of a cache

constexpr std::size_t divided_up(std::size_t count, std::size_t by) { return (count + by - 1) / by; }

constexpr std::size_t rounded_up(std::size_t width) { return divided_up(width, kGrain) * kGrain; }

// A matrix, row after row.
struct Matrix {
    float* data;
    std::size_t stride;  // values from one row to the next
};

struct ConstMatrix {
    const float* data;
    std::size_t stride;

    constexpr ConstMatrix(const float* values, std::size_t row_stride) : data(values), stride(row_stride) {}
    constexpr ConstMatrix(const Matrix& matrix) : data(matrix.data), stride(matrix.stride) {}  // NOLINT: a view of the same
};

}  // namespace regionspot
