#pragma once

#include "cuda/patch_embed/device.cuh"
#include "cuda/patch_embed/kernel.cuh"
#include "cuda/patch_embed/launch.cuh"
#include "cuda/patch_embed/plan.cuh"

namespace beit_fast::cuda {

template <Arithmetic arithmetic, class Tile>
void launch_tiles(Arguments& arguments, int32_t device) {
    const int64_t blocks = plan_tiles<Tile>(arguments);
    STD_TORCH_CHECK(blocks < int64_t{1} << 31, "patch_embed has ", blocks, " tiles, more than a grid holds");
    const auto grid = static_cast<unsigned>(blocks);
    patch_embed_kernel<arithmetic, Tile><<<grid, kThreads, 0, current_stream(device)>>>(arguments);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
}

template <Arithmetic arithmetic>
void launch(Arguments& arguments, bool large, int32_t device) {
    return large ? launch_tiles<arithmetic, LargeTile>(arguments, device)
                 : launch_tiles<arithmetic, SmallTile>(arguments, device);
}

}  // namespace beit_fast::cuda
