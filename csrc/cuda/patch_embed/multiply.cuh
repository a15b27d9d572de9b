#pragma once

#include "cuda/patch_embed/instructions.cuh"

namespace beit_fast::cuda {

// A warp's sums. The thread with lane 4 * r + q has, in each fragment of 16 rows and 32 columns, rows r and r + 8 and
// columns 8 * q to 8 * q + 7, whichever arithmetic made them.
template <class Tile>
struct Sums {
    float of[Tile::kRowFragments][Tile::kColumnFragments][2][8];
};

template <class Tile>
__device__ __forceinline__ void clear(Sums<Tile>& sums) {
#pragma unroll
    for (int f = 0; f < Tile::kRowFragments; ++f) {
#pragma unroll
        for (int g = 0; g < Tile::kColumnFragments; ++g) {
#pragma unroll
            for (int e = 0; e < 16; ++e) sums.of[f][g][e / 8][e % 8] = 0.0f;
        }
    }
}

// sums += pixels * weights^T for one slab, on tensor cores. A product spans two chunks: 16 halves or 8 fp32 of depth.
template <Arithmetic arithmetic, class Tile>
__device__ __forceinline__ void multiply_matrix_slab(Sums<Tile>& sums, const char* pixels, const char* weights,
                                                     uint32_t warp_row, uint32_t warp_column) {
    const uint32_t lane = threadIdx.x % 32;
    const uint32_t row = warp_row + lane % 16;
    const uint32_t column = warp_column + fragment_column(lane / 16, lane % 8);
#pragma unroll
    for (int chunk = 0; chunk < kChunks; chunk += 2) {
        const char* own_pixels = pixels + pixel_place(row, chunk + lane / 16);
        const char* own_weights = weights + weight_place(column, chunk + lane / 8 % 2);
        uint32_t a[Tile::kRowFragments][4];
#pragma unroll
        for (int f = 0; f < Tile::kRowFragments; ++f) {
            load_matrices(a[f], own_pixels + 16 * f * kSlabBytes);
        }
#pragma unroll
        for (int g = 0; g < Tile::kColumnFragments; ++g) {
#pragma unroll
            for (int product = 0; product < 4; product += 2) {
                uint32_t b[4];
                load_matrices(b, own_weights + (32 * g + 2 * product) * kSlabBytes);
                if constexpr (arithmetic == Arithmetic::kTensorFloat32) {
#pragma unroll
                    for (int i = 0; i < 4; ++i) b[i] = round_to_tensor_float(bits_to_float(b[i]));
                }
#pragma unroll
                for (int f = 0; f < Tile::kRowFragments; ++f) {
                    float(&of)[2][8] = sums.of[f][g];
                    multiply_matrices<arithmetic>(&of[0][2 * product], &of[1][2 * product], a[f], b[0], b[1]);
                    multiply_matrices<arithmetic>(&of[0][2 * product + 2], &of[1][2 * product + 2], a[f], b[2], b[3]);
                }
            }
        }
    }
}

__device__ __forceinline__ float add_products(float sum, const float4& a, const float4& b) {
    return fmaf(a.w, b.w, fmaf(a.z, b.z, fmaf(a.y, b.y, fmaf(a.x, b.x, sum))));
}

// The same in fp32, a depth after the other.
template <class Tile>
__device__ __forceinline__ void multiply_single_slab(Sums<Tile>& sums, const char* pixels, const char* weights,
                                                     uint32_t warp_row, uint32_t warp_column) {
    const uint32_t row = warp_row + threadIdx.x % 32 / 4;
    const uint32_t column = warp_column + threadIdx.x % 4 * 8;
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
        const char* own_pixels = pixels + pixel_place(row, chunk);
        const char* own_weights = weights + weight_place(column, chunk);
        float4 a[Tile::kRowFragments][2];
#pragma unroll
        for (int f = 0; f < 2 * Tile::kRowFragments; ++f) {
            a[f / 2][f % 2] = *reinterpret_cast<const float4*>(own_pixels + 8 * f * kSlabBytes);
        }
#pragma unroll
        for (int g = 0; g < Tile::kColumnFragments; ++g) {
#pragma unroll
            for (int e = 0; e < 8; ++e) {
                const float4 b = *reinterpret_cast<const float4*>(own_weights + (32 * g + e) * kSlabBytes);
#pragma unroll
                for (int f = 0; f < 2 * Tile::kRowFragments; ++f) {
                    float& sum = sums.of[f / 2][g][f % 2][e];
                    sum = add_products(sum, a[f / 2][f % 2], b);
                }
            }
        }
    }
}

template <Arithmetic arithmetic, class Tile>
__device__ __forceinline__ void multiply_slabs(Sums<Tile>& sums, const char* pixels, const char* weights,
                                               uint32_t warp_row, uint32_t warp_column) {
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const char* slab_pixels = pixels + slab * Tile::kRows * kSlabBytes;
        const char* slab_weights = weights + slab * Tile::kColumns * kSlabBytes;
        if constexpr (arithmetic == Arithmetic::kFloat32) {
            multiply_single_slab(sums, slab_pixels, slab_weights, warp_row, warp_column);
        } else {
            multiply_matrix_slab<arithmetic>(sums, slab_pixels, slab_weights, warp_row, warp_column);
        }
    }
}

}  // namespace beit_fast::cuda
