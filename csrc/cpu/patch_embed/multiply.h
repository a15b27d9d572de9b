#pragma once

#include <algorithm>
#include <utility>

#include "cpu/patch_embed/pack.h"

// Rows of patches times one panel of the weight, some units of K at a time. Every sum is added up in the order of K,
// whatever tile it falls into, so that results do not depend on how the rows are divided among threads.

namespace beit_fast::patch_embed {
namespace {

#if defined(__AVX512F__)
constexpr int tile_rows = 14;
#elif defined(__aarch64__)
constexpr int tile_rows = 12;
#else
constexpr int tile_rows = 6;
#endif

// A tile of products, for units [begin, end) of K: added to `sums` unless `begin` is 0.
template <typename Unit, typename Sum>
struct Tile {
    const Unit* rows;
    int64_t row_units;
    const Unit* panel;
    int64_t begin, end;
    Sum* sums;
};

// One function for each height of a tile, from 1 to `tile_rows`, so that the sums stay in registers.
template <typename Multiplier, int... row>
inline void multiply_by_height(int64_t height, const typename Multiplier::Tile& tile,
                               std::integer_sequence<int, row...>) {
    using Function = void (*)(const typename Multiplier::Tile&);
    static constexpr Function functions[] = {Multiplier::template multiply<row + 1>...};
    functions[height - 1](tile);
}

template <typename Sum>
inline void add_vector(Vector<Sum> part, bool is_first, Sum* target) {
    store(target, is_first ? part : load(target) + part);
}

// Products in the type of the sums. Each run over K is short: the reused section of the panel stays in L1, and a sum of
// short sums has less rounding error than a long sum.
template <typename Number>
struct Multiply {
    using Sum = Number;
    using Element = Number;  // of a gathered row
    using Unit = Number;     // of a packed panel, and of a row as it is multiplied
    using Tile = patch_embed::Tile<Unit, Sum>;
    static constexpr int terms = 1;
    static constexpr int rows_at_once = tile_rows;
    static constexpr int columns = panel_columns_of<Number>;
    static constexpr int64_t units_multiple = 1;
    static constexpr int64_t units_at_once = 256;

    static void run(int64_t height, const Tile& tile) {
        multiply_by_height<Multiply>(height, tile, std::make_integer_sequence<int, rows_at_once>());
    }

    template <int height>
    static void multiply(const Tile& tile) {
        constexpr int lanes = kLanes<Sum>;
        Vector<Sum> total[height][panel_vectors] = {};
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const Vector<Sum> first = load(tile.panel + k * columns);
            const Vector<Sum> second = load(tile.panel + k * columns + lanes);
            for (int row = 0; row < height; ++row) {
                const Sum factor = tile.rows[row * tile.row_units + k];
                total[row][0] += first * factor;
                total[row][1] += second * factor;
            }
        }
        for (int row = 0; row < height; ++row) {
            add_vector(total[row][0], tile.begin == 0, tile.sums + row * columns);
            add_vector(total[row][1], tile.begin == 0, tile.sums + row * columns + lanes);
        }
    }
};

#if defined(__AVX512BF16__)
// Two bfloat16 of a row times two of a column, added up in fp32 by one instruction.
struct MultiplyPairs {
    using Sum = float;
    using Element = BFloat16;
    using Unit = uint32_t;
    using Tile = patch_embed::Tile<Unit, Sum>;
    static constexpr int terms = 1;
    static constexpr int rows_at_once = tile_rows;
    static constexpr int columns = panel_columns_of<float>;
    static constexpr int64_t units_multiple = 1;
    static constexpr int64_t units_at_once = 256;

    static void run(int64_t height, const Tile& tile) {
        multiply_by_height<MultiplyPairs>(height, tile, std::make_integer_sequence<int, rows_at_once>());
    }

    template <int height>
    static void multiply(const Tile& tile) {
        __m512 total[height][panel_vectors];
        for (int row = 0; row < height; ++row) total[row][0] = total[row][1] = _mm512_setzero_ps();
        for (int64_t k = tile.begin; k < tile.end; ++k) {
            const auto first = (__m512bh)_mm512_loadu_si512(tile.panel + k * columns);
            const auto second = (__m512bh)_mm512_loadu_si512(tile.panel + k * columns + 16);
            for (int row = 0; row < height; ++row) {
                const uint32_t pair = tile.rows[row * tile.row_units + k];
                const auto factor = (__m512bh)_mm512_set1_epi32(static_cast<int>(pair));
                total[row][0] = _mm512_dpbf16_ps(total[row][0], factor, first);
                total[row][1] = _mm512_dpbf16_ps(total[row][1], factor, second);
            }
        }
        for (int row = 0; row < height; ++row) {
            add_vector<float>(total[row][0], tile.begin == 0, tile.sums + row * columns);
            add_vector<float>(total[row][1], tile.begin == 0, tile.sums + row * columns + 16);
        }
    }
};
#endif

}  // namespace
}  // namespace beit_fast::patch_embed
