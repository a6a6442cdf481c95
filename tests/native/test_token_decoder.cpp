// The token decoder with random weights: its memory, and that nothing depends on how prompts are divided. That its
// answers are those of the model is tested in Python, tests/runtime/test_native_runner.py.
#include "token_decoder.hpp"

#include "check.hpp"
#include "random.hpp"

#include <array>
#include <cmath>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using regionspot::Tensor;
using regionspot::TokenDecoder;

constexpr std::size_t kChannels = 64, kHalf = 32, kCells = 80, kWidth = 16, kHeight = 5, kLength = 7;

std::mt19937 generator(3);

// Weights of a small decoder by name.
class Weights {
public:
    Weights() {
        set("output_tokens", 5, kChannels), set("position_key1", kHalf, kCells);
        set("position_query1", kHalf, kCells), set("position_final_key", kHalf, kCells);
        values_["num_heads"] = {{4}, 1, 1};
        values_["epsilons"] = {{1e-5F, 1e-5F, 1e-5F, 1e-6F}, 1, 4};
        for (const std::string layer : {"layer0", "layer1"}) {
            for (const char* part : {".self.query", ".self.key", ".self.value", ".self.out"}) {
                linear(layer + part, kChannels, kChannels);
            }
            for (const char* part : {".read.query", ".write.key", ".write.value"}) linear(layer + part, kHalf, kChannels);
            linear(layer + ".read.out", kChannels, kHalf);
            linear(layer + ".mlp.0", 96, kChannels), linear(layer + ".mlp.1", kChannels, 96);
            for (const char* part : {".norm1", ".norm2", ".norm3"}) norm(layer + part, kChannels);
        }
        linear("final.query", kHalf, kChannels), linear("final.out", kChannels, kHalf), norm("final.norm", kChannels);
        for (const char* name : {"key1.u0", "u0.value1", "query1.u0", "u1.w0", "final_key.w0", "final_key.u1",
                                 "w0.final_value", "u1.final_value"}) {
            set(name, kHalf, kHalf);
        }
        for (const char* name : {"u0.u0", "w0.w0", "u1.u1"}) set(name, kHalf, kHalf, 0);  // or variances may be negative
        for (const char* name : {"w0.drift", "u1.drift", "final_key.drift", "drift.final_value", "value1_bias",
                                 "final_value_bias"}) {
            set(name, 1, kHalf);
        }
        set("drift.drift", 1, 1);
        set("upscale.image", kChannels, kChannels), set("upscale.image_offset", 1, kChannels);
        set("upscale.w0", kChannels, kHalf), set("upscale.u1", kChannels, kHalf);
        set("upscale.drift", 1, kChannels), set("upscale.bias", 1, kChannels);
        norm("upscale.norm", kChannels / 4);
        set("upscale.second.weight", kHalf, kChannels / 4), set("upscale.second.bias", 1, kHalf);
        mlp("iou", 4);
        for (const char* name : {"filter0", "filter1", "filter2", "filter3"}) mlp(name, kChannels / 8);
    }

    [[nodiscard]] Tensor find(const std::string& name) const {
        const auto& [values, rows, columns] = values_.at(name);
        return {values.data(), rows, columns};
    }

    void set(const std::string& name, std::size_t rows, std::size_t columns, float scale = 0.1F) {
        values_[name] = {normal(rows * columns, scale == 0 ? 1e-6F : scale, generator), rows, columns};
    }

private:
    struct Entry {
        std::vector<float> values;
        std::size_t rows, columns;
    };

    void linear(const std::string& name, std::size_t out, std::size_t in) {
        set(name + ".weight", out, in), set(name + ".bias", 1, out);
    }

    void norm(const std::string& name, std::size_t count) { set(name + ".weight", 1, count), set(name + ".bias", 1, count); }

    void mlp(const std::string& name, std::size_t out) {
        linear(name + ".0", kChannels, kChannels), linear(name + ".1", kChannels, kChannels);
        linear(name + ".2", out, kChannels);
    }

    std::map<std::string, Entry> values_;
};

struct Answer {
    std::vector<float> tokens, iou_predictions, masks;
};

Answer ask(const TokenDecoder& decoder, const TokenDecoder::Image& image, const std::vector<float>& prompts,
           const std::vector<std::size_t>& wanted, bool draw, std::size_t threads, std::size_t rows = kHeight,
           std::size_t columns = kWidth) {
    const std::size_t count = prompts.size() / (kLength * kChannels), answers = count * wanted.size();
    Answer answer{std::vector<float>(answers * kChannels), std::vector<float>(answers),
                  std::vector<float>(draw ? answers * 16 * kCells : 0, NAN)};
    decoder.decode(image, {prompts.data(), count, kLength, wanted, kWidth, rows, columns,
                           answer.tokens.data(), answer.iou_predictions.data(), draw ? answer.masks.data() : nullptr},
                   threads);
    return answer;
}

template <typename Work>
bool refused(const Work& work) {
    try {
        work();
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void test_division(const TokenDecoder& decoder, const TokenDecoder::Image& image) {
    for (const std::vector<std::size_t>& wanted : {std::vector<std::size_t>{0}, std::vector<std::size_t>{1, 2, 3}}) {
        const std::vector<float> prompts = normal(11 * kLength * kChannels, 1, generator);
        const Answer all = ask(decoder, image, prompts, wanted, true, 1);
        for (const float value : all.tokens) CHECK(std::isfinite(value));
        for (const float value : all.masks) CHECK(std::isfinite(value));  // each pixel was written
        const Answer in_threads = ask(decoder, image, prompts, wanted, true, 3);
        CHECK(all.tokens == in_threads.tokens && all.masks == in_threads.masks);
        CHECK(all.iou_predictions == in_threads.iou_predictions);
        CHECK(all.tokens == ask(decoder, image, prompts, wanted, false, 2).tokens);
        const std::vector<float> one(prompts.end() - kLength * kChannels, prompts.end());
        const Answer alone = ask(decoder, image, one, wanted, true, 1);
        CHECK(std::equal(alone.tokens.rbegin(), alone.tokens.rend(), all.tokens.rbegin()));
        CHECK(std::equal(alone.masks.rbegin(), alone.masks.rend(), all.masks.rbegin()));
    }
    CHECK(ask(decoder, image, {}, {0}, true, 2).tokens.empty());
}

void test_only_what_is_wanted_is_drawn(const TokenDecoder& decoder, const TokenDecoder::Image& image) {
    const std::vector<float> prompts = normal(3 * kLength * kChannels, 1, generator);
    const Answer all = ask(decoder, image, prompts, {0}, true, 1), four = ask(decoder, image, prompts, {0}, true, 1, 4);
    CHECK(all.tokens == four.tokens && all.iou_predictions == four.iou_predictions);
    constexpr std::size_t kMask = 16 * kCells, kDrawn = 16 * kWidth * 4;
    for (std::size_t i = 0; i < all.masks.size(); ++i) {
        CHECK(i % kMask < kDrawn ? four.masks[i] == all.masks[i] : std::isnan(four.masks[i]));
    }
}

}  // namespace

int main() {
    Weights weights;
    const auto find = [&](const std::string& name) { return weights.find(name); };
    const TokenDecoder decoder(find);
    CHECK(decoder.channels() == kChannels && decoder.cells() == kCells);
    const std::vector<float> projections = normal(11 * kHalf * kCells, 0.3F, generator);
    const std::vector<float> embedding = normal(kChannels * kCells, 1, generator);
    const std::vector<float> statistics(3 * kCells, 100.0F);
    const TokenDecoder::Image image = decoder.pack(projections.data(), statistics.data(), embedding.data(), 2);
    test_division(decoder, image);
    test_only_what_is_wanted_is_drawn(decoder, image);

    const TokenDecoder::Image plain = decoder.pack(projections.data(), statistics.data(), nullptr, 1);
    const std::vector<float> prompts = normal(kLength * kChannels, 1, generator);
    CHECK(refused([&] { ask(decoder, plain, prompts, {0}, true, 1); }));
    CHECK(refused([&] { ask(decoder, plain, prompts, {4}, false, 1); }));
    weights.set("u0.u0", kHalf, kHalf + 1);
    CHECK(refused([&] { TokenDecoder{find}; }));
    weights.set("u0.u0", kHalf, kHalf);
    weights.set("position_key1", kHalf, kCells - 1);
    CHECK(refused([&] { TokenDecoder{find}; }));
    return 0;
}
