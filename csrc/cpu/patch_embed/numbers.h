#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__)
#include <immintrin.h>
#endif

// Float types of 16 bits and their conversions. Internal linkage: each instruction set compiles its own.

namespace beit_fast::patch_embed {
namespace {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float widen(BFloat16 value) { return float_of(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const uint32_t sign = (value.bits & 0x8000u) << 16;
    const uint32_t rest = (value.bits & 0x7fffu) << 13;
    if (rest >= 0x0f800000u) return float_of(sign | rest | 0x7f800000u);  // infinity, NaN
    return float_of(sign | bits_of(float_of(rest) * float_of(0x77800000u)));  // 2^112 moves the exponent
#endif
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(uint8_t value) { return value; }

inline void narrow(float value, float& result) { result = value; }
inline void narrow(double value, double& result) { result = value; }
inline void narrow(double value, float& result) { result = static_cast<float>(value); }
inline void narrow(float value, double& result) { result = value; }

// Round to nearest even; a NaN stays one.
inline void narrow(float value, BFloat16& result) {
    const uint32_t bits = bits_of(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    result.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline void narrow(double value, BFloat16& result) { narrow(static_cast<float>(value), result); }

inline void narrow(float value, Half& result) {
#if defined(__F16C__)
    result.bits = _cvtss_sh(value, 0);
#else
    const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
    uint32_t rest = bits_of(value) & 0x7fffffffu;
    if (rest >= 0x47800000u) {  // too large, infinity or NaN
        rest = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
    } else if (rest < 0x38800000u) {  // a subnormal: the addition rounds
        rest = bits_of(float_of(rest) + 0.5f) - 0x3f000000u;
    } else {
        rest = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;
    }
    result.bits = static_cast<uint16_t>(sign | rest);
#endif
}

template <typename Value, typename Sum>
[[gnu::always_inline]] inline void widen_row(const Value* values, Sum* sums, int64_t count) {
    for (int64_t place = 0; place < count; ++place) sums[place] = static_cast<Sum>(widen(values[place]));
}

#if defined(__AVX2__)
// Compilers take a long way from bytes to fp32.
[[gnu::always_inline]] inline void widen_row(const uint8_t* values, float* sums, int64_t count) {
    int64_t place = 0;
    for (; place + 8 <= count; place += 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(values + place));
        _mm256_storeu_ps(sums + place, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)));
    }
    for (; place < count; ++place) sums[place] = values[place];
}
#endif

template <typename Sum, typename Value>
[[gnu::always_inline]] inline void narrow_row(const Sum* sums, Value* values, int64_t count) {
    for (int64_t place = 0; place < count; ++place) narrow(sums[place], values[place]);
}

#if defined(__AVX512BF16__)
[[gnu::always_inline]] inline void narrow_row(const float* sums, BFloat16* values, int64_t count) {
    int64_t place = 0;
    for (; place + 16 <= count; place += 16) {
        const auto sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(sums + place));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(values + place), sixteen);
    }
    for (; place < count; ++place) narrow(sums[place], values[place]);
}
#endif

#if defined(__F16C__)
// Compilers vectorise no conversion of half numbers by themselves.
[[gnu::always_inline]] inline void widen_row(const Half* values, float* sums, int64_t count) {
    int64_t place = 0;
    for (; place + 8 <= count; place += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values + place));
        _mm256_storeu_ps(sums + place, _mm256_cvtph_ps(eight));
    }
    for (; place < count; ++place) sums[place] = widen(values[place]);
}

[[gnu::always_inline]] inline void narrow_row(const float* sums, Half* values, int64_t count) {
    int64_t place = 0;
    for (; place + 8 <= count; place += 8) {
        const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(sums + place), 0);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(values + place), eight);
    }
    for (; place < count; ++place) narrow(sums[place], values[place]);
}
#endif

}  // namespace
}  // namespace beit_fast::patch_embed
