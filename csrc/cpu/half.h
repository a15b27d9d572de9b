// Reading and writing rows of any floating-point type, and splitting fp32 into bf16 parts.
#pragma once

#include "cpu/attention/params.h"
#include "cpu/simd.h"

namespace beit_fast {
namespace {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}

inline float half_to_float(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
    const uint32_t magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Shifting the fields into place leaves the exponent 112 short, for subnormal halves too.
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
}

inline uint16_t float_to_half(float value) {
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const float magnitude = float_of_bits(bits & 0x7fffffffu);
    if (magnitude != magnitude) return sign | 0x7e00u;
    if (magnitude >= 65520.0f) return sign | 0x7c00u;
    // Adding a power of two whose last bit is the half's last bit rounds to nearest even.
    const uint32_t exponent = bits_of_float(magnitude) >> 23;
    const uint32_t step = (exponent < 113 ? 113 : exponent) + 13;
    const float rounder = float_of_bits(step << 23);
    const uint32_t kept = bits_of_float(magnitude + rounder) - bits_of_float(rounder);
    return static_cast<uint16_t>(sign | (((step - 126) << 10) + kept));
}

inline float bfloat_to_float(uint16_t bfloat) { return float_of_bits(static_cast<uint32_t>(bfloat) << 16); }

inline uint16_t float_to_bfloat(float value) {
    const uint32_t bits = bits_of_float(value);
    if (value != value) return static_cast<uint16_t>((bits >> 16) | 0x40u);
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// As many 16-bit numbers as a vector has floats.
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes<float>)));

inline Vector<float> widen_bfloat(HalfLanes bits) {
    return reinterpret<Vector<float>>(__builtin_convertvector(bits, Words) << 16);
}

// Rounds to nearest even; NaN stays NaN.
inline HalfLanes narrow_bfloat(Vector<float> value) {
    const Words bits = reinterpret<Words>(value);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words kept = value == value ? rounded : (bits | 0x400000u);
    return __builtin_convertvector(kept >> 16, HalfLanes);
}

inline Vector<float> widen_half(HalfLanes bits) {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps((__m256i)bits);
#elif defined(__F16C__)
    return (Vector<float>)_mm256_cvtph_ps((__m128i)bits);
#else
    Vector<float> value;
    for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = half_to_float(bits[lane]);
    return value;
#endif
}

inline HalfLanes narrow_half(Vector<float> value) {
#if defined(__AVX512F__)
    return (HalfLanes)_mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
    return (HalfLanes)_mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT);
#else
    HalfLanes bits;
    for (int lane = 0; lane < kLanes<float>; ++lane) bits[lane] = float_to_half(value[lane]);
    return bits;
#endif
}

inline HalfLanes load_half_lanes(const void* from) {
    HalfLanes bits;
    std::memcpy(&bits, from, sizeof(bits));
    return bits;
}

template <class T>
inline void write_number(void* to, Scalar type, int64_t index, T value) {
    switch (type) {
        case Scalar::f64: static_cast<double*>(to)[index] = static_cast<double>(value); break;
        case Scalar::f32: static_cast<float*>(to)[index] = static_cast<float>(value); break;
        case Scalar::bf16: static_cast<uint16_t*>(to)[index] = float_to_bfloat(static_cast<float>(value)); break;
        default: static_cast<uint16_t*>(to)[index] = float_to_half(static_cast<float>(value)); break;
    }
}

// Copies `count` numbers, `stride` elements apart, as `convert` makes them.
template <class T, class Source, class Convert>
inline void gather_row(T* to, const Source* from, int64_t count, int64_t stride, Convert convert) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<T>(convert(from[i * stride]));
}

// Copies `count` numbers of `type`, `stride` elements apart, into contiguous T; 16-bit ones as they are into uint16_t.
template <class T>
inline void read_row(T* to, const void* from, Scalar type, int64_t count, int64_t stride) {
    const auto* halves = static_cast<const uint16_t*>(from);
    int64_t i = 0;
    if constexpr (std::is_same_v<T, uint16_t>) {
        constexpr int kStep = kLanes<uint16_t>;
        for (; stride == 1 && i + kStep <= count; i += kStep) store(to + i, load(halves + i));
        for (; i < count; ++i) to[i] = halves[i * stride];
        return;
    }
    if constexpr (std::is_same_v<T, float>) {
        constexpr int kStep = kLanes<float>;
        for (; stride == 1 && i + kStep <= count; i += kStep) {
            if (type == Scalar::f32) store(to + i, load(static_cast<const float*>(from) + i));
            else if (type == Scalar::bf16) store(to + i, widen_bfloat(load_half_lanes(halves + i)));
            else if (type == Scalar::f16) store(to + i, widen_half(load_half_lanes(halves + i)));
            else break;
        }
    }
    const auto same = [](auto value) { return value; };
    const int64_t at = i * stride, rest = count - i;
    switch (type) {
        case Scalar::f64: return gather_row(to + i, static_cast<const double*>(from) + at, rest, stride, same);
        case Scalar::f32: return gather_row(to + i, static_cast<const float*>(from) + at, rest, stride, same);
        case Scalar::bf16: return gather_row(to + i, halves + at, rest, stride, bfloat_to_float);
        case Scalar::f16: return gather_row(to + i, halves + at, rest, stride, half_to_float);
    }
}

// Writes the first `count` lanes, contiguous, rounding to nearest.
template <class T>
inline void write_lanes(void* to, Vector<T> value, Scalar type, int64_t count) {
    if (count >= kLanes<T>) {
        if constexpr (std::is_same_v<T, float>) {
            if (type == Scalar::f32) return store(static_cast<float*>(to), value);
            if (type == Scalar::bf16 || type == Scalar::f16) {
                const HalfLanes bits = type == Scalar::bf16 ? narrow_bfloat(value) : narrow_half(value);
                std::memcpy(to, &bits, sizeof(bits));
                return;
            }
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

constexpr uint32_t kUpperHalf = 0xffff0000u;

// The leading bf16 of each number, cut off rather than rounded, as fp32; `value` keeps the rest, exactly.
inline Words split_leading(Vector<float>& value) {
    const Words leading = reinterpret<Words>(value) & kUpperHalf;
    value -= reinterpret<Vector<float>>(leading);
    return leading;
}

// bf16 pairs from the upper halves of two vectors: `low` goes into the lower half of each word.
inline Words pair_upper_halves(Words low, Words high) { return (high & kUpperHalf) | (low >> 16); }

// Adding this to the bits rounds what is then cut off to nearest, ties away from zero.
constexpr uint32_t kHalfUnit = 0x8000u;

}  // namespace
}  // namespace beit_fast
