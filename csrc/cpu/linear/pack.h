// Numbers as operands of tile products: fp32 as the sum of bf16 parts, each the nearest to what the ones before it
// leave.
#pragma once

#include <cstring>

#include "cpu/simd.h"
#include "cpu/linear/params.h"

namespace beit_fast::linear {
namespace {

// Two vectors as a line of words in each part, `low` in the lower halves; lines are `stride` words apart.
template <int kParts>
inline void put_parts(uint32_t* to, int64_t stride, Vector<float> low, Vector<float> high) {
    alignas(64) static constexpr uint16_t kInterleaved[] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i order = _mm512_load_si512(kInterleaved);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
        const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
        const auto words = (Words)_mm512_permutexvar_epi16(order, (__m512i)rounded);
        store(to + part * stride, words);
        low -= reinterpret<Vector<float>>(words << 16);
        high -= reinterpret<Vector<float>>(words & 0xffff0000u);
    }
}

// 16 lines of a tile in all its parts. A line's words are two vectors, `distance` numbers apart; lines `stride`.
template <int kParts>
inline void put_tile(uint32_t* to, const float* lines, int64_t stride, int64_t distance) {
    for (int line = 0; line < side; ++line, lines += stride) {
        put_parts<kParts>(to + line * side, pair_words, load(lines), load(lines + distance));
    }
}

template <int kParts>
inline void transpose_tile(uint32_t* tile) {
    for (int part = 0; part < kParts; ++part, tile += pair_words) {
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
template <int kParts>
inline void read_tile(uint32_t* to, const Matrix& matrix, int64_t row, int64_t depth, bool right) {
    if (row >= matrix.rows) {
        for (int part = 0; part < kParts; ++part) std::memset(to + part * pair_words, 0, kTileWords * sizeof(uint32_t));
        return;
    }
    const float* corner = matrix.data + row * matrix.row_stride + depth * matrix.depth_stride;
    const bool whole = row + side <= matrix.rows && depth + step_depth <= matrix.depth;
    const bool across = whole && matrix.row_stride == 1 && matrix.depth_stride != 1;
    if (across) {
        put_tile<kParts>(to, corner, matrix.depth_stride, side * matrix.depth_stride);
    } else if (whole && matrix.depth_stride == 1) {
        put_tile<kParts>(to, corner, matrix.row_stride, side);
    } else {
        alignas(64) float block[side * step_depth];
        copy_block(block, matrix, row, depth);
        put_tile<kParts>(to, block, step_depth, side);
    }
    if (across != right) transpose_tile<kParts>(to);
}

// 32 rows over `steps`: [steps, parts, 2 tiles].
template <int kParts>
BEIT_FAST_APART void read_pair(uint32_t* to, const Matrix& matrix, int64_t row, Steps steps, bool right) {
    for (int64_t step = steps.first; step < steps.last; ++step, to += kParts * pair_words) {
        read_tile<kParts>(to, matrix, row, step * step_depth, right);
        read_tile<kParts>(to + kTileWords, matrix, row + side, step * step_depth, right);
    }
}

}  // namespace
}  // namespace beit_fast::linear
