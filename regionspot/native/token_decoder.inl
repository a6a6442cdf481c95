// The kernels behind token_decoder.cpp, see levels.hpp.

#include "matrix.inl"

// y = x weight^T + bias, then ReLU if asked for. Rows of y are `linear.width` long.
inline void apply(const Linear& linear, ConstMatrix x, std::size_t rows, Matrix y, bool relu = false) {
    for (std::size_t first = 0; first < linear.width; first += kTile) {
        const std::size_t width = std::min(kTile, linear.width - first);
        multiply(x, rows, {linear.panels.data() + first * linear.in, width}, linear.in, width,
                 {y.data + first, y.stride});
    }
    for (std::size_t row = 0; row < rows; ++row) {
        for (std::size_t i = 0; i < linear.width; i += kLanes) {
            float* const at = y.data + row * y.stride + i;
            const Floats value = load(at) + load(linear.bias.data() + i);
            store(at, relu ? larger(value, Floats{}) : value);
        }
    }
}

// LayerNorm of each row, in place.
inline void normalise(const Norm& norm, float* x, std::size_t rows, std::size_t channels) {
    for (std::size_t row = 0; row < rows; ++row, x += channels) {
        Floats sum{}, squares{};
        for (std::size_t i = 0; i < channels; i += kLanes) sum += load(x + i);
        const float mean = sum_of(sum) / static_cast<float>(channels);
        for (std::size_t i = 0; i < channels; i += kLanes) {
            const Floats difference = load(x + i) - mean;
            squares += difference * difference;
        }
        const float factor = 1.0F / std::sqrt(sum_of(squares) / static_cast<float>(channels) + norm.epsilon);
        for (std::size_t i = 0; i < channels; i += kLanes) {
            store(x + i, (load(x + i) - mean) * factor * load(norm.weight.data() + i) + load(norm.bias.data() + i));
        }
    }
}

inline void add(const float* a, const float* b, std::size_t count, float* sum) {
    for (std::size_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
}

// One over the square root of a mean square plus epsilon, for each of kTile columns.
inline void inverse_deviations(const float* squares, float count, float epsilon, float* result) {
    for (std::size_t j = 0; j < kTile; ++j) result[j] = 1.0F / std::sqrt(squares[j] / count + epsilon);
}

// What all prompts share, in tiles; values turned so that they can stand on the right of a product.
inline void pack_tile(const Weights& w, const float* projections, const float* statistics, const float* embedding,
                      std::size_t tile, Image& image) {
    const std::size_t first = tile * kTile, width = std::min(kTile, w.cells - first), of_one = w.half * w.cells;
    float* const to = image.tiles.data() + tile * w.layout.size;
    const Layout& at = w.layout;
    const auto rows = [&](std::size_t index, std::size_t offset) {
        copy_tile(projections + index * of_one, w.half, w.cells, tile, to + offset);
    };
    const auto values = [&](std::size_t index, std::size_t offset) {
        const float* const from = projections + index * of_one + first;
        for (std::size_t row = 0; row < w.half; ++row) {
            const std::size_t place = row / w.head * w.value_width + row % w.head;
            for (std::size_t j = 0; j < width; ++j) {
                to[offset + j * w.heads * w.value_width + place] = from[row * w.cells + j];
            }
        }
    };
    rows(0, at.key0), values(1, at.value0), rows(2, at.query0), rows(3, at.out0), rows(4, at.key1), values(5, at.value1);
    rows(6, at.query1), rows(7, at.out0_scaled), rows(8, at.out1), rows(9, at.final_key), values(10, at.final_value);
    copy_tile(statistics, 3, w.cells, tile, to + at.statistics);
    if (embedding == nullptr) return;
    float* const upscaled = image.upscaled.data() + tile * w.channels * kTile;
    multiply({w.upscale_image.data(), w.channels}, w.channels, {embedding + first, w.cells}, w.channels, width,
             {upscaled, kTile});
    for (std::size_t row = 0; row < w.channels; ++row) {
        for (std::size_t j = 0; j < width; ++j) upscaled[row * kTile + j] += w.upscale_image_offset[row];
    }
}

// A group of prompts of one image. Tokens of all of them lie one after another.
class Group {
public:
    Group(const Weights& weights, const Image& image, const Request& request, std::size_t first, std::size_t count,
          Scratch& scratch)
        : w_(weights), image_(image), request_(request), first_(first), count_(count), s_(scratch),
          all_(count * scratch.length) {}

    void decode() {
        const float* const prompts = request_.prompts + first_ * s_.length * w_.channels;
        std::copy_n(prompts, all_ * w_.channels, s_.prompts.begin());

        attend_to_tokens(w_.layers[0], s_.prompts.data(), s_.prompts.data());
        std::copy_n(s_.sum.begin(), all_ * w_.channels, s_.tokens.begin());
        normalise(w_.layers[0].norms[0], s_.tokens.data(), all_, w_.channels);
        project(w_.layers[0].read_query, s_.read_queries);
        over_tiles(&Group::read_layer0);
        finish_read(0);
        project(w_.layers[0].write_key, s_.keys0);
        project_tokens(w_.layers[0].write_value, s_.values0, s_.doubled0);

        add(s_.tokens.data(), s_.prompts.data(), all_ * w_.channels, s_.right.data());
        attend_to_tokens(w_.layers[1], s_.right.data(), s_.tokens.data());
        add(s_.tokens.data(), s_.sum.data(), all_ * w_.channels, s_.tokens.data());
        normalise(w_.layers[1].norms[0], s_.tokens.data(), all_, w_.channels);
        project(w_.layers[1].read_query, s_.read_queries1);
        prepare_layer1();
        over_tiles(&Group::write_layer0_read_layer1);
        finish_read(1);
        project(w_.layers[1].write_key, s_.keys1);
        project_tokens(w_.layers[1].write_value, s_.values1, s_.doubled1);

        ask();
        prepare_final();
        over_tiles(&Group::write_layer1_read_finally);
        answer();
        if (s_.draws) over_tiles(&Group::draw);
    }

private:
    using Prompt = Scratch::Prompt;

    // ---- Tokens ----

    // The attention of a prompt's tokens to each other, into `sum`.
    void attend_to_tokens(const Layer& layer, const float* asking, const float* telling) {
        const std::size_t c = w_.channels, length = s_.length, head = c / w_.heads;
        float* const queries = s_.left.data();
        float* const keys = queries + all_ * c;
        float* const values = keys + all_ * c;
        float* const found = values + all_ * c;
        apply(layer.self_query, {asking, c}, all_, {queries, c});
        apply(layer.self_key, {asking, c}, all_, {keys, c});
        apply(layer.self_value, {telling, c}, all_, {values, c});
        std::fill_n(found, all_ * c, 0.0F);
        for (std::size_t n = 0; n < count_; ++n) {
            for (std::size_t h = 0; h < w_.heads; ++h) {
                for (std::size_t t = 0; t < length; ++t) {
                    attend_from(queries + (n * length + t) * c + h * head, keys + n * length * c + h * head,
                                values + n * length * c + h * head, found + (n * length + t) * c + h * head, head);
                }
            }
        }
        apply(layer.self_out, {found, c}, all_, {s_.sum.data(), c});
    }

    // One head of one query; a score for each token.
    void attend_from(const float* query, const float* keys, const float* values, float* found, std::size_t head) {
        const std::size_t c = w_.channels;
        float largest = kNever, sum = 0;
        for (std::size_t t = 0; t < s_.length; ++t) {
            float score = 0;
            for (std::size_t i = 0; i < head; ++i) score += query[i] * keys[t * c + i];
            s_.column[t] = score;
            largest = std::max(largest, score);
        }
        for (std::size_t t = 0; t < s_.length; ++t) sum += s_.column[t] = std::exp(s_.column[t] - largest);
        for (std::size_t t = 0; t < s_.length; ++t) {
            for (std::size_t i = 0; i < head; ++i) found[i] += s_.column[t] / sum * values[t * c + i];
        }
    }

    // A projection of tokens + prompts to the width of cross attention.
    void project(const Linear& linear, AlignedVector& to) {
        add(s_.tokens.data(), s_.prompts.data(), all_ * w_.channels, s_.sum.data());
        apply(linear, {s_.sum.data(), w_.channels}, all_, {to.data(), w_.half});
    }

    // Of tokens alone; and twice that.
    void project_tokens(const Linear& linear, AlignedVector& to, AlignedVector& doubled) {
        apply(linear, {s_.tokens.data(), w_.channels}, all_, {to.data(), w_.half});
        add(to.data(), to.data(), all_ * w_.half, doubled.data());
    }

    // What tokens read from the image is in `read`: it is added to them, and the MLP follows.
    void take_in(const Layer& layer) {
        const std::size_t c = w_.channels;
        apply(layer.read_out, {s_.read.data(), w_.half}, all_, {s_.sum.data(), c});
        add(s_.tokens.data(), s_.sum.data(), all_ * c, s_.tokens.data());
        normalise(layer.norms[1], s_.tokens.data(), all_, c);
        apply(layer.mlp[0], {s_.tokens.data(), c}, all_, {s_.wide.data(), layer.mlp[0].width}, true);
        apply(layer.mlp[1], {s_.wide.data(), layer.mlp[0].width}, all_, {s_.sum.data(), c});
        add(s_.tokens.data(), s_.sum.data(), all_ * c, s_.tokens.data());
        normalise(layer.norms[2], s_.tokens.data(), all_, c);
    }

    // ---- Products by head: rows (head, token) ----

    // left (length, C / 2) times right (C / 2, width), each head by itself, to (heads * length, width).
    void by_head(const float* left, std::size_t length, ConstMatrix right, std::size_t width, Matrix result,
                 bool add = false) {
        for (std::size_t h = 0; h < w_.heads; ++h) {
            multiply({left + h * w_.head, w_.half}, length, {right.data + h * w_.head * right.stride, right.stride},
                     w_.head, width, {result.data + h * length * result.stride, result.stride}, add);
        }
    }

    // Values (length, C / 2) to (C / 2, padded): column (head, token) holds that token's values of that head, else zeros.
    void spread_values(const float* values) {
        std::fill(s_.spread.begin(), s_.spread.end(), 0.0F);
        for (std::size_t t = 0; t < s_.length; ++t) {
            for (std::size_t i = 0; i < w_.half; ++i) {
                s_.spread[i * s_.padded + i / w_.head * s_.length + t] = values[t * w_.half + i];
            }
        }
    }

    // `left` by head with what `weights` (C / 2, C / 2) makes of the spread values.
    void with_spread(const AlignedVector& weights, const float* left, std::size_t length, AlignedVector& to) {
        multiply({weights.data(), w_.half}, w_.half, {s_.spread.data(), s_.padded}, w_.half, s_.padded,
                 {s_.product.data(), s_.padded});
        by_head(left, length, {s_.product.data(), s_.padded}, s_.padded, {to.data(), s_.padded});
    }

    // A vector (C / 2,) with the spread values.
    void vector_with_spread(const AlignedVector& vector, AlignedVector& to) {
        multiply({vector.data(), w_.half}, 1, {s_.spread.data(), s_.padded}, w_.half, s_.padded, {to.data(), s_.padded});
    }

    // Sets `mixed` (rows, C / 2) to, or adds to it, what `rows` rows of weights (rows, R) of the image's change read of
    // it: the change is `values` (length, C / 2) of each head times `weights` (C / 2, C / 2).
    void mix(const float* read, std::size_t rows, const float* values, const AlignedVector& weights, bool add) {
        std::fill_n(s_.turned.begin(), s_.rows * w_.half, 0.0F);
        for (std::size_t h = 0; h < w_.heads; ++h) {
            for (std::size_t t = 0; t < s_.length; ++t) {
                std::copy_n(values + t * w_.half + h * w_.head, w_.head,
                            s_.turned.begin() + static_cast<std::ptrdiff_t>((h * s_.length + t) * w_.half + h * w_.head));
            }
        }
        multiply({s_.turned.data(), w_.half}, s_.rows, {weights.data(), w_.half}, w_.half, w_.half,
                 {s_.turned_mix.data(), w_.half});
        multiply({read, s_.read_stride}, rows, {s_.turned_mix.data(), w_.half}, s_.rows, w_.half,
                 {s_.mixed.data(), w_.half}, add);
    }

    // ---- Passes over the image ----

    void over_tiles(void (Group::*work)(std::size_t, std::size_t, const float*, const float*, Prompt&)) {
        for (std::size_t n = 0; n < count_; ++n) {
            Prompt& own = s_.prompt[n];
            std::fill(own.largest.begin(), own.largest.end(), kNever);
            for (auto* sums : {&own.sums, &own.extra, &own.total}) std::fill(sums->begin(), sums->end(), 0.0F);
        }
        for (std::size_t tile = 0; tile < w_.tiles; ++tile) {
            const float* const shared = image_.tiles.data() + tile * w_.layout.size;
            const float* const positions = w_.positions.data() + tile * 3 * w_.half * kTile;
            for (std::size_t n = 0; n < count_; ++n) (this->*work)(n, tile, shared, positions, s_.prompt[n]);
        }
    }

    std::size_t width_of(std::size_t tile) const { return std::min(kTile, w_.cells - tile * kTile); }

    // Scores (rows, width) to weights of a softmax over all tiles so far, times `factor` of each column where there is
    // one; what was summed before is scaled to it.
    void weigh(Prompt& own, std::size_t rows, std::size_t width, const float* factor) {
        for (std::size_t row = 0; row < rows; ++row) {
            float* const scores = s_.scores.data() + row * kTile;
            Floats most = broadcast(own.largest[row]);
            for (std::size_t j = 0; j < width; j += kLanes) most = larger(most, load(scores + j));
            const float largest = largest_of(most);
            Floats sums{};
            for (std::size_t j = 0; j < width; j += kLanes) {
                const Floats weight = exponential(load(scores + j) - largest);
                sums += weight;
                store(scores + j, factor == nullptr ? weight : weight * load(factor + j));
            }
            if (largest > own.largest[row]) {
                const float scale = exponential(broadcast(own.largest[row] - largest))[0];
                own.largest[row] = largest;
                own.sums[row] *= scale;
                own.extra[row] *= scale;
                float* const total = own.total.data() + row * s_.read_stride;
                for (std::size_t i = 0; i < s_.read_stride; i += kLanes) store(total + i, load(total + i) * scale);
            }
            own.sums[row] += sum_of(sums);
        }
    }

    // Adds the image's own values (kTile, heads * value_width) by their weights.
    void sum_values(Prompt& own, std::size_t length, std::size_t width, const float* values) {
        const std::size_t stride = w_.heads * w_.value_width;
        for (std::size_t h = 0; h < w_.heads; ++h) {
            multiply({s_.scores.data() + h * length * kTile, kTile}, length, {values + h * w_.value_width, stride},
                     width, w_.value_width, {own.total.data() + h * length * s_.read_stride, s_.read_stride}, true);
        }
    }

    // Adds the probabilities p (R, kTile) by their weights: the change of the image is made of them.
    void sum_change(Prompt& own, std::size_t rows, std::size_t width, const float* turned, std::size_t place) {
        multiply({s_.scores.data(), kTile}, rows, {turned, s_.padded}, width, s_.padded,
                 {own.total.data() + w_.value_width + place * s_.padded, s_.read_stride}, true);
    }

    // p (R, kTile) to (kTile, padded). Columns beyond R are not zero; what is summed of them is not read.
    void turn(const float* p, std::size_t width, AlignedVector& turned) const {
        for (std::size_t row = 0; row < s_.rows; row += kGrain) {
            for (std::size_t j = 0; j < width; j += kGrain) {
                transpose({p + row * kTile + j, kTile}, {turned.data() + j * s_.padded + row, s_.padded});
            }
        }
    }

    void scale_columns(std::size_t rows, std::size_t width, const float* factor) {
        for (std::size_t row = 0; row < rows; ++row) {
            float* const at = s_.scores.data() + row * kTile;
            for (std::size_t j = 0; j < width; j += kLanes) store(at + j, load(at + j) * load(factor + j));
        }
    }

    // Scores (R, width) to a softmax over the tokens of each head, into p.
    void over_tokens(std::size_t width, float* p) const {
        for (std::size_t h = 0; h < w_.heads; ++h) {
            const float* const scores = s_.scores.data() + h * s_.length * kTile;
            float* const to = p + h * s_.length * kTile;
            for (std::size_t j = 0; j < width; j += kLanes) {
                Floats largest = load(scores + j), sum{};
                for (std::size_t t = 1; t < s_.length; ++t) largest = larger(largest, load(scores + t * kTile + j));
                for (std::size_t t = 0; t < s_.length; ++t) {
                    const Floats weight = exponential(load(scores + t * kTile + j) - largest);
                    store(to + t * kTile + j, weight);
                    sum += weight;
                }
                const Floats factor = 1.0F / sum;
                for (std::size_t t = 0; t < s_.length; ++t) {
                    store(to + t * kTile + j, load(to + t * kTile + j) * factor);
                }
            }
        }
    }

    // Sum over R of `along` times p, in each column.
    void dot_columns(std::size_t width, const float* p, float* result) const {
        for (std::size_t j = 0; j < width; j += kLanes) {
            Floats total{};
            for (std::size_t row = 0; row < s_.rows; ++row) {
                total += load(s_.along.data() + row * kTile + j) * load(p + row * kTile + j);
            }
            store(result + j, total);
        }
    }

    const float* of_prompt(const AlignedVector& values, std::size_t n, std::size_t columns, std::size_t length) const {
        return values.data() + n * length * columns;
    }

    const float* half_of(const AlignedVector& values, std::size_t n) const {
        return of_prompt(values, n, w_.half, s_.length);
    }

    Matrix scores() { return {s_.scores.data(), kTile}; }

    void read_layer0(std::size_t n, std::size_t tile, const float* shared, const float*, Prompt& own) {
        const std::size_t width = width_of(tile);
        by_head(half_of(s_.read_queries, n), s_.length, {shared + w_.layout.key0, kTile}, width, scores());
        weigh(own, s_.rows, width, nullptr);
        sum_values(own, s_.length, width, shared + w_.layout.value0);
    }

    void write_layer0_read_layer1(std::size_t n, std::size_t tile, const float* shared, const float* positions,
                                  Prompt& own) {
        const std::size_t width = width_of(tile), rows = s_.rows;
        float* const p0 = own.p0.data() + tile * rows * kTile;
        float* const a0 = own.a0.data() + tile * kTile;
        by_head(half_of(s_.keys0, n), s_.length, {shared + w_.layout.query0, kTile}, width, scores());
        over_tokens(width, p0);
        by_head(half_of(s_.doubled0, n), s_.length, {shared + w_.layout.out0, kTile}, width, {s_.along.data(), kTile});
        multiply({own.gram0.data(), s_.padded}, rows, {p0, kTile}, rows, width, {s_.along.data(), kTile}, true);
        dot_columns(width, p0, a0);
        add(a0, shared + w_.layout.statistics, width, a0);
        inverse_deviations(a0, static_cast<float>(w_.channels), w_.epsilon0, a0);

        const float* const queries = half_of(s_.read_queries1, n);
        by_head(queries, s_.length, {shared + w_.layout.key1, kTile}, width, scores());
        multiply({own.key1.data(), s_.padded}, rows, {p0, kTile}, rows, width, scores(), true);
        scale_columns(rows, width, a0);
        by_head(queries, s_.length, {positions, kTile}, width, scores(), true);
        weigh(own, rows, width, a0);
        sum_values(own, s_.length, width, shared + w_.layout.value1);
        turn(p0, width, s_.change0);
        sum_change(own, rows, width, s_.change0.data(), 0);
    }

    void write_layer1_read_finally(std::size_t n, std::size_t tile, const float* shared, const float* positions,
                                   Prompt& own) {
        const std::size_t width = width_of(tile), rows = s_.rows, kept = s_.draws ? tile : 0;
        const float* const p0 = own.p0.data() + tile * rows * kTile;
        const float* const a0 = own.a0.data() + tile * kTile;
        float* const p1 = own.p1.data() + kept * rows * kTile;
        float* const a1 = own.a1.data() + kept * kTile;
        const float* const keys = half_of(s_.keys1, n);
        by_head(keys, s_.length, {shared + w_.layout.query1, kTile}, width, scores());
        multiply({own.query1.data(), s_.padded}, rows, {p0, kTile}, rows, width, scores(), true);
        scale_columns(rows, width, a0);
        by_head(keys, s_.length, {positions + w_.half * kTile, kTile}, width, scores(), true);
        over_tokens(width, p1);
        deviations1(n, width, shared, own, p0, a0, p1, a1);

        const float* const queries = of_prompt(s_.final_queries, n, w_.half, s_.wanted);
        by_head(queries, s_.wanted, {shared + w_.layout.final_key, kTile}, width, scores());
        multiply({own.final0.data(), s_.padded}, s_.wanted_rows, {p0, kTile}, rows, width, scores(), true);
        scale_columns(s_.wanted_rows, width, a0);
        multiply({own.final1.data(), s_.padded}, s_.wanted_rows, {p1, kTile}, rows, width, scores(), true);
        for (std::size_t row = 0; row < s_.wanted_rows; ++row) {
            float* const at = s_.scores.data() + row * kTile;
            for (std::size_t j = 0; j < width; j += kLanes) {
                store(at + j, (load(at + j) + own.final_drift[row]) * load(a1 + j));
            }
        }
        by_head(queries, s_.wanted, {positions + 2 * w_.half * kTile, kTile}, width, scores(), true);
        weigh(own, s_.wanted_rows, width, a1);
        for (std::size_t row = 0; row < s_.wanted_rows; ++row) {
            Floats sum{};
            for (std::size_t j = 0; j < width; j += kLanes) sum += load(s_.scores.data() + row * kTile + j);
            own.extra[row] += sum_of(sum);
        }
        turn(p1, width, s_.change1);
        sum_change(own, s_.wanted_rows, width, s_.change1.data(), 1);
        scale_columns(s_.wanted_rows, width, a0);
        turn(p0, width, s_.change0);
        sum_change(own, s_.wanted_rows, width, s_.change0.data(), 0);
        sum_values(own, s_.wanted, width, shared + w_.layout.final_value);
    }

    // a1: one over the standard deviation of a0 (Y + P0 W0) + d + P1 U1.
    void deviations1(std::size_t n, std::size_t width, const float* shared, const Prompt& own, const float* p0,
                     const float* a0, const float* p1, float* a1) {
        const std::size_t rows = s_.rows;
        const Matrix along{s_.along.data(), kTile};
        float* const both0 = s_.column.data();
        float* const along_drift = both0 + kTile;
        float* const both1 = along_drift + kTile;
        by_head(half_of(s_.doubled0, n), s_.length, {shared + w_.layout.out0_scaled, kTile}, width, along);
        multiply({own.gram_w.data(), s_.padded}, rows, {p0, kTile}, rows, width, along, true);
        dot_columns(width, p0, both0);
        multiply({own.drift0.data(), s_.padded}, 1, {p0, kTile}, rows, width, {along_drift, kTile});

        by_head(half_of(s_.doubled1, n), s_.length, {shared + w_.layout.out1, kTile}, width, along);
        multiply({own.cross.data(), s_.padded}, rows, {p0, kTile}, rows, width, along, true);
        for (std::size_t row = 0; row < rows; ++row) {
            for (std::size_t j = 0; j < width; j += kLanes) {  // 2 u1 d is the same in all columns
                float* const at = along.data + row * kTile + j;
                store(at, load(at) * load(a0 + j) + 2.0F * own.drift1[row]);
            }
        }
        multiply({own.gram1.data(), s_.padded}, rows, {p1, kTile}, rows, width, along, true);
        dot_columns(width, p1, both1);
        const float* const length = shared + w_.layout.statistics + kTile;
        const float* const image_drift = length + kTile;
        for (std::size_t j = 0; j < width; j += kLanes) {
            const Floats scale = load(a0 + j);
            const Floats drift = load(along_drift + j) + load(image_drift + j);
            store(a1 + j, scale * (scale * (load(both0 + j) + load(length + j)) + 2.0F * drift) + load(both1 + j) +
                              w_.drift_drift);
        }
        inverse_deviations(a1, static_cast<float>(w_.channels), w_.epsilon1, a1);
    }

    // ---- Between the passes ----

    // What the tokens read, (rows, read_stride) of each prompt, to `read`, and on into them.
    void finish_read(std::size_t layer) {
        for (std::size_t n = 0; n < count_; ++n) {
            const Prompt& own = s_.prompt[n];
            if (layer == 1) {
                mix(own.total.data() + w_.value_width, s_.rows, half_of(s_.values0, n), w_.u0_value1, false);
            }
            for (std::size_t t = 0; t < s_.length; ++t) {
                for (std::size_t i = 0; i < w_.half; ++i) {
                    const std::size_t row = i / w_.head * s_.length + t;
                    float value = own.total[row * s_.read_stride + i % w_.head];
                    if (layer == 1) value += s_.mixed[row * w_.half + i];
                    value /= own.sums[row];
                    if (layer == 1) value += w_.value1_bias[i];
                    s_.read[(n * s_.length + t) * w_.half + i] = value;
                }
            }
        }
        take_in(w_.layers[layer]);
    }

    void prepare_layer1() {
        for (std::size_t n = 0; n < count_; ++n) {
            Prompt& own = s_.prompt[n];
            spread_values(half_of(s_.values0, n));
            with_spread(w_.u0_u0, half_of(s_.values0, n), s_.length, own.gram0);
            with_spread(w_.key1_u0, half_of(s_.read_queries1, n), s_.length, own.key1);
        }
    }

    // The tokens that are wanted ask the image once more.
    void ask() {
        const std::size_t c = w_.channels;
        add(s_.tokens.data(), s_.prompts.data(), all_ * c, s_.sum.data());
        for (std::size_t n = 0; n < count_; ++n) {
            for (std::size_t k = 0; k < s_.wanted; ++k) {
                const std::size_t row = k == 0 ? 0 : 1 + request_.wanted[k - 1];
                const std::size_t from = (n * s_.length + row) * c, to = (n * s_.wanted + k) * c;
                std::copy_n(s_.sum.data() + from, c, s_.right.data() + to);
                std::copy_n(s_.tokens.data() + from, c, s_.asked.data() + to);
            }
        }
        apply(w_.final_query, {s_.right.data(), c}, count_ * s_.wanted, {s_.final_queries.data(), w_.half});
    }

    void prepare_final() {
        for (std::size_t n = 0; n < count_; ++n) {
            Prompt& own = s_.prompt[n];
            const float* const queries = of_prompt(s_.final_queries, n, w_.half, s_.wanted);
            spread_values(half_of(s_.values0, n));
            with_spread(w_.query1_u0, half_of(s_.keys1, n), s_.length, own.query1);
            with_spread(w_.w0_w0, half_of(s_.values0, n), s_.length, own.gram_w);
            with_spread(w_.u1_w0, half_of(s_.doubled1, n), s_.length, own.cross);
            with_spread(w_.final_key_w0, queries, s_.wanted, own.final0);
            vector_with_spread(w_.w0_drift, own.drift0);
            if (s_.draws) upscale_with_spread(w_.upscale_w0, own.upscale0);
            spread_values(half_of(s_.values1, n));
            with_spread(w_.u1_u1, half_of(s_.values1, n), s_.length, own.gram1);
            with_spread(w_.final_key_u1, queries, s_.wanted, own.final1);
            vector_with_spread(w_.u1_drift, own.drift1);
            if (s_.draws) upscale_with_spread(w_.upscale_u1, own.upscale1);
            for (std::size_t row = 0; row < s_.wanted_rows; ++row) {
                const std::size_t head = row / s_.wanted, k = row % s_.wanted;
                float sum = 0;
                for (std::size_t i = head * w_.head; i < (head + 1) * w_.head; ++i) {
                    sum += queries[k * w_.half + i] * w_.final_key_drift[i];
                }
                own.final_drift[row] = sum;
            }
        }
    }

    void upscale_with_spread(const AlignedVector& weights, AlignedVector& to) {
        multiply({weights.data(), w_.half}, w_.channels, {s_.spread.data(), s_.padded}, w_.half, s_.padded,
                 {to.data(), s_.padded});
    }

    // The tokens, their predicted IoU, and the filters that draw their masks.
    void answer() {
        const std::size_t c = w_.channels;
        for (std::size_t n = 0; n < count_; ++n) {
            const Prompt& own = s_.prompt[n];
            const float* const total = own.total.data() + w_.value_width;
            mix(total, s_.wanted_rows, half_of(s_.values0, n), w_.w0_final_value, false);
            mix(total + s_.padded, s_.wanted_rows, half_of(s_.values1, n), w_.u1_final_value, true);
            for (std::size_t k = 0; k < s_.wanted; ++k) {
                for (std::size_t i = 0; i < w_.half; ++i) {
                    const std::size_t row = i / w_.head * s_.wanted + k;
                    const float value = own.total[row * s_.read_stride + i % w_.head] + s_.mixed[row * w_.half + i] +
                                        own.extra[row] * w_.drift_final_value[i];
                    s_.read[(n * s_.wanted + k) * w_.half + i] = value / own.sums[row] + w_.final_value_bias[i];
                }
            }
        }
        const std::size_t rows = count_ * s_.wanted;
        apply(w_.final_out, {s_.read.data(), w_.half}, rows, {s_.sum.data(), c});
        add(s_.asked.data(), s_.sum.data(), rows * c, s_.asked.data());
        normalise(w_.final_norm, s_.asked.data(), rows, c);
        for (std::size_t n = 0; n < count_; ++n) {
            const std::size_t prompt = first_ + n, masks = s_.wanted - 1;
            const float* const found = s_.asked.data() + n * s_.wanted * c;
            std::copy_n(found + c, masks * c, request_.tokens + prompt * masks * c);
            predict(w_.iou, found);
            for (std::size_t k = 0; k < masks; ++k) {
                request_.iou_predictions[prompt * masks + k] = s_.sum[request_.wanted[k]];
            }
            for (std::size_t k = 0; s_.draws && k < masks; ++k) {
                const Mlp& network = w_.filters[request_.wanted[k]];
                predict(network, found + (1 + k) * c);
                std::copy_n(s_.sum.data(), network[2].width, s_.prompt[n].filters.data() + k * network[2].width);
            }
        }
    }

    // An MLP's answer to one token, in `sum`.
    void predict(const Mlp& network, const float* token) {
        apply(network[0], {token, network[0].in}, 1, {s_.left.data(), network[0].width}, true);
        apply(network[1], {s_.left.data(), network[1].in}, 1, {s_.right.data(), network[1].width}, true);
        apply(network[2], {s_.right.data(), network[2].in}, 1, {s_.sum.data(), network[2].width});
    }

    // ---- Masks ----

    // How many columns of a tile are drawn.
    std::size_t drawn_width(std::size_t tile) const {
        const std::size_t row = tile * kTile / request_.width, column = tile * kTile % request_.width;
        if (row >= request_.drawn_rows) return 0;
        if (request_.width % kTile != 0) return width_of(tile);  // it has parts of several rows
        return std::min(width_of(tile), rounded_up(std::max(request_.drawn_columns, column) - column));
    }

    // The image after both layers is a1 (a0 (Y + P0 W0) + d + P1 U1), up to the LayerNorm's weights; here what the first
    // upscaling makes of it.
    void draw(std::size_t n, std::size_t tile, const float*, const float*, Prompt& own) {
        const std::size_t width = drawn_width(tile), rows = s_.rows, c = w_.channels, part = c / kSubcells;
        if (width == 0) return;
        const float* const p0 = own.p0.data() + tile * rows * kTile;
        const float* const p1 = own.p1.data() + tile * rows * kTile;
        const float* const a0 = own.a0.data() + tile * kTile;
        const float* const a1 = own.a1.data() + tile * kTile;
        const float* const image = image_.upscaled.data() + tile * c * kTile;
        const Matrix upscaled{s_.image.data(), kTile};
        multiply({own.upscale0.data(), s_.padded}, c, {p0, kTile}, rows, width, upscaled);
        for (std::size_t row = 0; row < c; ++row) {
            for (std::size_t j = 0; j < width; j += kLanes) {
                float* const at = upscaled.data + row * kTile + j;
                store(at, (load(at) + load(image + row * kTile + j)) * load(a0 + j) + w_.upscale_drift[row]);
            }
        }
        multiply({own.upscale1.data(), s_.padded}, c, {p1, kTile}, rows, width, upscaled, true);
        for (std::size_t subcell = 0; subcell < kSubcells; ++subcell) {
            normalise_columns(subcell * part, part, width, a1);
            multiply({w_.upscale_second.data(), part}, w_.half, {upscaled.data + subcell * part * kTile, kTile}, part,
                     width, {s_.subcell.data(), kTile});
            for (std::size_t row = 0; row < w_.half; ++row) {
                for (std::size_t j = 0; j < width; j += kLanes) {
                    float* const at = s_.subcell.data() + row * kTile + j;
                    store(at, gelu(load(at) + w_.upscale_second_bias[row]));
                }
            }
            write_pixels(n, tile, subcell, width, own);
        }
    }

    // Rows of a subcell, times a1 and with their bias, through LayerNorm over the rows and GELU, in place.
    void normalise_columns(std::size_t first, std::size_t count, std::size_t width, const float* a1) {
        float* const rows = s_.image.data() + first * kTile;
        const auto size = static_cast<float>(count);
        for (std::size_t j = 0; j < width; j += kLanes) {
            const Floats scale = load(a1 + j);
            Floats sum{}, squares{};
            for (std::size_t row = 0; row < count; ++row) {
                const Floats value = load(rows + row * kTile + j) * scale + w_.upscale_bias[first + row];
                store(rows + row * kTile + j, value);
                sum += value;
            }
            const Floats mean = sum / size;
            for (std::size_t row = 0; row < count; ++row) {
                const Floats difference = load(rows + row * kTile + j) - mean;
                squares += difference * difference;
            }
            Floats factor = squares / size + w_.upscale_norm.epsilon;
            for (std::size_t lane = 0; lane < kLanes; ++lane) factor[lane] = 1.0F / std::sqrt(factor[lane]);
            for (std::size_t row = 0; row < count; ++row) {
                float* const at = rows + row * kTile + j;
                store(at, gelu((load(at) - mean) * factor * w_.upscale_norm.weight[row] + w_.upscale_norm.bias[row]));
            }
        }
    }

    // The four pixels of a subcell, for each mask.
    void write_pixels(std::size_t n, std::size_t tile, std::size_t subcell, std::size_t width, const Prompt& own) {
        const std::size_t masks = s_.wanted - 1, filter = w_.filters[0][2].width, depth = w_.half / kSubcells;
        const std::size_t pixels = 16 * w_.cells, across = 4 * request_.width;
        float* const to = request_.masks + (first_ + n) * masks * pixels;
        for (std::size_t inner = 0; inner < kSubcells; ++inner) {
            multiply({own.filters.data(), filter}, masks, {s_.subcell.data() + inner * depth * kTile, kTile}, depth, width,
                     {s_.pixels.data(), kTile});
            const std::size_t down = 2 * (subcell / 2) + inner / 2, right = 2 * (subcell % 2) + inner % 2;
            std::size_t column = tile * kTile % request_.width;
            std::size_t place = (4 * (tile * kTile / request_.width) + down) * across + 4 * column + right;
            for (std::size_t j = 0; j < width; ++j) {
                for (std::size_t k = 0; k < masks; ++k) to[k * pixels + place] = s_.pixels[k * kTile + j];
                place += 4;
                if (++column == request_.width) column = 0, place += 3 * across;
            }
        }
    }

    const Weights& w_;
    const Image& image_;
    const Request& request_;
    std::size_t first_, count_;
    Scratch& s_;
    std::size_t all_;  // tokens of the group
};

inline void decode_group(const Weights& weights, const Image& image, const Request& request, std::size_t first,
                         std::size_t count, Scratch& scratch) {
    Group(weights, image, request, first, count, scratch).decode();
}
