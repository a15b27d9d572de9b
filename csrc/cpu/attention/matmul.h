// Small matrix products on vectors: C[M, columns] (+)= A[M, depth] * B[depth, columns], A read number by number.
#pragma once

#include "cpu/simd.h"

namespace beit_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockVectors = 4, kBlockRows = 6;  // 24 sums, 4 vectors of B and one of A in 32 registers
#else
constexpr int kBlockVectors = 2, kBlockRows = 6;  // 12 sums, 2 vectors of B and one of A in 16 registers
#endif

// Products of single numbers.
template <class T>
struct PlainProduct {
    using Element = T;
    using Sum = T;
    static Vector<T> add(Vector<T> sum, T a, Vector<T> b) { return splat(a) * b + sum; }
};

#if defined(__AVX512BF16__)
// Products of pairs of bf16, two to a word.
struct PairProduct {
    using Element = uint32_t;
    using Sum = float;
    static Vector<float> add(Vector<float> sum, uint32_t a, Words b) {
        return (Vector<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)(Words{} + a), (__m512bh)b);
    }
};
#endif

// The layout of A: element (m, k) is `data[m * row_stride + k * step_stride]`.
template <class Element>
struct LeftOperand {
    const Element* data;
    int64_t row_stride, step_stride;
};

template <class Product, int kRows, int kVectors>
BEIT_FAST_FLAT inline void multiply_block(LeftOperand<typename Product::Element> a, const typename Product::Element* b,
                           int64_t b_stride, int64_t depth, typename Product::Sum* c, int64_t c_stride, bool add) {
    using Sum = typename Product::Sum;
    Vector<Sum> sums[kRows][kVectors];
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
            sums[row][v] = add ? load(c + row * c_stride + v * kLanes<Sum>) : Vector<Sum>{};
        }
    }
    for (int64_t k = 0; k < depth; ++k) {
        Vector<typename Product::Element> right[kVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_stride + v * kLanes<Sum>);
#pragma GCC unroll 6
        for (int row = 0; row < kRows; ++row) {
            const auto left = a.data[row * a.row_stride + k * a.step_stride];
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) sums[row][v] = Product::add(sums[row][v], left, right[v]);
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) store(c + row * c_stride + v * kLanes<Sum>, sums[row][v]);
    }
}

template <class Product, int kRows, int kVectors>
inline void multiply_rest(int64_t rows, LeftOperand<typename Product::Element> a, const typename Product::Element* b,
                          int64_t b_stride, int64_t depth, typename Product::Sum* c, int64_t c_stride, bool add) {
    if constexpr (kRows > 0) {
        if (rows == kRows) return multiply_block<Product, kRows, kVectors>(a, b, b_stride, depth, c, c_stride, add);
        multiply_rest<Product, kRows - 1, kVectors>(rows, a, b, b_stride, depth, c, c_stride, add);
    }
}

// `kVectors` vectors of columns, any number of rows; `add` accumulates into C.
template <class Product, int kVectors>
inline void multiply(int64_t rows, LeftOperand<typename Product::Element> a, const typename Product::Element* b,
                     int64_t b_stride, int64_t depth, typename Product::Sum* c, int64_t c_stride, bool add) {
    int64_t row = 0;
    for (; row + kBlockRows <= rows; row += kBlockRows) {
        multiply_block<Product, kBlockRows, kVectors>(a, b, b_stride, depth, c, c_stride, add);
        a.data += kBlockRows * a.row_stride;
        c += kBlockRows * c_stride;
    }
    multiply_rest<Product, kBlockRows - 1, kVectors>(rows - row, a, b, b_stride, depth, c, c_stride, add);
}

}  // namespace
}  // namespace beit_fast
