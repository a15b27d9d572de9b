// beit_fast::rel_pos_attention and its backward on the CPU: checks, allocation, threads.
#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/attention/kernels.h"
#include "cpu/isa.h"
#include "errors.h"

namespace beit_fast {

namespace {

using torch::headeronly::ScalarType;
using Window = std::vector<int64_t>;

const AttentionKernels& kernels_of(Scalar type) {
#define BEIT_FAST_ADDRESS(isa) &isa::attention_kernels,
    static constexpr const AttentionKernels* kernels[] = {BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_ADDRESS)};
#undef BEIT_FAST_ADDRESS
    const Isa isa = current_isa();
    return type == Scalar::f64 ? attention_kernels_f64 : *kernels[static_cast<size_t>(isa)];
}

Scalar scalar_of(const Tensor& tensor) {
    switch (tensor.scalar_type()) {
        case ScalarType::Double: return Scalar::f64;
        case ScalarType::Float: return Scalar::f32;
        case ScalarType::BFloat16: return Scalar::bf16;
        default: return Scalar::f16;
    }
}

struct Inputs {
    const Tensor &q, &k, &v;
    const OptionalTensor &table, &key_mask;
    const Window& window;
    double dropout_p;
    int64_t seed;
};

std::vector<int64_t> shape_of(const Tensor& tensor) { return {tensor.sizes().begin(), tensor.sizes().end()}; }

void check_bias(const char* name, const Inputs& x) {
    const auto expect = [&](bool condition, const char* expected) { require(condition, name, expected); };
    expect(x.window.size() == 2 && x.window[0] > 0 && x.window[1] > 0, "window of two positive numbers");
    const int64_t height = x.window[0], width = x.window[1], patches = x.q.size(1) - 1;
    expect(height <= patches && width <= patches && height * width == patches, "window of N - 1 patches");
    const int64_t rows = (2 * height - 1) * (2 * width - 1) + 3;
    expect(is_float(x.table->scalar_type()) && has_shape(*x.table, {rows, x.q.size(2)}),
           "table in floating point, [(2 * height - 1) * (2 * width - 1) + 3, H]");
}

void check(const char* name, const Inputs& x) {
    const auto expect = [&](bool condition, const char* expected) { require(condition, name, expected); };
    const std::vector<int64_t> shape = shape_of(x.q);
    expect(shape.size() == 4 && has_shape(x.k, shape) && has_shape(x.v, shape), "q, k and v of shape [B, N, H, D]");
    expect(shape[1] > 0 && shape[3] > 0, "N and D above 0");
    const ScalarType type = x.q.scalar_type();
    expect(is_float(type) && x.k.scalar_type() == type && x.v.scalar_type() == type,
           "q, k and v of one floating-point dtype");
    expect(on_one_device({&x.q, &x.k, &x.v, pointer_to(x.table), pointer_to(x.key_mask)}), "tensors on one device");
    expect(!x.key_mask || x.key_mask->scalar_type() == ScalarType::Bool, "key_mask in bool");
    expect(!x.key_mask || has_shape(*x.key_mask, {shape[0], shape[1]}), "key_mask [B, N]");
    expect(x.dropout_p >= 0.0 && x.dropout_p < 1.0, "dropout_p in [0, 1)");
    expect(x.seed >= 0, "seed in [0, 2**63)");
    if (x.table) check_bias(name, x);
}

TokensView view_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

void describe(AttentionParams& params, const Inputs& x, double scale) {
    params.batch = x.q.size(0);
    params.tokens = x.q.size(1);
    params.heads = x.q.size(2);
    params.head_dim = x.q.size(3);
    params.type = scalar_of(x.q);
    params.q = view_of(x.q);
    params.k = view_of(x.k);
    params.v = view_of(x.v);
    if (x.table) {
        params.window_height = x.window[0];
        params.window_width = x.window[1];
        params.table = {x.table->const_data_ptr(), scalar_of(*x.table), x.table->stride(0), x.table->stride(1)};
    }
    if (x.key_mask) {
        const auto* mask = static_cast<const uint8_t*>(x.key_mask->const_data_ptr());
        params.key_mask = {mask, x.key_mask->stride(0), x.key_mask->stride(1)};
    }
    params.scale = scale;
    params.dropout_p = x.dropout_p;
    params.seed = static_cast<uint64_t>(x.seed);
}

Tensor empty(std::vector<int64_t> sizes, ScalarType type) {
    return torch::stable::empty(sizes, type, std::nullopt, torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

ScalarType sum_type(const Tensor& q) {
    return q.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

std::tuple<Tensor, Tensor> forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& table,
                                   const OptionalTensor& key_mask, const Window& window, double scale, double dropout_p,
                                   int64_t seed) {
    const Inputs inputs{q, k, v, table, key_mask, window, dropout_p, seed};
    check("rel_pos_attention", inputs);
    Tensor out = empty(shape_of(q), q.scalar_type());
    Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, sum_type(q));
    if (out.numel() == 0) return {out, lse};
    ForwardParams params;
    describe(params, inputs, scale);
    params.out = out.mutable_data_ptr();
    params.lse = lse.mutable_data_ptr();
    const AttentionKernels& kernels = kernels_of(params.type);
    torch::stable::parallel_for(0, kernels.forward_items(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.forward(params, begin, end); });
    return {out, lse};
}

void check_backward(const char* name, const Inputs& x, const Tensor& grad_out, const Tensor& out, const Tensor& lse) {
    check(name, x);
    for (const Tensor* tensor : {&grad_out, &out}) {
        require(has_shape(*tensor, shape_of(x.q)) && tensor->scalar_type() == x.q.scalar_type(), name,
                "grad_out and out with the shape and dtype of q");
    }
    require(has_shape(lse, {x.q.size(0), x.q.size(2), x.q.size(1)}) && lse.scalar_type() == sum_type(x.q), name,
            "lse in fp32 (fp64 for fp64), [B, H, N]");
    require(on_one_device({&x.q, &grad_out, &out, &lse}), name, "tensors on one device");
}

// How many items share the keys of a head. It depends on sizes alone, so that results do not depend on threads.
int64_t num_splits_of(const AttentionParams& params) {
    constexpr int64_t kItems = 32, kLeastKeys = 256, kMostSplits = 4;
    const int64_t wanted = (kItems + params.batch * params.heads - 1) / (params.batch * params.heads);
    return std::max<int64_t>(1, std::min({wanted, params.tokens / kLeastKeys, kMostSplits}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const OptionalTensor& table,
                                                    const OptionalTensor& key_mask, const Tensor& out,
                                                    const Tensor& lse, const Window& window, double scale,
                                                    double dropout_p, int64_t seed,
                                                    const std::vector<bool>& output_mask) {
    const Inputs inputs{q, k, v, table, key_mask, window, dropout_p, seed};
    check_backward("rel_pos_attention_backward", inputs, grad_out, out, lse);
    const std::vector<int64_t> sizes = shape_of(q);
    const auto gradient = [&](size_t index) {
        return empty(output_mask[index] ? sizes : std::vector<int64_t>{0}, q.scalar_type());
    };
    Tensor grad_q = gradient(0), grad_k = gradient(1), grad_v = gradient(2);
    const bool needs_table = output_mask[3] && table;
    const ScalarType table_type = table ? table->scalar_type() : q.scalar_type();
    Tensor grad_table = needs_table ? empty({table->size(0), table->size(1)}, table_type) : empty({0}, table_type);
    if (q.numel() == 0) {
        if (needs_table) torch::stable::zero_(grad_table);
        return {grad_q, grad_k, grad_v, grad_table};
    }
    BackwardParams params;
    describe(params, inputs, scale);
    params.grad_out = view_of(grad_out);
    params.out = view_of(out);
    params.lse = lse.const_data_ptr();
    params.lse_batch_stride = lse.stride(0);
    params.lse_head_stride = lse.stride(1);
    params.lse_token_stride = lse.stride(2);
    if (output_mask[0]) params.grad_q = grad_q.mutable_data_ptr();
    if (output_mask[1]) params.grad_k = grad_k.mutable_data_ptr();
    if (output_mask[2]) params.grad_v = grad_v.mutable_data_ptr();
    params.num_splits = num_splits_of(params);
    std::optional<Tensor> partial_q, partial_table;
    if (output_mask[0] && params.num_splits > 1) {
        partial_q = empty({params.num_splits, sizes[0], sizes[1], sizes[2], sizes[3]}, sum_type(q));
        params.partial_grad_q = partial_q->mutable_data_ptr();
    }
    if (needs_table) {
        partial_table = empty({sizes[2], sizes[0], params.num_splits, table->size(0)}, sum_type(q));
        params.partial_grad_table = partial_table->mutable_data_ptr();
        params.grad_table = grad_table.mutable_data_ptr();
    }
    const AttentionKernels& kernels = kernels_of(params.type);
    torch::stable::parallel_for(0, kernels.backward_items(params), 1,
                                [&](int64_t begin, int64_t end) { kernels.backward(params, begin, end); });
    if (partial_q || partial_table) {
        torch::stable::parallel_for(0, params.heads, 1,
                                    [&](int64_t begin, int64_t end) { kernels.reduce(params, begin, end); });
    }
    return {grad_q, grad_k, grad_v, grad_table};
}

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CPU, m) {
    m.impl("rel_pos_attention", TORCH_BOX(&forward));
    m.impl("rel_pos_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace beit_fast
