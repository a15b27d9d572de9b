#pragma once

#include <cstdint>

#include "cuda/patch_embed/arguments.cuh"

// Instructions of sm_80 without a C++ equivalent.
namespace beit_fast::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes to shared memory, zeros where `valid` is false; the address is not read then.
__device__ __forceinline__ void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
                 "r"(valid ? 16 : 0)
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's groups are in flight.
template <int pending>
__device__ __forceinline__ void wait_for_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four 8 x 16-byte matrices; lane i gives the address of row i % 8 of matrix i / 8, and gets the four bytes
// 4 * (i % 4) of row i / 4 of each.
__device__ __forceinline__ void load_matrices(uint32_t (&words)[4], const void* shared) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(shared_address(shared))
                 : "memory");
}

// upper and lower (rows r and r + 8, columns 2q and 2q + 1) += a [16, 32 bytes] * b [32 bytes, 8].
template <Arithmetic arithmetic>
__device__ __forceinline__ void multiply_matrices(float* upper, float* lower, const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    if constexpr (arithmetic == Arithmetic::kFloat16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else if constexpr (arithmetic == Arithmetic::kBFloat16) {
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    } else {
        asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
                     "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(upper[0]), "+f"(upper[1]), "+f"(lower[0]), "+f"(lower[1])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    }
}

// Read-only loads of 1, 2, 4, 8 and 16 bytes.
__device__ __forceinline__ uint32_t load_byte(const void* p) { return __ldg(static_cast<const uint8_t*>(p)); }
__device__ __forceinline__ uint32_t load_short(const void* p) { return __ldg(static_cast<const uint16_t*>(p)); }
__device__ __forceinline__ uint32_t load_word(const void* p) { return __ldg(static_cast<const uint32_t*>(p)); }
__device__ __forceinline__ uint2 load_two_words(const void* p) { return __ldg(static_cast<const uint2*>(p)); }
__device__ __forceinline__ uint4 load_four_words(const void* p) { return __ldg(static_cast<const uint4*>(p)); }

// Stores of 2, 4 and 16 bytes.
__device__ __forceinline__ void store_short(void* p, uint32_t word) { *static_cast<uint16_t*>(p) = word; }
__device__ __forceinline__ void store_word(void* p, uint32_t word) { *static_cast<uint32_t*>(p) = word; }
__device__ __forceinline__ void store_four_words(void* p, uint4 words) { *static_cast<uint4*>(p) = words; }

__device__ __forceinline__ float bits_to_float(uint32_t bits) { return __uint_as_float(bits); }
__device__ __forceinline__ uint32_t float_to_bits(float value) { return __float_as_uint(value); }

// Byte `index` of a word: put under the exponent of 2^23, whose last place is 1.
__device__ __forceinline__ float byte_to_float(uint32_t word, int index) {
    return __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7650u + index)) - 8388608.0f;
}

__device__ __forceinline__ float half_to_float(uint32_t bits) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<uint16_t>(bits)));
    return value;
}

// Two numbers rounded to nearest, the first in the low half.
__device__ __forceinline__ uint32_t pack_halves(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ uint32_t pack_bfloats(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

__device__ __forceinline__ uint32_t round_to_tensor_float(float value) {
    uint32_t bits;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(value));
    return bits;
}

}  // namespace beit_fast::cuda
