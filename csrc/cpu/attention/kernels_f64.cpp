// The attention kernels of fp64, which serves to check others: for every machine alike.
#include "cpu/attention/kernels.h"
#include "cpu/attention/ranges.h"

namespace beit_fast {
namespace {

using Forward = VectorForward<PlainOperands<double>, 6>;

void forward(const ForwardProblem& problem, int64_t begin, int64_t end) {
    forward_on_vectors<Forward, double>(problem, begin, end);
}

int64_t forward_items(const ForwardProblem& problem) {
    return problem.heads * problem.batch * query_blocks<Forward>(problem);
}

void backward(const BackwardProblem& problem, int64_t begin, int64_t end) {
    backward_range<VectorProducts<double>>(problem, begin, end);
}

void reduce(const BackwardProblem& problem, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) reduce_head<double>(problem, head);
}

}  // namespace

const AttentionKernels attention_kernels_f64 = {forward_items, forward, backward_items, backward, reduce};

}  // namespace beit_fast
