#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/patch_embed/numbers.h"
#include "cpu/patch_embed/params.h"

// A panel of the weight [E, K] as [K, columns], zeros behind its end, so that a product reads it line by line.

namespace beit_fast::patch_embed {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

template <typename Number>
struct VectorOf {
    typedef Number type __attribute__((vector_size(vector_bytes)));
    static constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Number));
};

template <typename Number>
using Vector = typename VectorOf<Number>::type;

template <typename Number>
constexpr int lanes_of = VectorOf<Number>::lanes;

constexpr int panel_vectors = 2;

template <typename Number>
constexpr int panel_columns_of = panel_vectors * lanes_of<Number>;

template <typename Number>
inline Vector<Number> load(const Number* source) {
    Vector<Number> vector;
    std::memcpy(&vector, source, sizeof vector);
    return vector;
}

template <typename Number>
inline void store(Vector<Number> vector, Number* target) {
    std::memcpy(target, &vector, sizeof vector);
}

// The first (offset 0) or second (offset lanes / 2) halves of two vectors, lane beside lane.
template <int offset, typename Vector, int... lane>
inline Vector interleave(Vector first, Vector second, std::integer_sequence<int, lane...>) {
    constexpr int lanes = sizeof...(lane);
    return __builtin_shufflevector(first, second, (offset + lane / 2 + lane % 2 * lanes)...);
}

template <typename Number>
inline void transpose(Vector<Number> (&rows)[lanes_of<Number>]) {
    constexpr int lanes = lanes_of<Number>;
    constexpr auto all = std::make_integer_sequence<int, lanes>();
    for (int done = 1; done < lanes; done *= 2) {
        Vector<Number> mixed[lanes];
        for (int row = 0; row < lanes / 2; ++row) {
            mixed[2 * row] = interleave<0>(rows[row], rows[row + lanes / 2], all);
            mixed[2 * row + 1] = interleave<lanes / 2>(rows[row], rows[row + lanes / 2], all);
        }
        std::copy_n(mixed, lanes, rows);
    }
}

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
void pack_panel(const Problem& problem, int64_t panel, int64_t units, Unit* packed) {
    constexpr int lanes = lanes_of<Unit>;
    constexpr int columns = panel_columns_of<Unit>;
    constexpr int values_in_unit = std::is_same_v<Unit, uint32_t> ? 2 : 1;
    const auto* weight = static_cast<const Value*>(problem.weight);
    for (int64_t part = panel * panel_vectors; part < (panel + 1) * panel_vectors; ++part) {
        Unit* target = packed + part % panel_vectors * lanes;
        const int64_t present = std::clamp<int64_t>(problem.embed - part * lanes, 0, lanes);
        for (int64_t begin = 0; begin < units; begin += lanes) {
            const int64_t rest = problem.depth - begin * values_in_unit;
            const int64_t values = std::clamp<int64_t>(rest, 0, lanes * values_in_unit);
            Unit block[lanes][lanes];
            if (present < lanes || values < lanes * values_in_unit) std::memset(block, 0, sizeof block);
            const Value* source = weight + part * lanes * problem.depth + begin * values_in_unit;
            if (values == lanes * values_in_unit) {  // the usual count, known to the compiler
                for (int64_t row = 0; row < present; ++row) {
                    convert_row(source + row * problem.depth, block[row], lanes * values_in_unit);
                }
            } else {
                for (int64_t row = 0; row < present; ++row) {
                    convert_row(source + row * problem.depth, block[row], values);
                }
            }
            Vector<Unit> rows[lanes];
            for (int row = 0; row < lanes; ++row) rows[row] = load(block[row]);
            transpose<Unit>(rows);
            const int64_t kept = std::min<int64_t>(units - begin, lanes);
            for (int64_t row = 0; row < kept; ++row) store<Unit>(rows[row], target + (begin + row) * columns);
        }
    }
}

}  // namespace
}  // namespace beit_fast::patch_embed
