// Numbers as operands of tile products, split into bf16 terms. A tile has all its terms, one after another; A has
// 16 rows and B 16 columns of 32 numbers, which a product sums over. A word holds two of them: word i of a row of fp32
// has numbers i and i + 16 of 32.
#pragma once

#include <algorithm>

#include "cpu/amx.h"
#include "cpu/attention/tokens.h"
#include "cpu/split_bf16.h"

namespace beit_fast {
namespace {

template <int kTerms>
constexpr int64_t kTileSize = kTerms * kTileWords;  // words of a tile in all its terms

// fp32 is the exact sum of three bf16 terms, fp16 of two. Products of terms below the rounding of the result are left
// out: this is the last term of B that term `a` of A is multiplied by.
template <int kTerms>
constexpr int last_partner(int a) {
    return std::min(kTerms - 1, 2 - a);
}

// Loads a square of words, rows `stride` apart, and transposes it.
template <class T>
inline void load_transposed(Vector<T>* square, const T* rows, int64_t stride) {
    for (int row = 0; row < kTileRows; ++row) square[row] = load(rows + row * stride);
    transpose<T>(square);
}

inline void transpose_tiles(uint32_t* tiles, int64_t count) {
    for (uint32_t* tile = tiles; tile < tiles + count * kTileWords; tile += kTileWords) {
        Words square[kTileRows];
        load_transposed(square, tile, 16);
        for (int row = 0; row < kTileRows; ++row) store(tile + row * 16, square[row]);
    }
}

// Two squares, the lower and the upper halves of words, as one tile in all its terms, transposed.
template <int kTerms>
inline void put_transposed(uint32_t* tile, const float* low_rows, const float* high_rows, int64_t stride) {
    Vector<float> low[kTileRows], high[kTileRows];
    load_transposed(low, low_rows, stride);
    load_transposed(high, high_rows, stride);
    for (int row = 0; row < kTileRows; ++row) split_bf16<kTerms>(tile + row * 16, kTileWords, low[row], high[row]);
}

// 16 rows of `length` numbers as A: [length / 32].
template <int kTerms>
BEIT_FAST_FLAT inline void pack_left(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    for (int row = 0; row < kTileRows; ++row) {
        for (int64_t i = 0; i < length; i += 32) {
            uint32_t* tile = to + i / 32 * kTileSize<kTerms> + row * 16;
            split_bf16<kTerms>(tile, kTileWords, load(rows + row * stride + i), load(rows + row * stride + i + 16));
        }
    }
}

// 16 rows of `length` numbers, columns of B, summed over `length`: [length / 32].
template <int kTerms>
BEIT_FAST_FLAT inline void pack_right_transposed(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    if constexpr (kTerms == 1) {
        pack_left<kTerms>(to, rows, stride, length);
        transpose_tiles(to, length / 32);
    } else {
        for (int64_t i = 0; i < length; i += 32) {
            put_transposed<kTerms>(to + i / 32 * kTileSize<kTerms>, rows + i, rows + i + 16, stride);
        }
    }
}

// 32 rows of `length` numbers, summed over the rows, as B: [length / 16].
template <int kTerms>
BEIT_FAST_FLAT inline void pack_right(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    for (int pair = 0; pair < kTileRows; ++pair) {
        const float* row = rows + pair * stride;
        for (int64_t i = 0; i < length; i += 16) {
            uint32_t* tile = to + i / 16 * kTileSize<kTerms> + pair * 16;
            split_bf16<kTerms>(tile, kTileWords, load(row + i), load(row + kTileRows * stride + i));
        }
    }
}

// 32 rows of `length` numbers, summed over the rows, columns of A: [length / 16].
template <int kTerms>
BEIT_FAST_FLAT inline void pack_left_transposed(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    if constexpr (kTerms == 1) {
        pack_right<kTerms>(to, rows, stride, length);
        transpose_tiles(to, length / 16);
    } else {
        for (int64_t i = 0; i < length; i += 16) {
            put_transposed<kTerms>(to + i / 16 * kTileSize<kTerms>, rows + i, rows + i + kTileRows * stride, stride);
        }
    }
}

// Four sums of products: tiles 0 and 1 for two tiles of A by one of B, 2 and 3 by another.
struct FourSums {
    static void zero() {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }

    // 32 rows of 32 sums, `stride` numbers apart.
    static void load(const float* sums, int64_t stride) {
        tile_load<0>(sums, stride / 16);
        tile_load<1>(sums + 16 * stride, stride / 16);
        tile_load<2>(sums + 16, stride / 16);
        tile_load<3>(sums + 16 * stride + 16, stride / 16);
    }

    static void store(float* sums, int64_t stride) {
        tile_store<0>(sums, stride / 16);
        tile_store<1>(sums + 16 * stride, stride / 16);
        tile_store<2>(sums + 16, stride / 16);
        tile_store<3>(sums + 16 * stride + 16, stride / 16);
    }

    // Tiles of A `a_stride` words apart, of B `b_stride`; with all products of their terms.
    template <int kTerms>
    static void add(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride) {
#pragma GCC unroll 3
        for (int term = kTerms - 1; term >= 0; --term) {  // small terms first, for accuracy
            tile_load<4>(a + term * kTileWords);
            tile_load<5>(a + a_stride + term * kTileWords);
#pragma GCC unroll 3
            for (int other = last_partner<kTerms>(term); other >= 0; --other) {
                tile_load<6>(b + other * kTileWords);
                tile_multiply<0, 4, 6>();
                tile_multiply<1, 5, 6>();
                tile_load<7>(b + b_stride + other * kTileWords);
                tile_multiply<2, 4, 7>();
                tile_multiply<3, 5, 7>();
            }
        }
    }
};

}  // namespace
}  // namespace beit_fast
