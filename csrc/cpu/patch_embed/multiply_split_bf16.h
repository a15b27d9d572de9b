#pragma once

#include "cpu/amx.h"
#include "cpu/patch_embed/multiply.h"
#include "cpu/split_bf16.h"

#include <immintrin.h>

// fp32 on tiles of bfloat16: a number is the exact sum of three terms, and the six products of terms that matter give
// fp32's accuracy. Rows and panels hold, for every 32 of K, a line of 16 words for each term; word i has the terms of
// numbers i and i + 16.

namespace beit_fast::patch_embed {
namespace {

constexpr int step_words = 16;  // of one term of 32 numbers
constexpr int float_terms = 3;

// Replaces `steps` steps of 32 numbers at the end of a row of words by the words of their terms, in place: writes never
// pass the reads.
inline void split_row(uint32_t* row, int64_t steps) {
    const auto* numbers = reinterpret_cast<const char*>(row + steps * (float_terms * step_words - 32));
    for (int64_t step = 0; step < steps; ++step) {
        Vector<float> halves[2];
        std::memcpy(halves, numbers + step * sizeof halves, sizeof halves);
        split_bf16<float_terms>(row + step * float_terms * step_words, step_words, halves[0], halves[1]);
    }
}

// A panel of the weight, lines of 32 columns.
template <typename Value>
void pack_split_bf16(const Params& params, int64_t panel, int64_t units, uint32_t* packed) {
    constexpr int lanes = 16, columns = panel_columns_of<float>;
    const auto* weight = static_cast<const Value*>(params.weight);
    for (int64_t begin = panel * columns; begin < (panel + 1) * columns; begin += lanes) {
        uint32_t* target = packed + begin % columns;
        const int64_t present = std::clamp<int64_t>(params.embed - begin, 0, lanes);
        for (int64_t step = 0; step * float_terms * step_words < units; ++step) {
            const int64_t values = std::min<int64_t>(params.depth - step * 32, 32);
            float block[lanes][32];
            if (present < lanes || values < 32) std::memset(block, 0, sizeof block);
            for (int64_t row = 0; row < present; ++row) {
                const Value* source = weight + (begin + row) * params.depth + step * 32;
                if (values == 32) widen_row(source, block[row], 32);  // a constant for the compiler in the usual case
                else widen_row(source, block[row], values);
            }
            Vector<float> low[lanes], high[lanes];
            for (int row = 0; row < lanes; ++row) {
                low[row] = load(block[row]);
                high[row] = load(block[row] + lanes);
            }
            transpose<float>(low);
            transpose<float>(high);
            for (int word = 0; word < step_words; ++word) {
                uint32_t* line = target + (step * float_terms * step_words + word) * columns;
                split_bf16<float_terms>(line, step_words * columns, low[word], high[word]);
            }
        }
    }
}

// 16 or 32 rows times a panel. Tiles 0 to 3 are sums, 4 and 5 rows of patches, 6 and 7 columns of the panel.
struct MultiplySplitBf16 {
    using Sum = float;
    using Element = float;
    using Unit = uint32_t;
    using Tile = patch_embed::Tile<Unit, Sum>;
    static constexpr int terms = float_terms;
    static constexpr int rows_at_once = 32;
    static constexpr int columns = panel_columns_of<float>;
    static constexpr int64_t units_at_once = 144;  // rows, panel and sums of a tile fit in L1
    static constexpr int64_t panel_stride = columns * sizeof(Unit);

    const TileSession session;

    static void run(int64_t height, const Tile& tile) {
        if (height > 16) {
            run_rows<true>(tile);
        } else {
            run_rows<false>(tile);
        }
    }

    template <bool both>
    static void run_rows(const Tile& tile) {
        const int64_t row_stride = tile.row_units * sizeof(Unit);
        float* lower = tile.sums + 16 * columns;
        if (tile.begin == 0) {
            _tile_zero(0);
            _tile_zero(1);
            if constexpr (both) _tile_zero(2);
            if constexpr (both) _tile_zero(3);
        } else {
            _tile_loadd(0, tile.sums, panel_stride);
            _tile_loadd(1, tile.sums + 16, panel_stride);
            if constexpr (both) _tile_loadd(2, lower, panel_stride);
            if constexpr (both) _tile_loadd(3, lower + 16, panel_stride);
        }
        for (int64_t k = tile.begin; k < tile.end; k += terms * step_words) {
            for (int term = terms - 1; term >= 0; --term) {  // small terms first, for accuracy
                const uint32_t* rows = tile.rows + k + term * step_words;
                _tile_loadd(4, rows, row_stride);
                if constexpr (both) _tile_loadd(5, rows + 16 * tile.row_units, row_stride);
                for (int other = terms - 1 - term; other >= 0; --other) {
                    const uint32_t* panel = tile.panel + (k + other * step_words) * columns;
                    _tile_loadd(6, panel, panel_stride);
                    _tile_loadd(7, panel + 16, panel_stride);
                    _tile_dpbf16ps(0, 4, 6);
                    _tile_dpbf16ps(1, 4, 7);
                    if constexpr (both) _tile_dpbf16ps(2, 5, 6);
                    if constexpr (both) _tile_dpbf16ps(3, 5, 7);
                }
            }
        }
        _tile_stored(0, tile.sums, panel_stride);
        _tile_stored(1, tile.sums + 16, panel_stride);
        if constexpr (both) _tile_stored(2, lower, panel_stride);
        if constexpr (both) _tile_stored(3, lower + 16, panel_stride);
    }
};

}  // namespace
}  // namespace beit_fast::patch_embed
