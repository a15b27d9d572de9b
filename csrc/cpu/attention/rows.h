// Rows of numbers of any floating-point type, read as T and written from T.
#pragma once

#include "cpu/attention/params.h"
#include "cpu/half.h"

namespace beit_fast {
namespace {

template <class T>
inline void write_number(void* to, Scalar type, int64_t index, T value) {
    switch (type) {
        case Scalar::f64: return narrow(value, static_cast<double*>(to)[index]);
        case Scalar::f32: return narrow(value, static_cast<float*>(to)[index]);
        case Scalar::bf16: return narrow(value, static_cast<BFloat16*>(to)[index]);
        case Scalar::f16: return narrow(value, static_cast<Half*>(to)[index]);
    }
}

// Copies `count` numbers, `stride` elements apart.
template <class T, class From>
inline void gather_row(T* to, const From* from, int64_t count, int64_t stride) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(widen(from[i * stride]));
}

// Copies `count` numbers of `type`, `stride` elements apart, into contiguous T; 16-bit ones as they are into uint16_t.
template <class T>
inline void read_row(T* to, const void* from, Scalar type, int64_t count, int64_t stride) {
    const auto *f64 = static_cast<const double*>(from);
    const auto *f32 = static_cast<const float*>(from);
    const auto *bf16 = static_cast<const BFloat16*>(from);
    const auto *f16 = static_cast<const Half*>(from);
    int64_t i = 0;
    if constexpr (std::is_same_v<T, uint16_t>) {
        const auto* bits = static_cast<const uint16_t*>(from);
        constexpr int kStep = kLanes<uint16_t>;
        for (; stride == 1 && i + kStep <= count; i += kStep) store(to + i, load(bits + i));
        for (; i < count; ++i) to[i] = bits[i * stride];
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        constexpr int kStep = kLanes<float>;
        for (; stride == 1 && i + kStep <= count; i += kStep) {
            if (type == Scalar::f32) store(to + i, load(f32 + i));
            else if (type == Scalar::bf16) store(to + i, load_wide(bf16 + i));
            else if (type == Scalar::f16) store(to + i, load_wide(f16 + i));
            else break;
        }
    }
    const int64_t at = i * stride, rest = count - i;
    switch (type) {
        case Scalar::f64: return gather_row(to + i, f64 + at, rest, stride);
        case Scalar::f32: return gather_row(to + i, f32 + at, rest, stride);
        case Scalar::bf16: return gather_row(to + i, bf16 + at, rest, stride);
        case Scalar::f16: return gather_row(to + i, f16 + at, rest, stride);
    }
}

// Writes the first `count` lanes, contiguous, rounded to nearest.
template <class T>
inline void write_lanes(void* to, Vector<T> value, Scalar type, int64_t count) {
    if (count >= kLanes<T>) {
        if constexpr (std::is_same_v<T, float>) {
            if (type == Scalar::f32) return store(static_cast<float*>(to), value);
            if (type == Scalar::bf16) return store_narrow(static_cast<BFloat16*>(to), value);
            if (type == Scalar::f16) return store_narrow(static_cast<Half*>(to), value);
        } else if (type == Scalar::f64) {
            return store(static_cast<double*>(to), value);
        }
        count = kLanes<T>;
    }
    for (int64_t lane = 0; lane < count; ++lane) write_number<T>(to, type, lane, value[lane]);
}

inline int64_t bytes_of(Scalar type) {
    return type == Scalar::f64 ? 8 : type == Scalar::f32 ? 4 : 2;
}

inline const void* element(const void* data, Scalar type, int64_t index) {
    return static_cast<const char*>(data) + index * bytes_of(type);
}

inline void* element(void* data, Scalar type, int64_t index) {
    return static_cast<char*>(data) + index * bytes_of(type);
}

// Pointer to the first number of a token's head.
inline const void* token_row(const TokensView& view, Scalar type, int64_t batch, int64_t token, int64_t head) {
    return element(view.data, type,
                   batch * view.batch_stride + token * view.token_stride + head * view.head_stride);
}

}  // namespace
}  // namespace beit_fast
