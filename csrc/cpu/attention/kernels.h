// The attention kernels of one instruction set.
#pragma once

#include "cpu/attention/params.h"
#include "cpu/isa.h"

namespace beit_fast {

// Work is divided into items that are the same for any number of threads; a range of items runs on one thread.
struct AttentionKernels {
    int64_t (*forward_items)(const ForwardParams&);
    void (*forward)(const ForwardParams&, int64_t begin, int64_t end);
    int64_t (*backward_items)(const BackwardParams&);
    void (*backward)(const BackwardParams&, int64_t begin, int64_t end);
    // Sums the partial results of the backward for heads `begin` to `end`.
    void (*reduce)(const BackwardParams&, int64_t begin, int64_t end);
};

#define BEIT_FAST_DECLARE(isa)                         \
    namespace isa {                                    \
    extern const AttentionKernels attention_kernels;   \
    }
BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_DECLARE)
#undef BEIT_FAST_DECLARE

extern const AttentionKernels attention_kernels_f64;  // for checks: compiled once

}  // namespace beit_fast
