#include "cuda/patch_embed/launch_tiles.cuh"

namespace beit_fast::cuda {

template void launch<Arithmetic::kTensorFloat32>(Arguments&, bool, int32_t);
template void launch<Arithmetic::kFloat32>(Arguments&, bool, int32_t);

}  // namespace beit_fast::cuda
