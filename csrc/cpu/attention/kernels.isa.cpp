// The attention kernels of fp32, bf16 and fp16, compiled once for each instruction set: BEIT_FAST_ISA is its name.
#include "cpu/attention/kernels.h"
#include "cpu/attention/ranges.h"

#if defined(__AMX_BF16__)
#include "cpu/attention/backward_amx.h"
#include "cpu/attention/forward_amx.h"
#endif

namespace beit_fast {
namespace {

// Calls `use` with a null pointer to the type of the kernel for `type`.
template <class Use>
auto choose_forward([[maybe_unused]] Scalar type, Use use) {
#if defined(__AMX_BF16__)
    if (type == Scalar::f32) return use(static_cast<AmxForward<3>*>(nullptr));
    if (type == Scalar::f16) return use(static_cast<AmxForward<2>*>(nullptr));
    return use(static_cast<AmxForward<1>*>(nullptr));
#else
#if defined(__AVX512BF16__)
    if (type == Scalar::bf16) return use(static_cast<VectorForward<PairOperands, 4>*>(nullptr));
#endif
    return use(static_cast<VectorForward<PlainOperands<float>, 6>*>(nullptr));
#endif
}

#if defined(__AMX_BF16__)
template <int kTerms>
void run_forward(AmxForward<kTerms>*, const ForwardParams& params, int64_t begin, int64_t end) {
    using Kernel = AmxForward<kTerms>;
    constexpr int kDegree = kTerms == 1 ? 4 : 5;
    const TileSession session;
    const auto run = [&](Kernel& kernel, const HeadBias<float>& bias, int64_t batch, int64_t head, int64_t query) {
        Softmax<float, 1, kDegree> softmax(params, bias);
        softmax.begin(batch, head, query);
        kernel.run(softmax, batch, head, query);
    };
    forward_range<Kernel, float>(params, begin, end, run);
}
#endif

template <class Operands, int kDegree>
void run_forward(VectorForward<Operands, kDegree>*, const ForwardParams& params, int64_t begin, int64_t end) {
    forward_on_vectors<VectorForward<Operands, kDegree>, typename Operands::Sum>(params, begin, end);
}

void forward(const ForwardParams& params, int64_t begin, int64_t end) {
    choose_forward(params.type, [&](auto* kernel) { run_forward(kernel, params, begin, end); });
}

int64_t forward_items(const ForwardParams& params) {
    return choose_forward(params.type, [&](auto* kernel) {
        return params.heads * params.batch * query_blocks<std::remove_pointer_t<decltype(kernel)>>(params);
    });
}

void backward(const BackwardParams& params, int64_t begin, int64_t end) {
#if defined(__AMX_BF16__)
    // fp32 needs six products and packed operands, which pays off from this number of tokens.
    constexpr int64_t kMany = 256;
    const TileSession session;
    const bool many = params.tokens > kMany;
    if (params.type == Scalar::f32 && many) return backward_range<AmxProducts<3>>(params, begin, end);
    if (params.type == Scalar::f16) return backward_range<AmxProducts<2>>(params, begin, end);
    if (params.type == Scalar::bf16) return backward_range<AmxProducts<1>>(params, begin, end);
#endif
    backward_range<VectorProducts<float>>(params, begin, end);
}

void reduce(const BackwardParams& params, int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) reduce_head<float>(params, head);
}

}  // namespace

const AttentionKernels BEIT_FAST_ISA::attention_kernels = {forward_items, forward, backward_items, backward, reduce};

}  // namespace beit_fast
