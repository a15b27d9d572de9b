#pragma once

#include "cuda/patch_embed/epilogue.cuh"
#include "cuda/patch_embed/gather.cuh"
#include "cuda/patch_embed/multiply.cuh"

namespace beit_fast::cuda {

template <class Tile>
struct alignas(128) SharedMemory {
    static constexpr int kPixelStage = Tile::kSlabs * Tile::kRows * kSlabBytes;
    static constexpr int kWeightStage = Tile::kSlabs * Tile::kColumns * kSlabBytes;

    char pixels[kPixelStages][kPixelStage];
    char weights[kWeightStages][kWeightStage];
    PatchRow rows[Tile::kRows];
    Normalization normalization[kMaxChannels];
};

// Tokens of one tile of patches x embedding columns: block i has the patches of tile i / column_tiles. While one
// step is multiplied, pixels of the next step pass through registers, and weights of the next two through cp.async.
template <Arithmetic arithmetic, class Tile>
__global__ void __launch_bounds__(kThreads, Tile::kResidentBlocks)
    patch_embed_kernel(const __grid_constant__ Arguments arguments) {
    using Memory = SharedMemory<Tile>;
    static_assert(4 * TokenWriter<Tile>::kWarpBytes <= sizeof(Memory::pixels) + sizeof(Memory::weights));
    constexpr uint32_t kDepth = Tile::kSlabs * kChunks * vector_length(arithmetic);
    __shared__ Memory memory;

    const uint32_t row_tile = arguments.column_tiles.quotient(blockIdx.x);
    const int64_t first_row = static_cast<int64_t>(row_tile) * Tile::kRows;
    const uint32_t column_tile = blockIdx.x - row_tile * arguments.column_tiles.value;
    const int32_t first_column = static_cast<int32_t>(column_tile) * Tile::kColumns;
    const uint32_t warp = threadIdx.x / 32;
    const uint32_t warp_row = warp / 2 * Tile::kWarpRows;
    const uint32_t warp_column = warp % 2 * Tile::kWarpColumns;

    if (threadIdx.x < Tile::kRows) memory.rows[threadIdx.x] = find_patch(arguments, first_row + threadIdx.x);
    if (arguments.pixels.normalized && threadIdx.x < arguments.pixels.channels.value) {
        memory.normalization[threadIdx.x] = {arguments.mean[threadIdx.x], arguments.inverse_std[threadIdx.x]};
    }
    __syncthreads();

    const uint32_t steps = (arguments.depth + kDepth - 1) / kDepth;
    for (uint32_t step = 0; step < kWeightStages - 1; ++step) {
        if (step < steps) copy_weights<arithmetic, Tile>(arguments, memory.weights[step], first_column, step * kDepth);
        commit_copies();
    }
    PixelGather<arithmetic, Tile> gather(arguments, memory.rows, memory.normalization);
    gather.load(0);
    gather.store(memory.pixels[0], 0);
    Sums<Tile> sums;
    clear(sums);

    uint32_t stage = 0;
    uint32_t free_stage = kWeightStages - 1;
#pragma unroll 1
    for (uint32_t step = 0; step < steps; ++step) {
        wait_for_copies<kWeightStages - 2>();
        __syncthreads();  // this step's stages are filled, the last step's are free
        const uint32_t ahead = step + kWeightStages - 1;
        if (ahead < steps) {
            copy_weights<arithmetic, Tile>(arguments, memory.weights[free_stage], first_column, ahead * kDepth);
        }
        commit_copies();
        if (step + 1 < steps) gather.load((step + 1) * kDepth);
        const char* pixels = memory.pixels[step % kPixelStages];
        multiply_slabs<arithmetic>(sums, pixels, memory.weights[stage], warp_row, warp_column);
        if (step + 1 < steps) gather.store(memory.pixels[(step + 1) % kPixelStages], (step + 1) * kDepth);
        free_stage = stage;
        stage = stage + 1 == kWeightStages ? 0 : stage + 1;
    }
    wait_for_copies<0>();
    __syncthreads();

    char* scratch = memory.pixels[0] + warp * TokenWriter<Tile>::kWarpBytes;
    const int32_t own_column = first_column + static_cast<int32_t>(warp_column);
    TokenWriter<Tile>(arguments, scratch, memory.rows + warp_row, own_column).write(sums);
}

}  // namespace beit_fast::cuda
