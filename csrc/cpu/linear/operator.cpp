#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <memory>
#include <stdexcept>
#include <string>

#include "cpu/isa.h"
#include "cpu/linear/kernels.h"
#include "cpu/memory.h"
#include "errors.h"

namespace beit_fast::linear {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

namespace {

constexpr int64_t block_bytes = 1 << 20;  // parts of rows that stay in a core's second cache beside two panels
constexpr int64_t least_work = 1 << 15;   // multiplications that are worth a thread

using Problems = std::vector<std::string>;

// The kernels of the instruction set in use, or null.
const Kernels* current_kernels() {
#define BEIT_FAST_KERNELS(isa) isa::kernels,
    static const Kernels* const kernels[] = {BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_KERNELS)};
#undef BEIT_FAST_KERNELS
    return kernels[static_cast<size_t>(current_isa())];
}

// Why there are no kernels for this machine; empty if there are.
std::string unsupported_reason() {
    if (current_kernels() != nullptr) return "";
    return std::string("the instruction set is ") + isa_name(current_isa()) + ", and only amx has tiles";
}

const Kernels& kernels() { return *current_kernels(); }

bool is_fp32(const Tensor& tensor) { return tensor.scalar_type() == ScalarType::Float; }

void check_parts(int64_t parts, Problems& problems) {
    if (parts != 2 && parts != 3) problems.push_back("parts is " + std::to_string(parts) + ", not 2 or 3");
    if (const std::string reason = unsupported_reason(); !reason.empty()) problems.push_back(reason);
}

void check_matrix(const Tensor& matrix, Problems& problems) {
    if (matrix.dim() != 2) problems.push_back("matrix must be [N, K], or [K, N] where it is transposed");
    if (!is_fp32(matrix)) problems.push_back("matrix must be float32");
}

// The rows of a [N, K] tensor, or of a [K, N] one that is transposed.
Matrix matrix_of(const Tensor& matrix, bool transposed) {
    const int rows = transposed ? 1 : 0, depth = 1 - rows;
    return {static_cast<const float*>(matrix.const_data_ptr()), matrix.size(rows), matrix.size(depth),
            matrix.stride(rows), matrix.stride(depth)};
}

int64_t panel_words_of(const Matrix& matrix, int64_t parts) { return matrix.steps() * parts * pair_words; }

void pack_into(const Matrix& matrix, int64_t parts, uint32_t* words) {
    const int64_t grain = ceil_divide(least_work, std::max<int64_t>(1, panel_words_of(matrix, parts) * 4));
    parallel_for(0, matrix.pairs(), grain, [&](int64_t begin, int64_t end) {
        kernels().pack(matrix, parts, words, begin, end);
    });
}

Tensor pack_parts(Tensor matrix, bool transposed, int64_t parts) {
    Problems problems;
    check_matrix(matrix, problems);
    check_parts(parts, problems);
    if (!problems.empty()) raise_problems("_pack_parts", problems, {{"matrix", &matrix}});

    const Matrix view = matrix_of(matrix, transposed);
    const std::vector<int64_t> shape{view.pairs(), panel_words_of(view, parts) * 4};
    const Tensor packed = torch::stable::new_empty(matrix, shape, ScalarType::Byte);
    if (packed.numel() > 0) pack_into(view, parts, static_cast<uint32_t*>(packed.mutable_data_ptr()));
    return packed;
}

struct Arguments {
    const Tensor& x;
    const Tensor& packed;
    int64_t out_features, parts;
    const OptionalTensor& bias;
    const OptionalTensor& residual;

    std::vector<int64_t> output_shape() const {
        std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
        shape.back() = out_features;
        return shape;
    }
};

void check_packed(const Arguments& given, Problems& problems) {
    const int64_t panels = ceil_divide(std::max<int64_t>(given.out_features, 0), pair_side);
    const int64_t bytes = ceil_divide(given.x.size(-1), step_depth) * given.parts * pair_words * 4;
    const Tensor& packed = given.packed;
    if (packed.scalar_type() != ScalarType::Byte || packed.dim() != 2 || !packed.is_contiguous() ||
        packed.size(0) != panels || packed.size(1) != bytes) {
        problems.push_back("packed must be what _pack_parts makes of [" + std::to_string(given.out_features) + ", " +
                           std::to_string(given.x.size(-1)) + "] in " + std::to_string(given.parts) + " parts, uint8 " +
                           shape_text(std::vector<int64_t>{panels, bytes}));
    }
}

void check(const Arguments& given) {
    Problems problems;
    if (given.x.dim() == 0) problems.push_back("x must be [..., K]");
    for (const auto& [name, tensor] : {Argument{"x", &given.x}, {"bias", pointer_to(given.bias)},
                                       {"residual", pointer_to(given.residual)}}) {
        if (tensor != nullptr && !is_fp32(*tensor)) problems.push_back(std::string(name) + " must be float32");
    }
    if (given.out_features < 0) problems.push_back("out_features must not be negative");
    check_parts(given.parts, problems);
    if (given.x.dim() > 0) {
        check_packed(given, problems);
        const std::vector<int64_t> shape = given.output_shape();
        if (given.residual && !given.residual->sizes().equals(shape)) {
            problems.push_back("residual must be [..., N] = " + shape_text(shape));
        }
    }
    if (given.bias && (given.bias->dim() != 1 || given.bias->size(0) != given.out_features)) {
        problems.push_back("bias must be [N] = [" + std::to_string(given.out_features) + "]");
    }
    for (const Tensor* tensor : {&given.packed, pointer_to(given.bias), pointer_to(given.residual)}) {
        if (tensor != nullptr && !(tensor->device() == given.x.device())) {
            problems.push_back("all tensors must be on one device");
            break;
        }
    }
    if (problems.empty()) return;
    raise_problems("_linear_parts", problems,
                   {{"x", &given.x}, {"packed", &given.packed}, {"bias", pointer_to(given.bias)},
                    {"residual", pointer_to(given.residual)}});
}

// The stride of rows where all leading dimensions of [..., K] step through rows evenly.
std::optional<int64_t> row_stride(const Tensor& tensor) {
    std::optional<int64_t> stride;
    int64_t next = 0;
    for (int64_t dim = tensor.dim() - 2; dim >= 0; --dim) {
        if (tensor.size(dim) == 1) continue;
        if (stride && tensor.stride(dim) != next) return std::nullopt;
        if (!stride) stride = tensor.stride(dim);
        next = tensor.stride(dim) * tensor.size(dim);
    }
    return stride.value_or(0);
}

// [..., K] as one matrix, through a copy where strides allow none.
Tensor as_rows(const Tensor& tensor) { return row_stride(tensor) ? tensor : torch::stable::contiguous(tensor); }

// Words for the parts of so many rows over so many steps.
int64_t words_of(const Problem& problem, int64_t rows, int64_t steps) {
    return ceil_divide(rows, pair_side) * steps * problem.parts * pair_words;
}

// Many rows: each block of them is a task.
void run_blocks(const Problem& problem, int64_t tiles, int64_t blocks) {
    const int64_t steps = Chunks(problem.left).largest();
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        const AlignedArray<uint32_t> parts(words_of(problem, ceil_divide(tiles, blocks) * side, steps));
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * tiles / blocks * side, last = (block + 1) * tiles / blocks * side;
            kernels().run(problem, {first, std::min(last, problem.left.rows), parts.data()});
        }
    });
}

// Few rows for so many threads, which split a block of them together and then share its products.
void run_items(const Problem& problem, int64_t block_rows) {
    const int64_t most_rows = std::min(block_rows, problem.left.rows);
    const AlignedArray<uint32_t> parts(words_of(problem, most_rows, problem.left.steps()));
    const int64_t work = sums_count * std::max<int64_t>(1, problem.left.depth);
    for (int64_t first = 0; first < problem.left.rows; first += block_rows) {
        const Block block{first, std::min(first + block_rows, problem.left.rows), parts.data()};
        parallel_for(0, block.pairs(), ceil_divide(least_work, work), [&](int64_t begin, int64_t end) {
            kernels().split(problem, block, begin, end);
        });
        parallel_for(0, block.pairs() * problem.panels(), ceil_divide(least_work, work),
                     [&](int64_t begin, int64_t end) { kernels().multiply(problem, block, begin, end); });
    }
}

void run(const Problem& problem) {
    constexpr int64_t tiles_worth_a_block = 8;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tiles = ceil_divide(problem.left.rows, side);
    const int64_t bytes = std::max<int64_t>(1, Chunks(problem.left).largest()) * problem.parts * tile_bytes;
    const int64_t block_tiles = block_bytes / bytes / 2 * 2;
    if (tiles >= tiles_worth_a_block * threads) {
        run_blocks(problem, tiles, ceil_divide(ceil_divide(tiles, block_tiles), threads) * threads);
    } else {
        run_items(problem, block_tiles * side);
    }
}

// The product of x and packed words, and what follows it, into an output that is not empty.
void multiply_into(const Tensor& output, Tensor x, const uint32_t* right, int64_t parts, OptionalTensor bias,
                   OptionalTensor residual, bool gelu) {
    x = as_rows(x);
    if (bias) bias = torch::stable::contiguous(*bias);
    if (residual) residual = residual->stride(-1) == 1 ? as_rows(*residual) : torch::stable::contiguous(*residual);
    Problem problem{};
    problem.left = {static_cast<const float*>(x.const_data_ptr()), output.numel() / output.size(-1), x.size(-1),
                    *row_stride(x), x.stride(-1)};
    problem.right = right;
    problem.columns = output.size(-1);
    problem.parts = parts;
    problem.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    problem.residual = residual ? static_cast<const float*>(residual->const_data_ptr()) : nullptr;
    problem.residual_stride = residual ? *row_stride(*residual) : 0;
    problem.gelu = gelu;
    problem.output = static_cast<float*>(output.mutable_data_ptr());
    run(problem);
}

Tensor linear_parts(Tensor x, Tensor packed, int64_t out_features, int64_t parts, OptionalTensor bias,
                    OptionalTensor residual, bool gelu) {
    const Arguments given{x, packed, out_features, parts, bias, residual};
    check(given);
    const Tensor output = torch::stable::new_empty(x, given.output_shape(), ScalarType::Float);
    if (output.numel() == 0) return output;

    const auto* right = static_cast<const uint32_t*>(packed.const_data_ptr());
    multiply_into(output, x, right, parts, bias, residual, gelu);
    return output;
}

// Memory for a packed matrix, this thread's own. It is kept: fresh pages would cost more than the packing.
uint32_t* packing_space(int64_t words) {
    thread_local std::unique_ptr<AlignedArray<uint32_t>> space;
    thread_local int64_t size = 0;
    if (words > size) {
        space.reset();
        size = 0;
        space = std::make_unique<AlignedArray<uint32_t>>(words);
        size = words;
    }
    return space->data();
}

Tensor matmul_parts(Tensor x, Tensor matrix, int64_t parts, OptionalTensor bias) {
    Problems problems;
    if (x.dim() == 0) problems.push_back("x must be [..., K]");
    if (!is_fp32(x)) problems.push_back("x must be float32");
    if (bias && !is_fp32(*bias)) problems.push_back("bias must be float32");
    check_matrix(matrix, problems);
    check_parts(parts, problems);
    if (problems.empty() && matrix.size(1) != x.size(-1)) {
        problems.push_back("matrix must be [N, K] with K = " + std::to_string(x.size(-1)));
    }
    if (problems.empty() && bias && (bias->dim() != 1 || bias->size(0) != matrix.size(0))) {
        problems.push_back("bias must be [N] = [" + std::to_string(matrix.size(0)) + "]");
    }
    if (!(matrix.device() == x.device()) || (bias && !(bias->device() == x.device()))) {
        problems.push_back("all tensors must be on one device");
    }
    if (!problems.empty()) {
        raise_problems("_matmul_parts", problems, {{"x", &x}, {"matrix", &matrix}, {"bias", pointer_to(bias)}});
    }
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = matrix.size(0);
    const Tensor output = torch::stable::new_empty(x, shape, ScalarType::Float);
    if (output.numel() == 0) return output;
    const Matrix view = matrix_of(matrix, false);
    uint32_t* words = packing_space(std::max<int64_t>(1, view.pairs() * panel_words_of(view, parts)));
    pack_into(view, parts, words);
    multiply_into(output, x, words, parts, bias, std::nullopt, false);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CPU, m) {
    m.impl("_pack_parts", TORCH_BOX(&pack_parts));
    m.impl("_linear_parts", TORCH_BOX(&linear_parts));
    m.impl("_matmul_parts", TORCH_BOX(&matmul_parts));
}

}  // namespace beit_fast::linear

// For beit_fast/parts_linear.py: why the operators serve nothing here, empty where they do.
extern "C" __attribute__((visibility("default"))) const char* beit_fast_parts_refusal() {
    static const std::string reason = [] {
        try {
            return beit_fast::linear::unsupported_reason();
        } catch (const std::invalid_argument& error) {
            return std::string(error.what());
        }
    }();
    return reason.c_str();
}
