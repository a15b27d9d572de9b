#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"
#include "cuda/patch_embed/arguments.cuh"

// Fake of csrc/cuda/patch_embed/instructions.cuh for a C++ compiler: the keywords of CUDA, and each instruction by the
// PTX manual.
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static
#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index

struct alignas(8) uint2 {
    uint32_t x, y;
};
struct alignas(16) uint4 {
    uint32_t x, y, z, w;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline void __syncthreads() { emulation::synchronize_block(); }
inline void __syncwarp() { emulation::synchronize_warp(); }

namespace beit_fast::cuda {

inline void copy_async(void* shared, const void* global, bool valid) { emulation::copy_async(shared, global, valid); }
inline void commit_copies() { emulation::commit_copies(); }

template <int pending>
void wait_for_copies() {
    emulation::wait_for_copies(pending);
}

inline void load_matrices(uint32_t (&words)[4], const void* shared) {
    const int lane = emulation::lane();
    const auto* rows = emulation::exchange(shared);
    for (int matrix = 0; matrix < 4; ++matrix) {
        std::memcpy(&words[matrix], static_cast<const char*>(rows[8 * matrix + lane / 4]) + lane % 4 * 4, 4);
    }
}

inline float bits_to_float(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline uint32_t float_to_bits(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float byte_to_float(uint32_t word, int index) { return static_cast<float>((word >> (8 * index)) & 255); }

inline float half_to_float(uint32_t bits) {
    const auto low = static_cast<uint16_t>(bits);
    _Float16 value;
    std::memcpy(&value, &low, 2);
    return static_cast<float>(value);
}

inline uint32_t half_bits(float number) {
    const auto value = static_cast<_Float16>(number);
    uint16_t bits;
    std::memcpy(&bits, &value, 2);
    return bits;
}

// Rounds to the nearest number whose last `dropped` bits are 0.
inline uint32_t round_to_even(float number, int dropped) {
    const uint32_t bits = float_to_bits(number);
    if (std::isnan(number)) return 0x7fffffffu >> dropped << dropped;
    const uint32_t odd = (bits >> dropped) & 1;
    return (bits + (1u << (dropped - 1)) - 1 + odd) >> dropped << dropped;
}

inline uint32_t pack_halves(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline uint32_t pack_bfloats(float low, float high) {
    return round_to_even(low, 16) >> 16 | (round_to_even(high, 16) & 0xffff0000u);
}

// Ties go away from zero.
inline uint32_t round_to_tensor_float(float value) { return (float_to_bits(value) + 0x1000u) & ~0x1fffu; }

struct Operands {
    uint32_t a[4];
    uint32_t b[2];
};

// Number `place` of a register with two halves or one TF32. The product drops the last 13 bits of a TF32.
template <Arithmetic arithmetic>
double operand(uint32_t word, int place) {
    if (arithmetic == Arithmetic::kTensorFloat32) return bits_to_float(word & ~0x1fffu);
    const uint32_t bits = place == 0 ? word & 0xffffu : word >> 16;
    return arithmetic == Arithmetic::kFloat16 ? half_to_float(bits) : bits_to_float(bits << 16);
}

// Fragments of mma.m16n8k16 and m16n8k8 in PTX: lane 4 g + q has row g of a (g + 8 in a[1] and a[3]) and column g of b.
// Registers a[0], a[1] and b[0] have the q-th pair (TF32: number) of the first half of the depth, the others of the
// second half.
template <Arithmetic arithmetic>
void multiply_matrices(float* upper, float* lower, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    constexpr int kPerWord = arithmetic == Arithmetic::kTensorFloat32 ? 1 : 2;
    const auto* lanes = emulation::exchange(Operands{{a[0], a[1], a[2], a[3]}, {b0, b1}});
    const int g = emulation::lane() / 4, q = emulation::lane() % 4;
    for (int half = 0; half < 2; ++half) {
        for (int column = 0; column < 2; ++column) {
            float& sum = (half == 0 ? upper : lower)[column];
            double total = sum;
            for (int k = 0; k < 8 * kPerWord; ++k) {
                const int part = k / (4 * kPerWord), owner = k / kPerWord % 4, place = k % kPerWord;
                const double left = operand<arithmetic>(lanes[4 * g + owner].a[2 * part + half], place);
                total += left * operand<arithmetic>(lanes[4 * (2 * q + column) + owner].b[part], place);
            }
            sum = static_cast<float>(total);
        }
    }
}

inline uint32_t load_byte(const void* p) { return emulation::load<uint8_t>(p); }
inline uint32_t load_short(const void* p) { return emulation::load<uint16_t>(p); }
inline uint32_t load_word(const void* p) { return emulation::load<uint32_t>(p); }
inline uint2 load_two_words(const void* p) { return emulation::load<uint2>(p); }
inline uint4 load_four_words(const void* p) { return emulation::load<uint4>(p); }
inline void store_short(void* p, uint32_t word) { emulation::store(p, static_cast<uint16_t>(word)); }
inline void store_word(void* p, uint32_t word) { emulation::store(p, word); }
inline void store_four_words(void* p, uint4 words) { emulation::store(p, words); }

}  // namespace beit_fast::cuda
