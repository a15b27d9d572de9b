// fp32 numbers as operands of tile products, split into bf16 terms.
#pragma once

#include <cstring>

#include "cpu/linear/params.h"
#include "cpu/split_bf16.h"

namespace beit_fast::linear {
namespace {

// 16 lines of a tile in all its terms. A line's words are two vectors, `distance` numbers apart; lines `stride`.
template <int kTerms>
inline void put_tile(uint32_t* to, const float* lines, int64_t stride, int64_t distance) {
    for (int line = 0; line < side; ++line, lines += stride) {
        split_bf16<kTerms>(to + line * side, pair_words, load(lines), load(lines + distance));
    }
}

template <int kTerms>
inline void transpose_tile(uint32_t* tile) {
    for (int term = 0; term < kTerms; ++term, tile += pair_words) {
        Words square[side];
        for (int line = 0; line < side; ++line) square[line] = load(tile + line * side);
        transpose<uint32_t>(square);
        for (int line = 0; line < side; ++line) store(tile + line * side, square[line]);
    }
}

// 16 rows from `row` on of 32 numbers from `depth` on, zeros where the matrix ends.
inline void copy_block(float* block, const Matrix& matrix, int64_t row, int64_t depth) {
    const int64_t rows = std::min(side, matrix.rows - row), count = std::min(step_depth, matrix.depth - depth);
    std::memset(block, 0, side * step_depth * sizeof(float));
    for (int64_t i = 0; i < rows; ++i) {
        const float* source = matrix.data + (row + i) * matrix.row_stride + depth * matrix.depth_stride;
        for (int64_t k = 0; k < count; ++k) block[i * step_depth + k] = source[k * matrix.depth_stride];
    }
}

// One tile of the operand on the left, or of the one on the right, which has the rows of `matrix` for its columns.
// Word i of a row holds numbers i and i + 16 of the 32 that are summed over.
template <int kTerms>
inline void read_tile(uint32_t* to, const Matrix& matrix, int64_t row, int64_t depth, bool right) {
    if (row >= matrix.rows) {
        for (int term = 0; term < kTerms; ++term) std::memset(to + term * pair_words, 0, kTileWords * sizeof(uint32_t));
        return;
    }
    const float* corner = matrix.data + row * matrix.row_stride + depth * matrix.depth_stride;
    const bool whole = row + side <= matrix.rows && depth + step_depth <= matrix.depth;
    const bool across = whole && matrix.row_stride == 1 && matrix.depth_stride != 1;
    if (across) {
        put_tile<kTerms>(to, corner, matrix.depth_stride, side * matrix.depth_stride);
    } else if (whole && matrix.depth_stride == 1) {
        put_tile<kTerms>(to, corner, matrix.row_stride, side);
    } else {
        alignas(64) float block[side * step_depth];
        copy_block(block, matrix, row, depth);
        put_tile<kTerms>(to, block, step_depth, side);
    }
    if (across != right) transpose_tile<kTerms>(to);
}

// 32 rows over `steps`: [steps, terms, 2 tiles].
template <int kTerms>
BEIT_FAST_APART void read_pair(uint32_t* to, const Matrix& matrix, int64_t row, Steps steps, bool right) {
    for (int64_t step = steps.first; step < steps.last; ++step, to += kTerms * pair_words) {
        read_tile<kTerms>(to, matrix, row, step * step_depth, right);
        read_tile<kTerms>(to + kTileWords, matrix, row + side, step * step_depth, right);
    }
}

}  // namespace
}  // namespace beit_fast::linear
