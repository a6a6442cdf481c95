// The kernel behind attention.cpp, see levels.hpp.

#include "matrix.inl"

// One block of a head's queries.
class QueryBlock {
public:
    QueryBlock(const GridAttention& task, const float* panels, std::size_t head, std::size_t first, std::size_t count,
               AttentionScratch& scratch)
        : task_(task), panels_(panels), place_(head * task.rows * task.columns), first_(first), count_(count),
          scratch_(scratch) {}

    void attend() const {
        const std::size_t all = task_.rows * task_.columns, channels = task_.channels;
        const float* const query = task_.query + (place_ + first_) * channels;
        std::fill_n(scratch_.total.begin(), count_ * channels, 0.0F);
        std::fill_n(scratch_.sums.begin(), count_, 0.0F);
        std::fill_n(scratch_.largest.begin(), count_, std::numeric_limits<float>::lowest());
        for (std::size_t key = 0; key < all; key += kKeys) {
            const std::size_t keys = std::min(kKeys, all - key);
            score(query, key, keys);
            for (std::size_t i = 0; i < count_; ++i) weigh(i, key, keys);
            multiply({scratch_.scores.data(), kKeys}, count_, {task_.value + (place_ + key) * channels, channels}, keys,
                     channels, {scratch_.total.data(), channels}, true);
        }
        float* const output = task_.output + (place_ + first_) * channels;
        for (std::size_t i = 0; i < count_; ++i) {
            const float factor = 1.0F / scratch_.sums[i];
            for (std::size_t c = 0; c < channels; ++c) {
                output[i * channels + c] = scratch_.total[i * channels + c] * factor;
            }
        }
    }

private:
    // Queries times keys.
    void score(const float* query, std::size_t key, std::size_t keys) const {
        const std::size_t all = task_.rows * task_.columns;
        for (std::size_t begin = key; begin < key + keys; begin += kPanel) {
            const std::size_t width = std::min(kPanel, all - begin);
            multiply({query, task_.channels}, count_, {panels_ + begin * task_.channels, width},
                     task_.channels, width, {scratch_.scores.data() + (begin - key), kKeys});
        }
    }

    // A query's scores to weights of a softmax over all keys so far; what was summed before is scaled to it.
    void weigh(std::size_t i, std::size_t key, std::size_t keys) const {
        float* const scores = scratch_.scores.data() + i * kKeys;
        const float largest = std::max(scratch_.largest[i], add_positions(i, key, keys, scores));
        Floats sums{};
        for (std::size_t j = 0; j < keys; j += kLanes) {
            const Floats weight = exponential(load(scores + j) - largest);
            store(scores + j, weight);
            sums += weight;
        }
        if (largest > scratch_.largest[i]) {
            const float factor = exponential(broadcast(scratch_.largest[i] - largest))[0];
            scratch_.largest[i] = largest;
            scratch_.sums[i] *= factor;
            float* const total = scratch_.total.data() + i * task_.channels;
            for (std::size_t c = 0; c < task_.channels; c += kLanes) store(total + c, load(total + c) * factor);
        }
        scratch_.sums[i] += sum_of(sums);
    }

    // Adds those of rows and columns to a query's scores; the largest score.
    float add_positions(std::size_t i, std::size_t key, std::size_t keys, float* scores) const {
        Floats largest = broadcast(std::numeric_limits<float>::lowest());
        const float* const with_rows = task_.with_rows + (place_ + first_ + i) * task_.rows;
        const float* const with_columns = task_.with_columns + (place_ + first_ + i) * task_.columns;
        std::size_t row = key / task_.columns, column = key % task_.columns;
        for (std::size_t j = 0; j < keys; j += kLanes) {
            const Floats score = load(scores + j) + (load(with_columns + column) + with_rows[row]);
            store(scores + j, score);
            largest = larger(largest, score);
            column += kLanes;
            if (column == task_.columns) column = 0, ++row;
        }
        return largest_of(largest);
    }

    const GridAttention& task_;
    const float* panels_;  // of the head's keys
    std::size_t place_, first_, count_;
    AttentionScratch& scratch_;
};

inline void attend(const GridAttention& task, const float* panels, std::size_t head, std::size_t first,
                   std::size_t count, AttentionScratch& scratch) {
    QueryBlock(task, panels, head, first, count, scratch).attend();
}
