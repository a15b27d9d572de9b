#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/half.h"
#include "cpu/patch_embed/params.h"

// A panel of the weight [E, K] as [K, columns], padded with zeros, so that a product reads it line by line.

namespace beit_fast::patch_embed {
namespace {

constexpr int panel_vectors = 2;

template <typename Number>
constexpr int panel_columns_of = panel_vectors * kLanes<Number>;

template <typename Value, typename Unit>
[[gnu::always_inline]] inline void convert_row(const Value* source, Unit* target, int64_t count) {
    if constexpr (std::is_same_v<Unit, uint32_t>) {
        std::memcpy(target, source, count * sizeof(Value));
    } else {
        widen_row(source, target, count);
    }
}

// One panel of `Unit`s: the sums' own type, or uint32_t for two bfloat16 that one instruction multiplies and adds.
template <typename Value, typename Unit>
void pack_panel(const Params& params, int64_t panel, int64_t units, Unit* packed) {
    constexpr int lanes = kLanes<Unit>;
    constexpr int columns = panel_columns_of<Unit>;
    constexpr int values_in_unit = std::is_same_v<Unit, uint32_t> ? 2 : 1;
    const auto* weight = static_cast<const Value*>(params.weight);
    for (int64_t vector = panel * panel_vectors; vector < (panel + 1) * panel_vectors; ++vector) {
        Unit* target = packed + vector % panel_vectors * lanes;
        const int64_t present = std::clamp<int64_t>(params.embed - vector * lanes, 0, lanes);
        for (int64_t begin = 0; begin < units; begin += lanes) {
            const int64_t rest = params.depth - begin * values_in_unit;
            const int64_t values = std::clamp<int64_t>(rest, 0, lanes * values_in_unit);
            Unit block[lanes][lanes];
            if (present < lanes || values < lanes * values_in_unit) std::memset(block, 0, sizeof block);
            const Value* source = weight + vector * lanes * params.depth + begin * values_in_unit;
            if (values == lanes * values_in_unit) {  // a constant for the compiler in the usual case
                for (int64_t row = 0; row < present; ++row) {
                    convert_row(source + row * params.depth, block[row], lanes * values_in_unit);
                }
            } else {
                for (int64_t row = 0; row < present; ++row) {
                    convert_row(source + row * params.depth, block[row], values);
                }
            }
            Vector<Unit> rows[lanes];
            for (int row = 0; row < lanes; ++row) rows[row] = load(block[row]);
            transpose<Unit>(rows);
            const int64_t kept = std::min<int64_t>(units - begin, lanes);
            for (int64_t row = 0; row < kept; ++row) store(target + (begin + row) * columns, rows[row]);
        }
    }
}

}  // namespace
}  // namespace beit_fast::patch_embed
