#pragma once

#include "cpu/linear/params.h"

namespace beit_fast::linear {

// The kernels of the one instruction set that has them. Each works on the thread that calls it.
struct Kernels {
    // Panels `begin` to `end` of the right operand, whose columns are the rows of `matrix`.
    void (*pack)(const Matrix& matrix, int64_t parts, uint32_t* packed, int64_t begin, int64_t end);
    // Pairs `begin` to `end` of a block's rows into parts, over the whole depth.
    void (*split)(const Problem& problem, const Block& block, int64_t begin, int64_t end);
    // Items `begin` to `end` of a block that was split, (panel, pair) of sums each, pairs fastest.
    void (*multiply)(const Problem& problem, const Block& block, int64_t begin, int64_t end);
    // All that a block takes; its parts have room for the largest chunk of the depth.
    void (*run)(const Problem& problem, const Block& block);
};

namespace amx {
extern const Kernels kernels;
}

}  // namespace beit_fast::linear
