// SAM's mask decoder for many prompts of one image, see regionspot/modeling/token_decoder.py for the algebra and for what
// letters mean. Here it is done in three passes over the image's tokens, a tile of them at a time for several prompts, so
// that neither scores nor what prompts read are ever written out; a fourth pass draws masks.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "aligned.hpp"

namespace regionspot {

// Dense, single precision, row-major; at most two axes.
struct Tensor {
    const float* data;
    std::size_t rows;     // 1 of a vector
    std::size_t columns;
};

class TokenDecoder {
public:
    struct Weights;

    // What all prompts of an image share, as kernels want it.
    struct Image {
        AlignedVector tiles;     // the projections and statistics, a tile of image tokens after another
        AlignedVector upscaled;  // (tiles, C, tile), the image's part of the first upscaling; empty without masks
    };

    // `find` gives the arrays of regionspot/export/decoder_weights.py by name; they are copied. Throws
    // std::invalid_argument where sizes do not fit together, or are not the multiples of 16 that kernels work on.
    explicit TokenDecoder(const std::function<Tensor(const std::string&)>& find);

    // From projections (11, C / 2, M) and statistics (3, M), as the model's image part
    // gives them, and the embedding (C, M) where masks will be drawn, else null.
    [[nodiscard]] Image pack(const float* projections, const float* statistics, const float* embedding,
                             std::size_t threads) const;

    struct Request {
        const float* prompts;                   // (count, length, C): IoU token, mask tokens and points
        std::size_t count, length;
        std::vector<std::size_t> wanted;        // mask tokens to read, 0 to 3
        std::size_t width;                      // image tokens in a row
        std::size_t drawn_rows, drawn_columns;  // of image tokens: masks need not be drawn beyond them
        float* tokens;                          // (count, wanted, C)
        float* iou_predictions;                 // (count, wanted)
        float* masks;                           // (count, wanted, 16 M) or null; what is not drawn is left as it is
    };

    // Throws std::invalid_argument for masks of an image that was packed without its embedding.
    void decode(const Image& image, const Request& request, std::size_t threads) const;

    [[nodiscard]] std::size_t channels() const;
    [[nodiscard]] std::size_t cells() const;  // M

private:
    std::shared_ptr<const Weights> weights_;
};

}  // namespace regionspot
