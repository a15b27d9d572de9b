#pragma once

#include "cpu/isa.h"
#include "cpu/linear/params.h"

namespace beit_fast::linear {

// The kernels of an instruction set. Each works on the thread that calls it.
struct Kernels {
    // Panels `begin` to `end` of the right operand, whose columns are the rows of `matrix`.
    void (*pack)(const Matrix& matrix, int64_t terms, uint32_t* packed, int64_t begin, int64_t end);
    // Splits pairs `begin` to `end` of the rows of a block, over the whole depth.
    void (*split)(const Params& params, const Block& block, int64_t begin, int64_t end);
    // Items `begin` to `end` of a block that was split, (panel, pair) of sums each, pairs fastest.
    void (*multiply)(const Params& params, const Block& block, int64_t begin, int64_t end);
    // Splits and multiplies a block, chunk after chunk; its words have room for the largest chunk.
    void (*run)(const Params& params, const Block& block);
};

// Null for an instruction set without tiles.
#define BEIT_FAST_DECLARE(isa)               \
    namespace isa {                          \
    extern const Kernels* const kernels;     \
    }
BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_DECLARE)
#undef BEIT_FAST_DECLARE

}  // namespace beit_fast::linear
