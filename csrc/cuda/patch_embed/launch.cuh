#pragma once

#include "cuda/patch_embed/arguments.cuh"

namespace beit_fast::cuda {

// Starts the kernel on the current stream of `device`, which is the current one. half.cu and single.cu
// instantiate it, so that kernels compile in parallel.
template <Arithmetic arithmetic>
void launch(Arguments& arguments, bool large, int32_t device);

}  // namespace beit_fast::cuda
