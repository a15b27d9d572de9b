// Rows of fp32, `stride` numbers apart, as operands of tile products, split into bf16 parts. A tile comes in all its
// parts, one after another; A has 16 rows of 32 numbers that are summed over, B has 16 pairs of them for 16 columns.
#pragma once

#include "attention/amx.h"
#include "attention/tokens.h"

namespace beit_fast {
namespace {

template <int kParts>
constexpr int64_t kTileSize = kParts * kTileWords;  // words of a tile in all its parts

template <int kParts>
constexpr int kProducts = kParts == 3 ? 6 : kParts * kParts;

// fp32 is the exact sum of three bf16 parts, fp16 of two. Products of parts below the rounding of the result are left
// out. These are the parts of A and B that each product multiplies: small ones first, which loses least.
constexpr int kPartOfA[3][6] = {{0}, {1, 0, 1, 0}, {2, 1, 0, 1, 0, 0}};
constexpr int kPartOfB[3][6] = {{0}, {1, 1, 0, 0}, {0, 1, 2, 0, 1, 0}};

// Two vectors as one row of 32 bf16 in each part, `stride` words apart; one part alone is rounded to nearest.
template <int kParts>
inline void put_row(uint32_t* to, int64_t stride, Vector<float> low, Vector<float> high) {
    const __m512i odd = _mm512_set_epi32(
        0x3f003d, 0x3b0039, 0x370035, 0x330031, 0x2f002d, 0x2b0029, 0x270025, 0x230021, 0x1f001d, 0x1b0019,
        0x170015, 0x130011, 0xf000d, 0xb0009, 0x70005, 0x30001);
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
        const Words first = kParts == 1 ? reinterpret<Words>(low) + kHalfUnit : split_leading(low);
        const Words second = kParts == 1 ? reinterpret<Words>(high) + kHalfUnit : split_leading(high);
        store(to + part * stride, (Words)_mm512_permutex2var_epi16((__m512i)first, odd, (__m512i)second));
    }
}

// Two vectors as one row of pairs in each part, `low` in the lower halves.
template <int kParts>
inline void put_pairs(uint32_t* to, int64_t stride, Vector<float> low, Vector<float> high) {
#pragma GCC unroll 3
    for (int part = 0; part < kParts; ++part) {
        const Words first = kParts == 1 ? reinterpret<Words>(low) + kHalfUnit : split_leading(low);
        const Words second = kParts == 1 ? reinterpret<Words>(high) + kHalfUnit : split_leading(high);
        store(to + part * stride, pair_upper_halves(first, second));
    }
}

inline void transpose_tiles(uint32_t* tiles, int64_t count) {
    for (uint32_t* tile = tiles; tile < tiles + count * kTileWords; tile += kTileWords) {
        Words square[kTileRows];
        for (int row = 0; row < kTileRows; ++row) square[row] = load(tile + row * 16);
        transpose<uint32_t>(square);
        for (int row = 0; row < kTileRows; ++row) store(tile + row * 16, square[row]);
    }
}

// 16 rows of `length` numbers as A: [length / 32].
template <int kParts>
BEIT_FAST_FLAT inline void pack_left(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    for (int row = 0; row < kTileRows; ++row) {
        for (int64_t i = 0; i < length; i += 32) {
            uint32_t* tile = to + i / 32 * kTileSize<kParts> + row * 16;
            put_row<kParts>(tile, kTileWords, load(rows + row * stride + i), load(rows + row * stride + i + 16));
        }
    }
}

// 16 rows of `length` numbers, columns of B, summed over `length`: [length / 32].
template <int kParts>
BEIT_FAST_FLAT inline void pack_right_transposed(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    pack_left<kParts>(to, rows, stride, length);
    transpose_tiles(to, length / 32 * kParts);
}

// 32 rows of `length` numbers, summed over the rows, as B: [length / 16].
template <int kParts>
BEIT_FAST_FLAT inline void pack_right(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    for (int pair = 0; pair < kTileRows; ++pair) {
        const float* row = rows + 2 * pair * stride;
        for (int64_t i = 0; i < length; i += 16) {
            uint32_t* tile = to + i / 16 * kTileSize<kParts> + pair * 16;
            put_pairs<kParts>(tile, kTileWords, load(row + i), load(row + stride + i));
        }
    }
}

// 32 rows of `length` numbers, summed over the rows, columns of A: [length / 16].
template <int kParts>
BEIT_FAST_FLAT inline void pack_left_transposed(uint32_t* to, const float* rows, int64_t stride, int64_t length) {
    pack_right<kParts>(to, rows, stride, length);
    transpose_tiles(to, length / 16 * kParts);
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

    // Tiles of A `a_stride` words apart, of B `b_stride`; with all products of their parts.
    template <int kParts>
    static void add(const uint32_t* a, int64_t a_stride, const uint32_t* b, int64_t b_stride) {
#pragma GCC unroll 6
        for (int product = 0; product < kProducts<kParts>; ++product) {
            const int64_t left = kPartOfA[kParts - 1][product] * kTileWords;
            const int64_t right = kPartOfB[kParts - 1][product] * kTileWords;
            tile_load<6>(b + right);
            tile_load<4>(a + left);
            tile_multiply<0, 4, 6>();
            tile_load<5>(a + a_stride + left);
            tile_multiply<1, 5, 6>();
            tile_load<7>(b + b_stride + right);
            tile_multiply<2, 4, 7>();
            tile_multiply<3, 5, 7>();
        }
    }
};

}  // namespace
}  // namespace beit_fast
