// 32 x 32 sums of products of terms, in tiles 0 to 3; 4 and 5 hold rows of the left operand, 6 and 7 columns of the
// right one.
#pragma once

#include "cpu/amx.h"
#include "cpu/linear/params.h"

namespace beit_fast::linear {
namespace {

// The products of terms that matter, smaller ones first, in an order that loads few tiles.
template <int kTerms>
struct ProductOrder;

template <>
struct ProductOrder<2> {
    static constexpr int count = 3, left[] = {1, 0, 0}, right[] = {0, 0, 1};
};

template <>
struct ProductOrder<3> {
    static constexpr int count = 6, left[] = {2, 1, 1, 0, 0, 0}, right[] = {0, 0, 1, 1, 2, 0};
};

// Of 16 rows, or of both halves of 32.
template <bool kBoth>
struct Sums {
    static void zero() {
        tile_zero<0>();
        tile_zero<1>();
        if constexpr (kBoth) tile_zero<2>();
        if constexpr (kBoth) tile_zero<3>();
    }

    // [32, 32]
    static void load(const float* sums) {
        tile_load<0>(sums, 2);
        tile_load<1>(sums + side, 2);
        if constexpr (kBoth) tile_load<2>(sums + side * pair_side, 2);
        if constexpr (kBoth) tile_load<3>(sums + side * pair_side + side, 2);
    }

    static void store(float* sums) {
        tile_store<0>(sums, 2);
        tile_store<1>(sums + side, 2);
        if constexpr (kBoth) tile_store<2>(sums + side * pair_side, 2);
        if constexpr (kBoth) tile_store<3>(sums + side * pair_side + side, 2);
    }

    static void load_left(const uint32_t* tiles) {
        tile_load<4>(tiles);
        if constexpr (kBoth) tile_load<5>(tiles + kTileWords);
    }

    static void load_right(const uint32_t* tiles) {
        tile_load<6>(tiles);
        tile_load<7>(tiles + kTileWords);
    }

    static void add() {
        tile_multiply<0, 4, 6>();
        tile_multiply<1, 4, 7>();
        if constexpr (kBoth) tile_multiply<2, 5, 6>();
        if constexpr (kBoth) tile_multiply<3, 5, 7>();
    }

    // Tiles of the next step, which come from the second cache, into the first.
    static void fetch(const uint32_t* tiles) {
#pragma GCC unroll 32
        for (int line = 0; line < pair_side; ++line) __builtin_prefetch(tiles + line * side, 0, 3);
    }

    // One step: the products of terms that matter.
    template <int kTerms>
    static void add_step(const uint32_t* left, const uint32_t* right) {
        using Order = ProductOrder<kTerms>;
#pragma GCC unroll 6
        for (int product = 0; product < Order::count; ++product) {
            const int own = Order::left[product], other = Order::right[product];
            if (product == 0 || own != Order::left[product - 1]) load_left(left + own * pair_words);
            if (product == 0 || other != Order::right[product - 1]) load_right(right + other * pair_words);
            add();
            for (int ahead = product; ahead < 2 * kTerms; ahead += Order::count) {
                fetch(ahead < kTerms ? left + (kTerms + ahead) * pair_words : right + ahead * pair_words);
            }
        }
    }
};

}  // namespace
}  // namespace beit_fast::linear
