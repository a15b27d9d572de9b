// beit_fast::rel_pos_attention and its backward on the CPU: what they accept, what they allocate, how they are divided.
#include <array>
#include <cmath>
#include <optional>
#include <string>
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
using Problems = std::vector<std::string>;

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

bool same_shape(const Tensor& a, const Tensor& b) {
    if (a.dim() != b.dim()) return false;
    for (int64_t i = 0; i < a.dim(); ++i) {
        if (a.size(i) != b.size(i)) return false;
    }
    return true;
}

struct Inputs {
    const Tensor &q, &k, &v;
    const OptionalTensor &table, &key_mask;
    const Window& window;
    double dropout_p;
    int64_t seed;
};

// The reasons and their words are those of beit_fast/validation.py.
void check_tensors(const Inputs& x, Problems& problems) {
    const bool four = x.q.dim() == 4;
    if (!four || !same_shape(x.k, x.q) || !same_shape(x.v, x.q)) {
        problems.push_back("q, k and v must have one shape [B, N, H, D]");
    } else if (x.q.size(1) == 0 || x.q.size(3) == 0) {
        problems.push_back("q, k and v must have at least one token and one number a head");
    }
    if (!is_float(x.q.scalar_type()) || x.k.scalar_type() != x.q.scalar_type() || x.v.scalar_type() != x.q.scalar_type()) {
        problems.push_back("q, k and v must have one floating-point dtype");
    }
    bool elsewhere = x.k.device() != x.q.device() || x.v.device() != x.q.device();
    for (const OptionalTensor* tensor : {&x.table, &x.key_mask}) {
        elsewhere |= tensor->has_value() && (*tensor)->device() != x.q.device();
    }
    if (elsewhere) problems.push_back("all tensors must be on one device");
    if (x.key_mask && (x.key_mask->scalar_type() != ScalarType::Bool || x.key_mask->dim() != 2)) {
        problems.push_back("key_mask must be bool [B, N], True where a key may be attended to");
    } else if (x.key_mask && four && (x.key_mask->size(0) != x.q.size(0) || x.key_mask->size(1) != x.q.size(1))) {
        problems.push_back("key_mask must be [B, N] = " + shape_text(std::array{x.q.size(0), x.q.size(1)}));
    }
    if (x.table && (x.table->dim() != 2 || !is_float(x.table->scalar_type()))) {
        problems.push_back("table must be a floating-point matrix [rows, H]");
    } else if (x.table && four && x.table->size(1) != x.q.size(2)) {
        problems.push_back("table must have one column for each of the " + std::to_string(x.q.size(2)) + " heads");
    }
}

std::string tuple_text(const Window& window) {
    std::string text = shape_text(window);
    text.front() = '(';
    text.back() = ')';
    if (window.size() == 1) text.insert(text.end() - 1, ',');
    return text;
}

void check_window(const Inputs& x, Problems& problems) {
    if (!x.table || x.q.dim() != 4 || x.table->dim() != 2) return;
    const Window& window = x.window;
    if (window.size() != 2 || window[0] < 1 || window[1] < 1) {
        problems.push_back("window must be two positive numbers (height, width) of patches, not " + tuple_text(window));
        return;
    }
    const int64_t tokens = window[0] * window[1] + 1, rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3;
    const auto complain = [&](int64_t wanted, const char* what, int64_t given) {
        problems.push_back("a window " + tuple_text(window) + " has " + std::to_string(wanted) + " " + what + ", not " +
                           std::to_string(given));
    };
    if (tokens != x.q.size(1)) complain(tokens, "tokens", x.q.size(1));
    if (rows != x.table->size(0)) complain(rows, "table rows", x.table->size(0));
}

std::string python_number(double value) {
    char text[40];
    for (int digits = 1; digits <= 17; ++digits) {
        std::snprintf(text, sizeof(text), "%.*g", digits, value);
        if (std::strtod(text, nullptr) == value) break;
    }
    std::string number = text;
    if (number.find_first_of(".en") == std::string::npos) number += ".0";
    return number;
}

void check(const Inputs& x, Problems& problems) {
    check_tensors(x, problems);
    check_window(x, problems);
    if (!(x.dropout_p >= 0.0 && x.dropout_p < 1.0)) {
        problems.push_back("dropout_p is " + python_number(x.dropout_p) + ", not in [0, 1)");
    }
    if (x.seed < 0) problems.push_back("seed is " + std::to_string(x.seed) + ", not in [0, 2**63)");
}

TokensView view_of(const Tensor& tensor) {
    return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

void describe(AttentionProblem& problem, const Inputs& x, double scale) {
    problem.batch = x.q.size(0);
    problem.tokens = x.q.size(1);
    problem.heads = x.q.size(2);
    problem.head_dim = x.q.size(3);
    problem.type = scalar_of(x.q);
    problem.q = view_of(x.q);
    problem.k = view_of(x.k);
    problem.v = view_of(x.v);
    if (x.table) {
        problem.window_height = x.window[0];
        problem.window_width = x.window[1];
        problem.table = {x.table->const_data_ptr(), scalar_of(*x.table), x.table->stride(0), x.table->stride(1)};
    }
    if (x.key_mask) {
        const auto* mask = static_cast<const uint8_t*>(x.key_mask->const_data_ptr());
        problem.key_mask = {mask, x.key_mask->stride(0), x.key_mask->stride(1)};
    }
    problem.scale = scale;
    problem.dropout_p = x.dropout_p;
    problem.seed = static_cast<uint64_t>(x.seed);
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
    Problems problems;
    check(inputs, problems);
    if (!problems.empty()) {
        raise_problems("rel_pos_attention", problems,
                       {{"q", &q}, {"k", &k}, {"v", &v}, {"table", pointer_to(table)},
                        {"key_mask", pointer_to(key_mask)}});
    }
    Tensor out = empty({q.size(0), q.size(1), q.size(2), q.size(3)}, q.scalar_type());
    Tensor lse = empty({q.size(0), q.size(2), q.size(1)}, sum_type(q));
    if (out.numel() == 0) return {out, lse};
    ForwardProblem problem;
    describe(problem, inputs, scale);
    problem.out = out.mutable_data_ptr();
    problem.lse = lse.mutable_data_ptr();
    const AttentionKernels& kernels = kernels_of(problem.type);
    torch::stable::parallel_for(0, kernels.forward_items(problem), 1,
                                [&](int64_t begin, int64_t end) { kernels.forward(problem, begin, end); });
    return {out, lse};
}

void check_backward(const Inputs& x, const Tensor& grad_out, const Tensor& out, const Tensor& lse, Problems& problems) {
    check(x, problems);
    for (const auto& [name, tensor] : {Argument{"grad_out", &grad_out}, Argument{"out", &out}}) {
        if (!same_shape(*tensor, x.q) || tensor->scalar_type() != x.q.scalar_type()) {
            problems.push_back(std::string(name) + " must have the shape and dtype of q");
        }
    }
    const bool fits = x.q.dim() == 4 && lse.dim() == 3 && lse.size(0) == x.q.size(0) && lse.size(1) == x.q.size(2) &&
                      lse.size(2) == x.q.size(1);
    if (lse.scalar_type() != sum_type(x.q) || !fits) {
        problems.push_back("lse must be " + dtype_name(sum_type(x.q)) + " [B, H, N]");
    }
    if (grad_out.device() != x.q.device() || out.device() != x.q.device() || lse.device() != x.q.device()) {
        problems.push_back("grad_out, out and lse must be on the device of q");
    }
}

// In how many parts the keys of a head are worked on. It follows from sizes alone, so that results do.
int64_t key_parts_of(const AttentionProblem& problem) {
    constexpr int64_t kItems = 32, kLeastKeys = 256, kMostParts = 4;
    const int64_t wanted = (kItems + problem.batch * problem.heads - 1) / (problem.batch * problem.heads);
    return std::max<int64_t>(1, std::min({wanted, problem.tokens / kLeastKeys, kMostParts}));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                    const Tensor& v, const OptionalTensor& table,
                                                    const OptionalTensor& key_mask, const Tensor& out,
                                                    const Tensor& lse, const Window& window, double scale,
                                                    double dropout_p, int64_t seed,
                                                    const std::vector<bool>& output_mask) {
    const Inputs inputs{q, k, v, table, key_mask, window, dropout_p, seed};
    Problems problems;
    check_backward(inputs, grad_out, out, lse, problems);
    if (!problems.empty()) {
        raise_problems("rel_pos_attention_backward", problems,
                       {{"grad_out", &grad_out}, {"q", &q}, {"k", &k}, {"v", &v}, {"table", pointer_to(table)},
                        {"key_mask", pointer_to(key_mask)}, {"out", &out}, {"lse", &lse}});
    }
    const std::vector<int64_t> sizes = {q.size(0), q.size(1), q.size(2), q.size(3)};
    const auto gradient = [&](size_t place) {
        return empty(output_mask[place] ? sizes : std::vector<int64_t>{0}, q.scalar_type());
    };
    Tensor grad_q = gradient(0), grad_k = gradient(1), grad_v = gradient(2);
    const bool wants_table = output_mask[3] && table;
    const ScalarType table_type = table ? table->scalar_type() : q.scalar_type();
    Tensor grad_table = wants_table ? empty({table->size(0), table->size(1)}, table_type) : empty({0}, table_type);
    if (q.numel() == 0) {
        if (wants_table) torch::stable::zero_(grad_table);
        return {grad_q, grad_k, grad_v, grad_table};
    }
    BackwardProblem problem;
    describe(problem, inputs, scale);
    problem.grad_out = view_of(grad_out);
    problem.out = view_of(out);
    problem.lse = lse.const_data_ptr();
    problem.lse_batch_stride = lse.stride(0);
    problem.lse_head_stride = lse.stride(1);
    problem.lse_token_stride = lse.stride(2);
    if (output_mask[0]) problem.grad_q = grad_q.mutable_data_ptr();
    if (output_mask[1]) problem.grad_k = grad_k.mutable_data_ptr();
    if (output_mask[2]) problem.grad_v = grad_v.mutable_data_ptr();
    problem.key_parts = key_parts_of(problem);
    std::optional<Tensor> partial_q, partial_table;
    if (output_mask[0] && problem.key_parts > 1) {
        partial_q = empty({problem.key_parts, sizes[0], sizes[1], sizes[2], sizes[3]}, sum_type(q));
        problem.partial_grad_q = partial_q->mutable_data_ptr();
    }
    if (wants_table) {
        partial_table = empty({sizes[2], sizes[0], problem.key_parts, table->size(0)}, sum_type(q));
        problem.partial_grad_table = partial_table->mutable_data_ptr();
        problem.grad_table = grad_table.mutable_data_ptr();
    }
    const AttentionKernels& kernels = kernels_of(problem.type);
    torch::stable::parallel_for(0, kernels.backward_items(problem), 1,
                                [&](int64_t begin, int64_t end) { kernels.backward(problem, begin, end); });
    if (partial_q || partial_table) {
        torch::stable::parallel_for(0, problem.heads, 1,
                                    [&](int64_t begin, int64_t end) { kernels.reduce(problem, begin, end); });
    }
    return {grad_q, grad_k, grad_v, grad_table};
}

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CPU, m) {
    m.impl("rel_pos_attention", TORCH_BOX(&forward));
    m.impl("rel_pos_attention_backward", TORCH_BOX(&backward));
}

}  // namespace
}  // namespace beit_fast
