// Attention over a grid against its definition in double precision, at every level that the processor has.
#include "attention.hpp"

#include "check.hpp"

#include <algorithm>
#include <cmath>
#include <random>
#include <vector>

namespace {

std::vector<float> normal(std::size_t count, float scale, std::mt19937& random) {
    std::normal_distribution<float> draw(0, scale);
    std::vector<float> values(count);
    for (float& value : values) value = draw(random);
    return values;
}

// A query's answer.
std::vector<double> attended(const regionspot::GridAttention& task, std::size_t head, std::size_t query) {
    const std::size_t all = task.rows * task.columns, place = head * all + query, d = task.channels;
    std::vector<double> weights(all), answer(d);
    for (std::size_t key = 0; key < all; ++key) {
        double score = 0;
        for (std::size_t c = 0; c < d; ++c) {
            score += static_cast<double>(task.query[place * d + c]) * task.key[(head * all + key) * d + c];
        }
        weights[key] = score + task.with_rows[place * task.rows + key / task.columns] +
                       task.with_columns[place * task.columns + key % task.columns];
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (std::size_t key = 0; key < all; ++key) {
        for (std::size_t c = 0; c < d; ++c) answer[c] += weights[key] / sum * task.value[(head * all + key) * d + c];
    }
    return answer;
}

void test_grid(std::size_t heads, std::size_t rows, std::size_t columns, std::size_t channels, float scale) {
    std::mt19937 random(7);
    const std::size_t all = rows * columns;
    const std::vector<float> query = normal(heads * all * channels, scale, random);
    const std::vector<float> key = normal(heads * all * channels, 1, random);
    const std::vector<float> value = normal(heads * all * channels, 1, random);
    const std::vector<float> with_rows = normal(heads * all * rows, scale, random);
    const std::vector<float> with_columns = normal(heads * all * columns, scale, random);
    std::vector<float> output(heads * all * channels), again(output.size());
    regionspot::GridAttention task{heads,        rows,         columns,          channels,           query.data(),
                                   key.data(),   value.data(), with_rows.data(), with_columns.data(), output.data()};
    regionspot::grid_attention(task, 1);
    for (std::size_t head = 0; head < heads; ++head) {
        for (std::size_t i = 0; i < all; i += 7) {
            const std::vector<double> expected = attended(task, head, i);
            for (std::size_t c = 0; c < channels; ++c) {
                CHECK(std::abs(output[(head * all + i) * channels + c] - expected[c]) < 1e-4);
            }
        }
    }
    task.output = again.data();
    regionspot::grid_attention(task, 3);
    CHECK(output == again);
}

}  // namespace

int main() {
    test_grid(1, 1, 16, 16, 1);
    test_grid(2, 5, 16, 16, 0.3F);   // fewer keys than a block, and not a multiple of a panel
    test_grid(3, 9, 64, 32, 0.3F);   // more keys than a block
    test_grid(1, 40, 16, 80, 0.1F);  // channels that are no whole panel, as ViT-H has
    test_grid(2, 10, 16, 16, 30);    // scores in the hundreds: one key has nearly all the weight
    return 0;
}
