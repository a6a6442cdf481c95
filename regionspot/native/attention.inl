// The kernels behind attention.cpp, see levels.hpp.

#include "matrix.inl"

// Where a window of a head lies.
struct Place {
    std::size_t image, top, left, head;

    Place(const GridAttention& task, const GridSizes& sizes, std::size_t item)
        : image(item / (sizes.down * sizes.across * task.heads)), top(item / (sizes.across * task.heads) % sizes.down * task.rows),
          left(item / task.heads % sizes.across * task.columns), head(item % task.heads) {}

    // Whether a place of the window lies in the image.
    bool inside(const GridAttention& task, std::size_t row, std::size_t column) const {
        return top + row < task.height && left + column < task.width;
    }

    bool left_out(const GridAttention& task) const { return top >= task.worked_rows || left >= task.worked_columns; }

    std::size_t token(const GridAttention& task, std::size_t row, std::size_t column) const {
        return (image * task.height + top + row) * task.width + left + column;
    }
};

// A grain of a row's keys, from `column` on: queries and values to their places, keys turned.
inline void pack_grain(const GridAttention& task, const GridSizes& sizes, const Place& place, std::size_t row,
                       std::size_t column, const PackedWindow& packed) {
    const std::size_t d = task.channels, of_part = task.heads * d;
    const std::size_t first = row * sizes.padded_columns + column, panel = first / kPanel * kPanel;
    const std::size_t width = std::min(kPanel, sizes.keys - panel);
    const float* from[kGrain];
    for (std::size_t i = 0; i < kGrain; ++i) {
        from[i] = nullptr;  // where there is no key
        if (column + i >= task.columns) continue;
        from[i] = place.head * d + (place.inside(task, row, column + i)
                                        ? task.projected + place.token(task, row, column + i) * 3 * of_part
                                        : task.padding);
        std::memcpy(packed.queries + (row * task.columns + column + i) * d, from[i], d * sizeof(float));
    }
    for (std::size_t i = 0; i < kGrain; ++i) {
        float* const value = packed.values + (first + i) * d;
        if (from[i] == nullptr) std::fill_n(value, d, 0.0F);
        else std::memcpy(value, from[i] + 2 * of_part, d * sizeof(float));
    }
    for (std::size_t c = 0; c < d; c += kGrain) {
        float block[kGrain * kGrain];
        for (std::size_t i = 0; i < kGrain; ++i) {
            if (from[i] == nullptr) std::fill_n(block + i * kGrain, kGrain, 0.0F);
            else std::memcpy(block + i * kGrain, from[i] + of_part + c, kGrain * sizeof(float));
        }
        transpose({block, kGrain}, {packed.keys + panel * d + c * width + (first - panel), width});
    }
}

inline void pack_window(const GridAttention& task, const GridSizes& sizes, const PositionTables& tables, std::size_t item,
                        const PackedWindow& packed) {
    const std::size_t d = task.channels;
    const Place place(task, sizes, item);
    if (place.left_out(task)) return;
    for (std::size_t row = 0; row < task.rows; ++row) {
        for (std::size_t column = 0; column < sizes.padded_columns; column += kGrain) {
            pack_grain(task, sizes, place, row, column, packed);
        }
    }
    for (std::size_t row = 0; row < task.rows; ++row) {
        multiply({packed.queries + row * task.columns * d, d}, task.columns,
                 {tables.rows.data() + row * d * sizes.padded_rows, sizes.padded_rows}, d, sizes.padded_rows,
                 {packed.with_rows + row * task.columns * sizes.padded_rows, sizes.padded_rows});
    }
    for (std::size_t column = 0; column < task.columns; ++column) {
        multiply({packed.queries + column * d, task.columns * d}, task.rows,
                 {tables.columns.data() + column * d * sizes.padded_columns, sizes.padded_columns}, d,
                 sizes.padded_columns,
                 {packed.with_columns + column * sizes.padded_columns, task.columns * sizes.padded_columns});
    }
    for (std::size_t query = 0; query < sizes.queries; ++query) {
        float* const with_columns = packed.with_columns + query * sizes.padded_columns;
        std::fill(with_columns + task.columns, with_columns + sizes.padded_columns, kNever);
        float* const own = packed.queries + query * d;
        for (std::size_t c = 0; c < d; ++c) own[c] *= task.scale * kLogOfE;
    }
}

// A block of a window's queries.
class QueryBlock {
public:
    QueryBlock(const GridAttention& task, const GridSizes& sizes, std::size_t item, std::size_t block,
               const PackedWindow& packed, AttentionScratch& scratch)
        : task_(task), sizes_(sizes), place_(task, sizes, item), packed_(packed), scratch_(scratch),
          first_row_(block * sizes.block_rows), end_row_(std::min(first_row_ + sizes.block_rows, task.rows)),
          first_(first_row_ * task.columns), count_((end_row_ - first_row_) * task.columns) {}

    void attend() const {
        if (place_.left_out(task_) || place_.top + first_row_ >= task_.height) return;  // the latter: outside the image
        const std::size_t d = task_.channels;
        std::fill_n(scratch_.total.begin(), count_ * d, 0.0F);
        std::fill_n(scratch_.sums.begin(), count_, 0.0F);
        std::fill_n(scratch_.largest.begin(), count_, kNever);
        for (std::size_t key = 0; key < sizes_.keys; key += kKeys) {
            const std::size_t keys = std::min(kKeys, sizes_.keys - key);
            score(key, keys);
            std::size_t i = 0;
            for (; i + 1 < count_; i += 2) weigh<2>(i, key, keys);
            if (i < count_) weigh<1>(i, key, keys);
            const Matrix total{scratch_.total.data(), d};
            const float* const values = packed_.values + key * d;
            accumulate(total, {scratch_.scores.data(), kKeys}, count_, {values, d}, keys, d, total, values + keys * d);
        }
        write();
    }

private:
    // Queries times keys.
    void score(std::size_t key, std::size_t keys) const {
        const std::size_t d = task_.channels;
        for (std::size_t begin = key; begin < key + keys; begin += kPanel) {
            const std::size_t width = std::min(kPanel, sizes_.keys - begin);
            const float* const panel = packed_.keys + begin * d;
            accumulate({nullptr, 0}, {packed_.queries + first_ * d, d}, count_, {panel, width}, d, width,
                       {scratch_.scores.data() + (begin - key), kKeys}, panel + width * d);
        }
    }

    // Scores of queries, here logarithms to base 2, to weights of a softmax over all keys so far; what was summed before is
    // scaled to it. Of several queries at once, as one waits for its own largest score.
    template <int Count>
    void weigh(std::size_t first, std::size_t key, std::size_t keys) const {
        float* scores[Count];
        Floats most[Count], largest[Count], sums[Count];
        for (int n = 0; n < Count; ++n) {
            scores[n] = scratch_.scores.data() + (first + n) * kKeys;
            most[n] = broadcast(scratch_.largest[first + n]);
            sums[n] = Floats{};
        }
        const float* const with_rows = packed_.with_rows + (first_ + first) * sizes_.padded_rows;
        const float* const with_columns = packed_.with_columns + (first_ + first) * sizes_.padded_columns;
        std::size_t row = key / sizes_.padded_columns, column = key % sizes_.padded_columns;
        for (std::size_t j = 0; j < keys; j += kLanes) {
#pragma GCC unroll 2
            for (int n = 0; n < Count; ++n) {
                const Floats score = load(scores[n] + j) + (load(with_columns + n * sizes_.padded_columns + column) +
                                                            with_rows[n * sizes_.padded_rows + row]);
                store(scores[n] + j, score);
                most[n] = larger(most[n], score);
            }
            column += kLanes;
            if (column == sizes_.padded_columns) column = 0, ++row;
        }
        for (int n = 0; n < Count; ++n) largest[n] = broadcast(largest_of(most[n]));
        for (std::size_t j = 0; j < keys; j += kLanes) {
#pragma GCC unroll 2
            for (int n = 0; n < Count; ++n) {
                const Floats weight = power_of_two(load(scores[n] + j) - largest[n]);
                store(scores[n] + j, weight);
                sums[n] += weight;
            }
        }
        for (int n = 0; n < Count; ++n) rescale(first + n, largest[n][0], sum_of(sums[n]));
    }

    // Takes a block's largest score and sum of weights into those of a query.
    void rescale(std::size_t i, float largest, float sum) const {
        if (largest > scratch_.largest[i]) {
            const float factor = power_of_two(broadcast(scratch_.largest[i] - largest))[0];
            scratch_.largest[i] = largest;
            scratch_.sums[i] *= factor;
            float* const total = scratch_.total.data() + i * task_.channels;
            for (std::size_t c = 0; c < task_.channels; c += kLanes) store(total + c, load(total + c) * factor);
        }
        scratch_.sums[i] += sum;
    }

    void write() const {
        const std::size_t d = task_.channels;
        for (std::size_t i = 0; i < count_; ++i) {
            const std::size_t row = first_row_ + i / task_.columns, column = i % task_.columns;
            if (!place_.inside(task_, row, column)) continue;
            const float factor = 1.0F / scratch_.sums[i];
            const float* const total = scratch_.total.data() + i * d;
            float* const to = task_.output + (place_.token(task_, row, column) * task_.heads + place_.head) * d;
            for (std::size_t c = 0; c < d; c += kLanes) store(to + c, load(total + c) * factor);
        }
    }

    const GridAttention& task_;
    const GridSizes& sizes_;
    Place place_;
    const PackedWindow& packed_;
    AttentionScratch& scratch_;
    std::size_t first_row_, end_row_, first_, count_;
};

inline void attend_block(const GridAttention& task, const GridSizes& sizes, std::size_t item, std::size_t block,
                         const PackedWindow& packed, AttentionScratch& scratch) {
    QueryBlock(task, sizes, item, block, packed, scratch).attend();
}
