#pragma once

#include "cpu/amx.h"
#include "cpu/patch_embed/multiply.h"

#include <immintrin.h>

namespace beit_fast::patch_embed {
namespace {

// 16 or 32 rows of bfloat16 times a panel, 16 pairs of K at a time. Tiles 0 to 3 are sums, 4 and 5 rows of patches, 6
// and 7 columns of the panel.
struct MultiplyTiles {
    using Sum = float;
    using Element = BFloat16;
    using Unit = uint32_t;
    using Tile = patch_embed::Tile<Unit, Sum>;
    static constexpr int terms = 1;
    static constexpr int rows_at_once = 32;
    static constexpr int columns = panel_columns_of<float>;
    static constexpr int64_t units_multiple = 16;
    static constexpr int64_t units_at_once = 128;  // rows, panel and sums of a tile fit in L1
    static constexpr int64_t panel_stride = columns * sizeof(Unit);

    const TileSession session;

    static void run(int64_t height, const Tile& tile) {
        if (height > 16) {
            run_32(tile);
        } else {
            run_16(tile);
        }
    }

    static void run_32(const Tile& tile) {
        const int64_t row_stride = tile.row_units * sizeof(Unit);
        if (tile.begin == 0) {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        } else {
            _tile_loadd(0, tile.sums, panel_stride);
            _tile_loadd(1, tile.sums + 16, panel_stride);
            _tile_loadd(2, tile.sums + 16 * columns, panel_stride);
            _tile_loadd(3, tile.sums + 16 * columns + 16, panel_stride);
        }
        for (int64_t k = tile.begin; k < tile.end; k += 16) {
            _tile_loadd(4, tile.rows + k, row_stride);
            _tile_loadd(6, tile.panel + k * columns, panel_stride);
            _tile_loadd(7, tile.panel + k * columns + 16, panel_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, tile.rows + 16 * tile.row_units + k, row_stride);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        _tile_stored(0, tile.sums, panel_stride);
        _tile_stored(1, tile.sums + 16, panel_stride);
        _tile_stored(2, tile.sums + 16 * columns, panel_stride);
        _tile_stored(3, tile.sums + 16 * columns + 16, panel_stride);
    }

    static void run_16(const Tile& tile) {
        const int64_t row_stride = tile.row_units * sizeof(Unit);
        if (tile.begin == 0) {
            _tile_zero(0);
            _tile_zero(1);
        } else {
            _tile_loadd(0, tile.sums, panel_stride);
            _tile_loadd(1, tile.sums + 16, panel_stride);
        }
        for (int64_t k = tile.begin; k < tile.end; k += 16) {
            _tile_loadd(4, tile.rows + k, row_stride);
            _tile_loadd(6, tile.panel + k * columns, panel_stride);
            _tile_loadd(7, tile.panel + k * columns + 16, panel_stride);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
        }
        _tile_stored(0, tile.sums, panel_stride);
        _tile_stored(1, tile.sums + 16, panel_stride);
    }
};

}  // namespace
}  // namespace beit_fast::patch_embed
