#pragma once

#include <algorithm>
#include <cstdint>

namespace beit_fast::linear {

constexpr int64_t side = 16;                      // rows of a tile
constexpr int64_t pair_side = 2 * side;           // rows, or columns, that one block of sums has
constexpr int64_t step_depth = 32;                // numbers that one product of tiles sums over
constexpr int64_t pair_words = pair_side * side;  // of two tiles side by side
constexpr int64_t tile_bytes = 1024;
constexpr int64_t sums_count = pair_side * pair_side;

inline int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// [rows, depth] in fp32, products summing over the depth. Strides count numbers.
struct Matrix {
    const float* data;
    int64_t rows, depth, row_stride, depth_stride;

    int64_t pairs() const { return ceil_divide(rows, pair_side); }
    int64_t steps() const { return ceil_divide(depth, step_depth); }
};

// Steps `first` to `last` of the depth.
struct Steps {
    int64_t first, last;

    int64_t count() const { return last - first; }
};

// The depth in chunks, so that the rows of a block over one chunk fit in a core's L2 cache. Sums continue from chunk to
// chunk without rounding.
struct Chunks {
    static constexpr int64_t most_steps = 28;
    int64_t steps, count;

    explicit Chunks(const Matrix& left)
        : steps(left.steps()), count(std::max<int64_t>(1, ceil_divide(steps, most_steps))) {}

    int64_t largest() const { return ceil_divide(steps, count); }
    Steps operator[](int64_t chunk) const { return {chunk * steps / count, (chunk + 1) * steps / count}; }
};

struct Params {
    Matrix left;            // [M, K]
    const uint32_t* right;  // packed: [ceil(N / 32), ceil(K / 32), terms, 2 tiles]
    int64_t columns;        // N
    int64_t terms;          // 2 or 3
    const float* bias;      // [N], or null
    const float* residual;  // [M, N], or null
    int64_t residual_stride;
    bool gelu;
    float* output;  // [M, N]

    int64_t panels() const { return ceil_divide(columns, pair_side); }
};

// Rows of the left matrix that are multiplied together, `first` a multiple of 16, and their terms.
struct Block {
    int64_t first, last;
    uint32_t* words;  // one chunk after another, in each [pairs, steps, terms, 2 tiles]

    int64_t pairs() const { return ceil_divide(last - first, pair_side); }
    // Those from step `first_step` on, where a chunk begins, if the whole depth is held.
    uint32_t* words_from(const Params& params, int64_t first_step) const {
        return words + pairs() * first_step * params.terms * pair_words;
    }
};

}  // namespace beit_fast::linear
