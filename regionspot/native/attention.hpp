// Attention over a grid of image tokens with decomposed relative positions, as SAM's image encoder has it: scores are
// never written out, only a tile of them at a time is in a core's cache.
#pragma once

#include <cstddef>

namespace regionspot {

// All arrays are dense, single precision; heads of all images come first. M = rows * columns.
struct GridAttention {
    std::size_t heads;          // of all images
    std::size_t rows, columns;  // of the grid
    std::size_t channels;       // of a head; it and `columns` are multiples of 16
    const float* query;         // (heads, M, channels), as key and value
    const float* key;
    const float* value;
    const float* with_rows;     // (heads, M, rows): what is added to a query's scores with the keys of each row
    const float* with_columns;  // (heads, M, columns)
    float* output;              // (heads, M, channels)
};

// softmax(query key^T + with_rows + with_columns) value.
void grid_attention(const GridAttention& task, std::size_t threads);

}  // namespace regionspot
