// Tokens of one head as contiguous rows.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cpu/attention/packed_bias.h"

namespace beit_fast {
namespace {

// Maps inner tokens to tokens: patches first and CLS last, or in the listed order.
struct TokenOrder {
    int64_t tokens;
    const int64_t* listed = nullptr;  // [N]

    int64_t operator()(int64_t inner) const {
        return listed != nullptr && inner < tokens ? listed[inner] : token_of(inner, tokens);
    }
};

// Reads inner tokens `first` to `first + count` as rows of T with `length` numbers each. Numbers past D and tokens past
// the last one are zero.
template <class T>
BEIT_FAST_FLAT inline void read_tokens(T* rows, int64_t length, const AttentionParams& params,
                                       const TokensView& view, int64_t batch, int64_t head, TokenOrder order,
                                       int64_t first, int64_t count) {
    // A head has a few cache lines of each token, and the hardware does not prefetch such a pattern.
    constexpr int64_t kAhead = 12;
    const int64_t real = std::max<int64_t>(0, std::min(count, params.tokens - first));
    const int64_t bytes = params.head_dim * bytes_of(params.type);
    const auto row_of = [&](int64_t i) {
        return static_cast<const char*>(token_row(view, params.type, batch, order(first + i), head));
    };
    for (int64_t i = 0; i < real; ++i) {
        const char* ahead = row_of(i + kAhead);
        for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(ahead + byte);
        T* row = rows + i * length;
        read_row(row, row_of(i), params.type, params.head_dim, view.dim_stride);
        std::fill(row + params.head_dim, row + length, T(0));
    }
    std::fill(rows + real * length, rows + count * length, T(0));
}

// Prefetches q, k and v of tokens `first` to `last` of one head into L2.
inline void prefetch_tokens(const AttentionParams& params, int64_t batch, int64_t head, int64_t first, int64_t last) {
    const int64_t bytes = params.head_dim * bytes_of(params.type);
    for (const TokensView* view : {&params.k, &params.v, &params.q}) {
        for (int64_t token = first; token < last; ++token) {
            const auto* row = static_cast<const char*>(token_row(*view, params.type, batch, token, head));
            for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(row + byte, 0, 2);
        }
    }
}

// Transposes kLanes rows `[kLanes, length]` into `[length, stride]`.
template <class T>
BEIT_FAST_FLAT inline void transpose_rows(T* to, int64_t stride, const T* rows, int64_t length) {
    for (int64_t column = 0; column < length; column += kLanes<T>) {
        Vector<T> square[kLanes<T>];
        for (int row = 0; row < kLanes<T>; ++row) square[row] = load(rows + row * length + column);
        transpose<T>(square);
        for (int row = 0; row < kLanes<T>; ++row) store(to + (column + row) * stride, square[row]);
    }
}

}  // namespace
}  // namespace beit_fast
