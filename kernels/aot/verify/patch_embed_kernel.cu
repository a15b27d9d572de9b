// One kernel of patch embedding: ARITHMETIC and TILE are given to the compiler. The library instantiates the same
// kernels with their launcher, whose headers of torch take most of the time.
#include "cuda/patch_embed/kernel.cuh"

namespace beit_fast::cuda {

template __global__ void patch_embed_kernel<Arithmetic::ARITHMETIC, TILE>(const __grid_constant__ Arguments);

}  // namespace beit_fast::cuda
