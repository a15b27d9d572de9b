#pragma once

#include "cpu/patch_embed/params.h"

namespace beit_fast::patch_embed {

// One for each instruction set that was compiled; the caller knows that this machine has it.
namespace portable {
Kernel kernel_for(const Problem& problem);
}
namespace avx2 {
Kernel kernel_for(const Problem& problem);
}
namespace avx512 {
Kernel kernel_for(const Problem& problem);
}
namespace avx512_bf16 {
Kernel kernel_for(const Problem& problem);
}
namespace amx {
Kernel kernel_for(const Problem& problem);
}

}  // namespace beit_fast::patch_embed
