// fp16 and bf16 to fp32 and back, rounded to nearest even; a NaN stays a NaN. Internal linkage: each instruction set
// compiles its own.
#pragma once

#include "cpu/simd.h"

namespace beit_fast {
namespace {

struct Half {
    uint16_t bits;
};

struct BFloat16 {
    uint16_t bits;
};

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

inline float widen(uint8_t value) { return value; }
inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
#if defined(__F16C__)
    return _cvtsh_ss(value.bits);
#else
    const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
    const uint32_t magnitude = value.bits & 0x7fffu;
    if (magnitude >= 0x7c00u) return float_of_bits(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Shifting the fields into place leaves the exponent 112 short, for subnormal numbers too.
    return float_of_bits(sign | bits_of_float(float_of_bits(magnitude << 13) * 0x1p112f));
#endif
}

inline void narrow(float value, float& result) { result = value; }
inline void narrow(float value, double& result) { result = value; }
inline void narrow(double value, float& result) { result = static_cast<float>(value); }
inline void narrow(double value, double& result) { result = value; }

inline void narrow(float value, BFloat16& result) {
    const uint32_t bits = bits_of_float(value);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    result.bits = static_cast<uint16_t>(value == value ? rounded : (bits >> 16) | 0x40u);
}

inline void narrow(float value, Half& result) {
#if defined(__F16C__)
    result.bits = _cvtss_sh(value, 0);
#else
    const uint32_t bits = bits_of_float(value);
    const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    const float magnitude = float_of_bits(bits & 0x7fffffffu);
    uint32_t rounded = magnitude == magnitude ? 0x7c00u : 0x7e00u;  // infinity or NaN
    if (magnitude < 65520.0f) {
        // Adding a power of two whose last bit is the last bit of the result rounds to nearest even.
        const uint32_t exponent = bits_of_float(magnitude) >> 23;
        const uint32_t step = (exponent < 113 ? 113 : exponent) + 13;
        const float rounder = float_of_bits(step << 23);
        rounded = ((step - 126) << 10) + bits_of_float(magnitude + rounder) - bits_of_float(rounder);
    }
    result.bits = static_cast<uint16_t>(sign | rounded);
#endif
}

inline void narrow(double value, BFloat16& result) { narrow(static_cast<float>(value), result); }
inline void narrow(double value, Half& result) { narrow(static_cast<float>(value), result); }

// As many 16-bit numbers as a vector has floats.
typedef uint16_t HalfLanes __attribute__((vector_size(2 * kLanes<float>)));

inline Vector<float> load_wide(const BFloat16* from) {
    HalfLanes bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reinterpret<Vector<float>>(__builtin_convertvector(bits, Words) << 16);
}

inline Vector<float> load_wide(const Half* from) {
#if defined(__AVX512F__)
    return (Vector<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
    Vector<float> value;
    for (int lane = 0; lane < kLanes<float>; ++lane) value[lane] = widen(from[lane]);
    return value;
#endif
}

inline void store_narrow(BFloat16* to, Vector<float> value) {
    const Words bits = reinterpret<Words>(value);
    const Words rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Words kept = value == value ? rounded : (bits | 0x400000u);
    const auto halves = __builtin_convertvector(kept >> 16, HalfLanes);
    std::memcpy(to, &halves, sizeof(halves));
}

inline void store_narrow(Half* to, Vector<float> value) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__) && defined(__F16C__)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int lane = 0; lane < kLanes<float>; ++lane) narrow(value[lane], to[lane]);
#endif
}

template <class From, class To>
[[gnu::always_inline]] inline void widen_row(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(widen(from[i]));
}

template <class From, class To>
[[gnu::always_inline]] inline void narrow_row(const From* from, To* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

// Rows that compilers do not vectorize well by themselves.
#if defined(__AVX2__)
[[gnu::always_inline]] inline void widen_row(const uint8_t* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(to + i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(eight)));
    }
    for (; i < count; ++i) to[i] = from[i];
}
#endif

#if defined(__F16C__)
[[gnu::always_inline]] inline void widen_row(const Half* from, float* to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
        _mm256_storeu_ps(to + i, _mm256_cvtph_ps(eight));
    }
    for (; i < count; ++i) to[i] = widen(from[i]);
}

[[gnu::always_inline]] inline void narrow_row(const float* from, Half* to, int64_t count) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
        const __m128i eight = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), 0);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), eight);
    }
    for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

#if defined(__AVX512BF16__)
[[gnu::always_inline]] inline void narrow_row(const float* from, BFloat16* to, int64_t count) {
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        const auto sixteen = (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), sixteen);
    }
    for (; i < count; ++i) narrow(from[i], to[i]);
}
#endif

}  // namespace
}  // namespace beit_fast
