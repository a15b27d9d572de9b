// fp32 as a sum of bf16 terms: each term is the remainder after the previous terms, rounded to nearest even. Three
// terms hold every bit of fp32 (bf16x3), two hold fp16 and 17 bits of fp32 (bf16x2).
#pragma once

#include "cpu/simd.h"

#if defined(__AVX512BF16__)
namespace beit_fast {
namespace {

// Two vectors rounded to bf16, as words: `low` in the lower halves, `high` in the upper ones.
inline Words pair_bf16(Vector<float> low, Vector<float> high) {
    alignas(64) static constexpr uint16_t kInterleaved[] = {
        0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512bh rounded = _mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
    return (Words)_mm512_permutexvar_epi16(_mm512_load_si512(kInterleaved), (__m512i)rounded);
}

// Two vectors as kTerms lines of words, `stride` words apart, the leading term first.
template <int kTerms>
inline void split_bf16(uint32_t* to, int64_t stride, Vector<float> low, Vector<float> high) {
#pragma GCC unroll 3
    for (int term = 0; term < kTerms; ++term) {
        const Words words = pair_bf16(low, high);
        store(to + term * stride, words);
        low -= reinterpret<Vector<float>>(words << 16);  // exact: the rest has fewer bits than the number
        high -= reinterpret<Vector<float>>(words & 0xffff0000u);
    }
}

}  // namespace
}  // namespace beit_fast
#endif
