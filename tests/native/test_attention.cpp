// The image encoder's attention against its definition in double precision.
#include "attention.hpp"

#include "check.hpp"
#include "random.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace {

using regionspot::GridAttention;

// Queries (0), keys (1) or values (2) of a head in a place of the image, or outside it.
const float* of_token(const GridAttention& task, std::size_t part, std::size_t image, std::size_t y, std::size_t x,
                      std::size_t head) {
    const std::size_t of_part = task.heads * task.channels;
    const float* const token = y < task.height && x < task.width
                                   ? task.projected + ((image * task.height + y) * task.width + x) * 3 * of_part
                                   : task.padding;
    return token + part * of_part + head * task.channels;
}

// What a head finds for one token.
std::vector<double> attended(const GridAttention& task, std::size_t image, std::size_t y, std::size_t x, std::size_t head) {
    const std::size_t top = y / task.rows * task.rows, left = x / task.columns * task.columns, d = task.channels;
    const float* const query = of_token(task, 0, image, y, x, head);
    std::vector<double> weights, answer(d);
    for (std::size_t i = 0; i < task.rows; ++i) {
        for (std::size_t j = 0; j < task.columns; ++j) {
            const float* const key = of_token(task, 1, image, top + i, left + j, head);
            double score = 0;
            for (std::size_t c = 0; c < d; ++c) {
                score += static_cast<double>(query[c]) *
                         (task.scale * key[c] + task.relative_rows[((y - top) * d + c) * task.rows + i] +
                          task.relative_columns[((x - left) * d + c) * task.columns + j]);
            }
            weights.push_back(score);
        }
    }
    const double largest = *std::max_element(weights.begin(), weights.end());
    double sum = 0;
    for (double& weight : weights) sum += weight = std::exp(weight - largest);
    for (std::size_t k = 0; k < weights.size(); ++k) {
        const float* const value = of_token(task, 2, image, top + k / task.columns, left + k % task.columns, head);
        for (std::size_t c = 0; c < d; ++c) answer[c] += weights[k] / sum * value[c];
    }
    return answer;
}

void test_grid(std::size_t images, std::size_t height, std::size_t width, std::size_t rows, std::size_t columns,
               std::size_t heads, std::size_t channels, float scale) {
    std::mt19937 random(7);
    const std::size_t of_part = heads * channels, tokens = images * height * width;
    const std::vector<float> projected = normal(tokens * 3 * of_part, 1, random), padding = normal(3 * of_part, 1, random);
    const std::vector<float> relative_rows = normal(rows * channels * rows, 0.2F, random);
    const std::vector<float> relative_columns = normal(columns * channels * columns, 0.2F, random);
    std::vector<float> output(tokens * of_part, NAN), again(output.size(), NAN);
    GridAttention task{images, height, width, heads, channels, rows, columns, scale, projected.data(), padding.data(),
                       relative_rows.data(), relative_columns.data(), output.data(), height, width};
    regionspot::grid_attention(task, 1);
    for (std::size_t place = 0; place < tokens * heads; place += 3) {
        const std::size_t token = place / heads, image = token / (height * width), y = token / width % height;
        const std::vector<double> expected = attended(task, image, y, token % width, place % heads);
        for (std::size_t c = 0; c < channels; ++c) CHECK(std::abs(output[place * channels + c] - expected[c]) < 1e-4);
    }
    task.output = again.data();
    regionspot::grid_attention(task, 3);  // the same bits, however the work is divided
    CHECK(output == again);
    std::fill(again.begin(), again.end(), NAN);
    task.worked_rows = height / 2, task.worked_columns = width / 2;  // the windows that begin there, whole
    regionspot::grid_attention(task, 2);
    for (std::size_t i = 0; i < again.size(); ++i) {
        const std::size_t y = i / of_part / width % height, x = i / of_part % width;
        const bool worked = y / rows * rows < task.worked_rows && x / columns * columns < task.worked_columns;
        CHECK(worked ? again[i] == output[i] : std::isnan(again[i]));
    }
}

}  // namespace

int main() {
    test_grid(1, 1, 1, 1, 1, 1, 16, 1);          // one token
    test_grid(1, 16, 16, 16, 16, 2, 16, 0.25F);  // the whole image, one block of keys
    test_grid(2, 40, 17, 40, 17, 1, 32, 0.2F);   // several blocks, rows of keys that are no whole grains
    test_grid(2, 9, 11, 4, 4, 3, 16, 0.25F);     // windows that reach over two sides
    test_grid(1, 28, 5, 14, 14, 2, 80, 0.1F);    // channels that are no whole panel, as ViT-H has; mostly outside
    test_grid(1, 20, 20, 20, 20, 1, 16, 20);     // scores in the hundreds: one key has nearly all the weight
    return 0;
}
