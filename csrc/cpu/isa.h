// Which instruction set the kernels use.
#pragma once

#include <vector>

namespace beit_fast {

enum class Isa { portable, avx2, avx512, avx512_bf16, amx };

const char* isa_name(Isa isa);

// The instruction sets that were compiled and that this machine runs, oldest first.
const std::vector<Isa>& available_isas();

// The newest one, or the one that BEIT_FAST_CPU_ISA names. Throws std::invalid_argument where that is not available.
Isa current_isa();

}  // namespace beit_fast
