// The instruction sets that the library was compiled for, and the one in use.
//
// csrc/build.py has the list. It defines BEIT_FAST_FOR_EACH_ISA(X) as X(portable) X(avx2) ..., oldest first, with the
// instruction sets that the compiler knows.
#pragma once

#include <vector>

namespace beit_fast {

#define BEIT_FAST_ENUMERATOR(isa) isa,
enum class Isa { BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_ENUMERATOR) };
#undef BEIT_FAST_ENUMERATOR

const char* isa_name(Isa isa);

// The instruction sets that this machine supports, oldest first.
const std::vector<Isa>& available_isas();

// The newest one, or the one that BEIT_FAST_CPU_ISA names. Throws std::invalid_argument if that is not available.
Isa current_isa();

}  // namespace beit_fast
