// The attention of SAM's image encoder, from the projection of its tokens to what its heads found: within windows or over
// the whole image, with decomposed relative positions. Scores are never written out; a tile of them at a time is in a
// core's cache. Tokens are not moved into windows and back, and padding is never made.
#pragma once

#include <cstddef>

namespace regionspot {

// All arrays are dense, single precision.
struct GridAttention {
    std::size_t images, height, width;  // of tokens
    std::size_t heads, channels;        // of a head: a multiple of 16
    std::size_t rows, columns;          // of a window; those of the image where attention is global
    float scale;                        // of queries times keys
    const float* projected;             // (images, height, width, 3, heads, channels): queries, keys and values
    const float* padding;               // (3, heads, channels): of the places of a window that lie outside the image
    const float* relative_rows;         // (rows, channels, rows): times a query in row i, its score with each row of keys
    const float* relative_columns;      // (columns, channels, columns)
    float* output;                      // (images, height, width, heads, channels)
    std::size_t worked_rows, worked_columns;  // of tokens: windows that begin beyond them are left as they are
};

// softmax(scale query key^T + positions) value, for each query over the keys of its window.
void grid_attention(const GridAttention& task, std::size_t threads);

}  // namespace regionspot
