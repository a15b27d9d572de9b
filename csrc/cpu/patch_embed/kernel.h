#pragma once

#include "cpu/isa.h"
#include "cpu/patch_embed/params.h"

namespace beit_fast::patch_embed {

#define BEIT_FAST_DECLARE(isa)                      \
    namespace isa {                                 \
    Kernel kernel_for(const Params& params);      \
    }
BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_DECLARE)
#undef BEIT_FAST_DECLARE

}  // namespace beit_fast::patch_embed
