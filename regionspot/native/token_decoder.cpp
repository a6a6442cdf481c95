#include "token_decoder.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "matrix.hpp"
#include "parallel.hpp"
#include "simd.hpp"

namespace regionspot {
namespace {

constexpr std::size_t kTile = 64;       // image tokens that are worked on at a time
constexpr std::size_t kGroup = 4;       // prompts that look at a tile while it is in the caches
constexpr std::size_t kMaskTokens = 4;  // of SAM
constexpr std::size_t kSubcells = 4;    // what a cell becomes by each of two upscalings

AlignedVector copied(const Tensor& tensor) { return {tensor.data, tensor.data + tensor.rows * tensor.columns}; }

// y = x weight^T + bias, with the weight in panels of kTile outputs.
struct Linear {
    std::size_t in, width;  // the outputs, rounded up to kGrain with zeros
    AlignedVector panels, bias;

    Linear(const Tensor& weight, const Tensor& offset) : in(weight.columns), width(rounded_up(weight.rows)) {
        if (offset.columns != weight.rows) throw std::invalid_argument("a linear layer's bias does not fit its weight");
        bias = copied(offset);
        bias.resize(width);
        for (std::size_t first = 0; first < width; first += kTile) {
            const std::size_t end = std::min(first + kTile, width);
            for (std::size_t k = 0; k < in; ++k) {
                for (std::size_t row = first; row < end; ++row) {
                    panels.push_back(row < weight.rows ? weight.data[row * in + k] : 0.0F);
                }
            }
        }
    }
};

struct Norm {
    AlignedVector weight, bias;
    float epsilon;
};

struct Layer {
    Linear self_query, self_key, self_value, self_out, read_query, read_out, write_key, write_value;
    std::array<Linear, 2> mlp;
    std::array<Norm, 3> norms;
};

using Mlp = std::array<Linear, 3>;

// Where the parts of an image lie within a tile. Values are turned, (kTile, heads * value_width), all else is (C / 2, kTile).
struct Layout {
    std::size_t key0, value0, query0, out0, key1, value1, query1, out0_scaled, out1, final_key, final_value, statistics, size;

    Layout(std::size_t half, std::size_t values) {
        const std::size_t rows = half * kTile, turned = values * kTile;
        std::size_t next = 0;
        const auto take = [&next](std::size_t count) { return (next += count) - count; };
        key0 = take(rows), value0 = take(turned);                                            // the first pass
        query0 = take(rows), out0 = take(rows), key1 = take(rows), value1 = take(turned);    // the second
        query1 = take(rows), out0_scaled = take(rows), out1 = take(rows);                    // the third
        final_key = take(rows), final_value = take(turned), statistics = take(3 * kTile);
        size = next;
    }
};

}  // namespace

struct TokenDecoder::Weights {
    std::size_t channels, half, heads, head, value_width, cells, tiles;
    Layout layout;
    std::array<Layer, 2> layers;
    Linear final_query, final_out;
    Norm final_norm;
    Mlp iou;
    std::array<Mlp, kMaskTokens> filters;
    // (C / 2, C / 2), named after what they are products of
    AlignedVector u0_u0, key1_u0, u0_value1, query1_u0, w0_w0, u1_w0, u1_u1, final_key_w0, final_key_u1;
    AlignedVector w0_final_value, u1_final_value;
    // (C / 2,)
    AlignedVector w0_drift, u1_drift, final_key_drift, drift_final_value, value1_bias, final_value_bias;
    float drift_drift, epsilon0, epsilon1;
    AlignedVector positions;  // (tiles, 3, C / 2, kTile): of layer 1's keys and queries, of the final keys
    // Upscaling: (C, C), (C,), (C, C / 2) twice, (C,) twice, and the second convolution (C / 2, C / 4), (C / 2,).
    AlignedVector upscale_image, upscale_image_offset, upscale_w0, upscale_u1, upscale_drift, upscale_bias;
    Norm upscale_norm;
    AlignedVector upscale_second, upscale_second_bias;
};

namespace {

using Weights = TokenDecoder::Weights;
using Image = TokenDecoder::Image;
using Request = TokenDecoder::Request;

// One tile of a row-major (rows, M), as (rows, kTile).
void copy_tile(const float* from, std::size_t rows, std::size_t cells, std::size_t tile, float* to) {
    const std::size_t first = tile * kTile, width = std::min(kTile, cells - first);
    for (std::size_t row = 0; row < rows; ++row) {
        std::memcpy(to + row * kTile, from + row * cells + first, width * sizeof(float));
    }
}

// The sizes of one request, and what one thread needs for a group of its prompts.
struct Scratch {
    std::size_t length, rows, padded;     // tokens of a prompt; R = heads * length; R rounded up
    std::size_t wanted, wanted_rows;      // tokens that are read in the end, the IoU token first; heads times that
    std::size_t read_stride;              // of what is summed for a row: values, products with p0, with p1
    bool draws;
    AlignedVector prompts, tokens, sum, left, right, wide;        // (kGroup * length, C or more)
    AlignedVector read_queries, read_queries1, keys0, keys1;      // (kGroup * length, C / 2)
    AlignedVector values0, values1, doubled0, doubled1, read;     // likewise
    AlignedVector asked, final_queries;                           // (kGroup * wanted, C), (kGroup * wanted, C / 2)
    AlignedVector spread, product, turned, mixed, turned_mix;     // of values, see `spread_values`
    AlignedVector scores, along, change0, change1, column;        // of a tile
    AlignedVector image, subcell, pixels;                         // of a tile, for masks

    struct Prompt {
        AlignedVector gram0, key1, query1, gram_w, cross, gram1;  // (R, padded)
        AlignedVector final0, final1;                             // (wanted rows, padded)
        AlignedVector drift0, drift1, final_drift;                // (padded), (padded), (wanted rows)
        AlignedVector p0, a0, p1, a1;                             // (tiles, R, kTile), (tiles, kTile)
        AlignedVector largest, sums, extra, total;                // (R), (R), (R), (R, read_stride)
        AlignedVector upscale0, upscale1, filters;                // (C, padded) twice, (wanted - 1, C / 8)
    };
    std::vector<Prompt> prompt;

    Scratch(const Weights& w, const Request& request, std::size_t group)
        : length(request.length), rows(w.heads * length), padded(rounded_up(rows)), wanted(1 + request.wanted.size()),
          wanted_rows(w.heads * wanted), read_stride(w.value_width + 2 * padded), draws(request.masks != nullptr),
          prompt(group) {
        const std::size_t all = group * std::max(length, wanted), c = w.channels, half = w.half;
        for (auto* buffer : {&prompts, &tokens, &sum, &right}) buffer->resize(all * c);
        left.resize(4 * all * c);
        wide.resize(all * std::max(w.layers[0].mlp[0].width, w.layers[1].mlp[0].width));
        for (auto* buffer : {&read_queries, &read_queries1, &keys0, &keys1, &values0, &values1, &doubled0, &doubled1,
                             &read, &final_queries}) {
            buffer->resize(all * half);
        }
        asked.resize(group * wanted * c);
        for (auto* buffer : {&spread, &product}) buffer->resize(half * padded);
        const std::size_t most = std::max(rows, wanted_rows);
        for (auto* buffer : {&turned, &mixed, &turned_mix}) buffer->resize(most * half);
        for (auto* buffer : {&scores, &along}) buffer->resize(most * kTile);
        for (auto* buffer : {&change0, &change1}) buffer->resize(kTile * padded);
        column.resize(std::max(3 * kTile, length));
        if (draws) image.resize(c * kTile), subcell.resize(half * kTile), pixels.resize(wanted * kTile);
        for (Prompt& own : prompt) {
            for (auto* buffer : {&own.gram0, &own.key1, &own.query1, &own.gram_w, &own.cross, &own.gram1}) {
                buffer->resize(rows * padded);
            }
            for (auto* buffer : {&own.final0, &own.final1}) buffer->resize(wanted_rows * padded);
            for (auto* buffer : {&own.drift0, &own.drift1}) buffer->resize(padded);
            own.final_drift.resize(wanted_rows);
            const std::size_t beyond = (padded - rows) * kTile;  // of the last tile, which is turned in whole blocks
            own.p0.resize(w.tiles * rows * kTile + beyond);
            own.a0.resize(w.tiles * kTile);
            own.p1.resize((draws ? w.tiles : 1) * rows * kTile + beyond);
            own.a1.resize((draws ? w.tiles : 1) * kTile);
            for (auto* buffer : {&own.largest, &own.sums, &own.extra}) buffer->resize(most);
            own.total.resize(most * read_stride);
            if (draws) {
                own.upscale0.resize(c * padded), own.upscale1.resize(c * padded);
                own.filters.resize((wanted - 1) * w.filters[0][2].width);
            }
        }
    }
};

}  // namespace
}  // namespace regionspot

#define REGIONSPOT_KERNELS "token_decoder.inl"
#include "levels.hpp"

namespace regionspot {

TokenDecoder::TokenDecoder(const std::function<Tensor(const std::string&)>& find) {
    const auto vector = [&](const std::string& name, std::size_t count) {
        const Tensor found = find(name);
        if (found.rows * found.columns != count) {
            throw std::invalid_argument(name + " has " + std::to_string(found.rows * found.columns) + " values, not " +
                                        std::to_string(count));
        }
        return copied(found);
    };
    const std::size_t channels = find("output_tokens").columns, half = channels / 2;
    const auto linear = [&](const std::string& name, std::size_t out, std::size_t in) {
        const Tensor weight = find(name + ".weight");
        if (weight.rows != out || weight.columns != in) throw std::invalid_argument(name + " is of another size");
        return Linear(weight, find(name + ".bias"));
    };
    const auto mlp = [&](const std::string& name, std::size_t out) {
        return Mlp{linear(name + ".0", channels, channels), linear(name + ".1", channels, channels),
                   linear(name + ".2", out, channels)};
    };
    const Tensor positions = find("position_key1");
    const std::size_t cells = positions.columns;
    const auto heads = static_cast<std::size_t>(find("num_heads").data[0]);
    if (half % kGrain != 0 || cells % kGrain != 0 || positions.rows != half || heads == 0 || half % heads != 0 ||
        channels % heads != 0 || channels % 8 != 0) {
        throw std::invalid_argument(
            "the decoder's kernels need channels that are a multiple of 32, and image tokens that are one of 16");
    }
    const std::size_t tiles = divided_up(cells, kTile), value_width = rounded_up(half / heads);
    const AlignedVector epsilons = vector("epsilons", 4);
    const auto norm = [&](const std::string& name, std::size_t count, float epsilon) {
        return Norm{vector(name + ".weight", count), vector(name + ".bias", count), epsilon};
    };
    const auto layer = [&](const std::string& name) {
        const auto full = [&](const char* own) { return linear(name + own, channels, channels); };
        const auto to_half = [&](const char* own) { return linear(name + own, half, channels); };
        const std::size_t hidden = find(name + ".mlp.0.weight").rows;
        if (hidden % kGrain != 0) throw std::invalid_argument(name + ".mlp.0 is not as wide as a multiple of 16");
        const auto own_norm = [&](const char* own) { return norm(name + own, channels, epsilons[0]); };
        return Layer{full(".self.query"), full(".self.key"), full(".self.value"), full(".self.out"),
                     to_half(".read.query"), linear(name + ".read.out", channels, half), to_half(".write.key"),
                     to_half(".write.value"),
                     {linear(name + ".mlp.0", hidden, channels), linear(name + ".mlp.1", channels, hidden)},
                     {own_norm(".norm1"), own_norm(".norm2"), own_norm(".norm3")}};
    };
    const auto square = [&](const std::string& name) { return vector(name, half * half); };
    const auto own = [&](const std::string& name) { return vector(name, half); };
    auto weights = std::make_shared<Weights>(Weights{
        .channels = channels, .half = half, .heads = heads, .head = half / heads, .value_width = value_width,
        .cells = cells, .tiles = tiles, .layout = Layout(half, heads * value_width),
        .layers = {layer("layer0"), layer("layer1")},
        .final_query = linear("final.query", half, channels), .final_out = linear("final.out", channels, half),
        .final_norm = norm("final.norm", channels, epsilons[0]),
        .iou = mlp("iou", kMaskTokens),
        .filters = {mlp("filter0", channels / 8), mlp("filter1", channels / 8), mlp("filter2", channels / 8),
                    mlp("filter3", channels / 8)},
        .u0_u0 = square("u0.u0"), .key1_u0 = square("key1.u0"), .u0_value1 = square("u0.value1"),
        .query1_u0 = square("query1.u0"), .w0_w0 = square("w0.w0"), .u1_w0 = square("u1.w0"), .u1_u1 = square("u1.u1"),
        .final_key_w0 = square("final_key.w0"), .final_key_u1 = square("final_key.u1"),
        .w0_final_value = square("w0.final_value"), .u1_final_value = square("u1.final_value"),
        .w0_drift = own("w0.drift"), .u1_drift = own("u1.drift"), .final_key_drift = own("final_key.drift"),
        .drift_final_value = own("drift.final_value"), .value1_bias = own("value1_bias"),
        .final_value_bias = own("final_value_bias"),
        .drift_drift = vector("drift.drift", 1)[0], .epsilon0 = epsilons[1], .epsilon1 = epsilons[2],
        .positions = AlignedVector(tiles * 3 * half * kTile),
        .upscale_image = vector("upscale.image", channels * channels),
        .upscale_image_offset = vector("upscale.image_offset", channels),
        .upscale_w0 = vector("upscale.w0", channels * half), .upscale_u1 = vector("upscale.u1", channels * half),
        .upscale_drift = vector("upscale.drift", channels), .upscale_bias = vector("upscale.bias", channels),
        .upscale_norm = norm("upscale.norm", channels / 4, epsilons[3]),
        .upscale_second = vector("upscale.second.weight", half * channels / 4),
        .upscale_second_bias = vector("upscale.second.bias", half)});
    std::size_t index = 0;
    for (const char* name : {"position_key1", "position_query1", "position_final_key"}) {
        const AlignedVector own_positions = vector(name, half * cells);
        for (std::size_t tile = 0; tile < tiles; ++tile) {
            float* const to = weights->positions.data() + (tile * 3 + index) * half * kTile;
            copy_tile(own_positions.data(), half, cells, tile, to);
        }
        ++index;
    }
    weights_ = std::move(weights);
}

TokenDecoder::Image TokenDecoder::pack(const float* projections, const float* statistics, const float* embedding,
                                       std::size_t threads) const {
    const Weights& w = *weights_;
    Image image;
    image.tiles.resize(w.tiles * w.layout.size);
    if (embedding != nullptr) image.upscaled.resize(w.tiles * w.channels * kTile);
    const auto pack_tile = REGIONSPOT_BEST(pack_tile);
    parallel_for(w.tiles, threads, [&](std::size_t tile, std::size_t) {
        pack_tile(w, projections, statistics, embedding, tile, image);
    });
    return image;
}

void TokenDecoder::decode(const Image& image, const Request& request, std::size_t threads) const {
    if (request.masks != nullptr && image.upscaled.empty()) {
        throw std::invalid_argument("the image was packed without its embedding, so that no masks can be drawn");
    }
    for (const std::size_t token : request.wanted) {
        if (token >= kMaskTokens) throw std::invalid_argument("SAM has mask tokens 0 to 3");
    }
    if (request.count == 0) return;
    threads = std::max<std::size_t>(1, std::min(threads, request.count));
    const std::size_t group = std::min(kGroup, divided_up(request.count, threads));
    const std::size_t groups = divided_up(request.count, group);
    std::vector<std::unique_ptr<Scratch>> scratch(threads);
    const auto decode_group = REGIONSPOT_BEST(decode_group);
    parallel_for(groups, threads, [&](std::size_t index, std::size_t thread) {
        if (!scratch[thread]) scratch[thread] = std::make_unique<Scratch>(*weights_, request, group);
        const std::size_t first = index * group;
        decode_group(*weights_, image, request, first, std::min(group, request.count - first), *scratch[thread]);
    });
}

std::size_t TokenDecoder::channels() const { return weights_->channels; }

std::size_t TokenDecoder::cells() const { return weights_->cells; }

}  // namespace regionspot
