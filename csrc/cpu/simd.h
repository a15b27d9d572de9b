// Vectors of the instruction set that a file is compiled for, and operations on them. Everything has internal linkage,
// so that code for one instruction set cannot be linked into code for another.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#if defined(__GNUC__) && !defined(__clang__)
// GCC's own headers use undefined vectors on purpose, and GCC 12 warns of them wherever they are inlined.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors as arguments: everything here is inlined
#endif

namespace beit_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

// For inner loops: every call in them is inlined, regardless of its size.
#define BEIT_FAST_FLAT __attribute__((flatten))
// The same, and never inlined into a caller, which would compete for registers.
#define BEIT_FAST_APART __attribute__((flatten, noinline))

template <class T>
struct VectorOf {
    typedef T type __attribute__((vector_size(kVectorBytes)));
};

template <class T>
using Vector = typename VectorOf<T>::type;

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

using Words = Vector<uint32_t>;

template <class T>
inline Vector<T> load(const T* from) {
    Vector<T> value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

template <class T>
inline void store(T* to, Vector<T> value) {
    std::memcpy(to, &value, sizeof(value));
}

template <class T>
inline Vector<T> splat(T value) {
    return value - Vector<T>{};
}

template <class To, class From>
inline To reinterpret(From value) {
    static_assert(sizeof(To) == sizeof(From));
    To result;
    std::memcpy(&result, &value, sizeof(To));
    return result;
}

// The larger of each pair, the second where they do not compare.
template <class T>
inline Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
    if constexpr (std::is_same_v<T, float>) return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
#endif
    return a > b ? a : b;
}

template <class T>
inline bool any_greater(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
    if constexpr (std::is_same_v<T, float>) return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) != 0;
#endif
    const auto greater = a > b;
    bool any = false;
    for (int lane = 0; lane < kLanes<T>; ++lane) any |= greater[lane] != 0;
    return any;
}

// Minimax polynomials of 2^x on [0, 1), lowest order first; relative errors 3.3e-6, with none at 0 and 1, 7.5e-8 and
// 1.9e-9.
constexpr float kExp2Degree4[] = {1.0f, 6.9303214550e-01f, 2.4137976766e-01f, 5.2032370120e-02f, 1.3555747457e-02f};
constexpr float kExp2Degree5[] = {9.9999992507e-01f, 6.9315307315e-01f, 2.4015361728e-01f, 5.5826317671e-02f,
                                  8.9893402834e-03f, 1.8775766803e-03f};
constexpr float kExp2Degree6[] = {1.0000000019e+00f, 6.9314698384e-01f, 2.4022983626e-01f, 5.5483342026e-02f,
                                  9.6788409494e-03f, 1.2439688010e-03f, 2.1702255527e-04f};

template <int kDegree>
inline Vector<float> exp2_polynomial(Vector<float> fraction) {
    static_assert(kDegree >= 4 && kDegree <= 6);
    const float* coefficients = kDegree == 4 ? kExp2Degree4 : kDegree == 5 ? kExp2Degree5 : kExp2Degree6;
    Vector<float> value = splat(coefficients[kDegree]);
#pragma GCC unroll 8
    for (int order = kDegree - 1; order >= 0; --order) value = value * fraction + splat(coefficients[order]);
    return value;
}

// 2^x, 0 for minus infinity, NaN for NaN. Results below 2^-126 may be 0.
template <int kDegree>
inline Vector<float> exp2(Vector<float> x) {
#if defined(__AVX512F__)
    const Vector<float> fraction = (Vector<float>)_mm512_reduce_ps((__m512)x, 0x09);  // x - floor(x)
    return (Vector<float>)_mm512_scalef_ps((__m512)exp2_polynomial<kDegree>(fraction), (__m512)x);
#else
    constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, in the lowest bits
    const Vector<float> lowest = splat(-126.0f), highest = splat(128.0f);
    Vector<float> bounded = x < lowest ? lowest : x;
    bounded = bounded > highest ? highest : bounded;
    const Vector<float> shifted = bounded - 0.5f + kRounder;
    const Vector<float> fraction = bounded - (shifted - kRounder);
    const Words exponent = reinterpret<Words>(shifted) << 23;
    const auto value = reinterpret<Vector<float>>(reinterpret<Words>(exp2_polynomial<kDegree>(fraction)) + exponent);
    return x < lowest ? Vector<float>{} : value;
#endif
}

template <int kDegree>
inline Vector<double> exp2(Vector<double> x) {
    for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::exp2(x[lane]);
    return x;
}

// log2 of positive normal numbers; minus infinity for 0.
inline Vector<float> log2(Vector<float> x) {
    const Words bits = reinterpret<Words>(x);
    const Words shifted = bits - 0x3f3504f3u;  // sqrt(1/2): the mantissa comes out between that and sqrt(2)
    const auto exponent = __builtin_convertvector(reinterpret<Vector<int32_t>>(shifted) >> 23, Vector<float>);
    const auto mantissa = reinterpret<Vector<float>>((shifted & 0x007fffffu) + 0x3f3504f3u);
    const Vector<float> ratio = (mantissa - 1.0f) / (mantissa + 1.0f), square = ratio * ratio;
    // 2 atanh(ratio) / ln 2, the series up to the ninth power.
    Vector<float> series = square * 0.32059889f + 0.41219858f;
    series = series * square + 0.57707802f;
    series = series * square + 0.96179669f;
    series = series * square + 2.88539008f;
    const Vector<float> result = series * ratio + exponent;
    return x > 0.0f ? result : splat(-std::numeric_limits<float>::infinity());
}

inline Vector<double> log2(Vector<double> x) {
    for (int lane = 0; lane < kLanes<double>; ++lane) x[lane] = std::log2(x[lane]);
    return x;
}

// One stage of a transpose: rows whose numbers differ in the bit kStep swap the halves of their groups of 2 * kStep.
template <int kStep, class V, int... kLane>
inline void exchange(V& low, V& high, std::integer_sequence<int, kLane...>) {
    constexpr int kCount = sizeof...(kLane);
    const V first = __builtin_shufflevector(low, high, ((kLane & kStep) ? kCount + kLane - kStep : kLane)...);
    high = __builtin_shufflevector(low, high, ((kLane & kStep) ? kCount + kLane : kLane + kStep)...);
    low = first;
}

template <int kStep, class T>
inline void transpose_stage(Vector<T>* rows) {
    constexpr int kCount = kLanes<T>;
#pragma GCC unroll 16
    for (int row = 0; row < kCount; ++row) {
        if (!(row & kStep)) exchange<kStep>(rows[row], rows[row + kStep], std::make_integer_sequence<int, kCount>{});
    }
    if constexpr (2 * kStep < kCount) transpose_stage<2 * kStep, T>(rows);
}

// Transposes a square of kLanes<T> rows in registers.
template <class T>
inline void transpose(Vector<T>* rows) {
    transpose_stage<1, T>(rows);
}

}  // namespace
}  // namespace beit_fast
