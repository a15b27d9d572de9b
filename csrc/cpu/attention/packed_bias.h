// The relative position bias of one head, laid out so that what all queries get from one key is contiguous.
//
// Inside the kernels tokens are counted patches first, CLS last: inner token i is token (i + 1) % N. The bias of key
// patch (rj, cj) and query patch (ri, ci) is T[(ri - rj + Wh - 1) * (2 Ww - 1) + ci - cj + Ww - 1], so with
//     packed[cj][u][ci] = T[u * (2 Ww - 1) + ci - cj + Ww - 1],  u = ri - rj + Wh - 1,
// the queries of a key are a slice of packed[cj] that starts at u = Wh - 1 - rj. All values are in units of log2(e).
#pragma once

#include "cpu/attention/rows.h"

namespace beit_fast {
namespace {

constexpr int kBiasMargin = 64;  // numbers past a slice that a vector of padding queries may read

inline int64_t padded(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Token of an inner token; padding past the last one wraps to tokens that exist.
inline int64_t token_of(int64_t inner, int64_t tokens) {
    return inner + 1 < tokens ? inner + 1 : (inner + 1) % tokens;
}

struct PackedBiasLayout {
    int64_t height = 0, width = 0, patches = 0, column = 0, size = 0, cls_row = 0;

    explicit PackedBiasLayout(const AttentionParams& params) {
        if (!params.has_bias()) return;
        height = params.window_height;
        width = params.window_width;
        patches = height * width;
        column = (2 * height - 1) * width;
        cls_row = padded(width * column + kBiasMargin, kBiasMargin);  // what queries get from the CLS key
        size = cls_row + padded(patches + 1, kBiasMargin) + kBiasMargin;
    }

    // The patch that comes at `place` where patches go by columns, each from the bottom up: slices then follow one
    // another through memory.
    int64_t patch_by_column(int64_t place) const { return (height - 1 - place % height) * width + place / height; }

    // Where the slice of inner key `key` starts.
    int64_t offset(int64_t key) const {
        if (key >= patches) return cls_row;
        return key % width * column + (height - 1 - key / width) * width;
    }
};

// Numbers of scratch that pack_bias() needs for one head's column of the table.
inline int64_t column_scratch(const PackedBiasLayout& layout) {
    return (2 * layout.height + 1) * 2 * layout.width + kBiasMargin;
}

// Copies `count` numbers in whole vectors: up to kBiasMargin - 1 numbers behind them are overwritten.
template <class T>
inline void copy_vectors(T* to, const T* from, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store(to + i, load(from + i));
}

// Fills `packed` (layout.size numbers) for one head. `column` is scratch.
// Returns the bias of the CLS query to patch keys, which has no place in the packed bias.
template <class T>
inline T pack_bias(T* packed, T* column, const AttentionParams& params, const PackedBiasLayout& layout, int64_t head) {
    const TableView& table = params.table;
    const int64_t wide = 2 * layout.width - 1, tall = 2 * layout.height - 1, rows = wide * tall + 3;
    read_row(column, element(table.data, table.type, head * table.head_stride), table.type, rows, table.row_stride);
    for (int64_t i = 0; i < rows; ++i) column[i] *= static_cast<T>(1.4426950408889634);
    const T* cls = column + wide * tall;  // CLS to patch, patch to CLS, CLS to CLS
    for (int64_t cj = 0; cj < layout.width; ++cj) {  // in this order each slice repairs what the one before ran over
        for (int64_t u = 0; u < tall; ++u) {
            T* to = packed + cj * layout.column + u * layout.width;
            copy_vectors(to, column + u * wide + layout.width - 1 - cj, layout.width);
        }
    }
    for (int64_t i = layout.width * layout.column; i < layout.cls_row; ++i) packed[i] = T(0);
    for (int64_t i = layout.cls_row; i < layout.size; ++i) packed[i] = cls[1];
    packed[layout.cls_row + layout.patches] = cls[2];
    return cls[0];
}

}  // namespace
}  // namespace beit_fast
