// The arguments of the patch embedding kernel for one call, without CUDA and torch.
#include "cuda/patch_embed/plan.cuh"

#include <cstring>

using namespace beit_fast::cuda;

// Writes the kernel's argument and returns the number of blocks.
extern "C" int64_t plan_call(const Call* call, int arithmetic, bool large, void* output) {
    Arguments arguments = plan(*call, static_cast<Arithmetic>(arithmetic));
    const int64_t blocks = large ? plan_tiles<LargeTile>(arguments) : plan_tiles<SmallTile>(arguments);
    std::memcpy(output, &arguments, sizeof(arguments));
    return blocks;
}

extern "C" int64_t argument_bytes() { return sizeof(Arguments); }
