// matrix.inl, and its functions of vectors as functions of arrays, see levels.hpp.

#include "matrix.inl"

inline void exponentials(const float* x, std::size_t count, float* to) {
    for (std::size_t i = 0; i < count; i += kLanes) store(to + i, exponential(load(x + i)));
}

inline void quick_gelus(const float* x, std::size_t count, float* to) {
    for (std::size_t i = 0; i < count; i += kLanes) store(to + i, quick_gelu(load(x + i)));
}

inline void gelus(const float* x, std::size_t count, float* to) {
    for (std::size_t i = 0; i < count; i += kLanes) store(to + i, gelu(load(x + i)));
}
