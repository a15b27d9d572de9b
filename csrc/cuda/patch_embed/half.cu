#include "cuda/patch_embed/launch_tiles.cuh"

namespace beit_fast::cuda {

template void launch<Arithmetic::kFloat16>(Arguments&, bool, int32_t);
template void launch<Arithmetic::kBFloat16>(Arguments&, bool, int32_t);

}  // namespace beit_fast::cuda
