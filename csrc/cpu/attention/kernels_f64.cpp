// The attention kernels of fp64, compiled once: fp64 is for checks.
#include "cpu/attention/kernels.h"
#include "cpu/attention/ranges.h"

namespace beit_fast {
namespace {

using Forward = VectorForward<PlainOperands<double>, 6>;

void forward(const ForwardParams& params, int64_t begin, int64_t end) {
    forward_on_vectors<Forward, double>(params, begin, end);
}

int64_t forward_items(const ForwardParams& params) {
    return params.heads * params.batch * query_blocks<Forward>(params);
}

void backward(const BackwardParams& params, int64_t begin, int64_t end) {
    backward_range<VectorProducts<double>>(params, begin, end);
}

void reduce(const BackwardParams& params, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) reduce_head<double>(params, head);
}

}  // namespace

const AttentionKernels attention_kernels_f64 = {forward_items, forward, backward_items, backward, reduce};

}  // namespace beit_fast
