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

constexpr int64_t block_bytes = 1 << 20;  // split rows that fit in a core's L2 cache beside two panels
constexpr int64_t least_work = 1 << 15;   // multiplications for which a thread pays

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

void check_terms(const char* name, int64_t terms) {
    require(terms == 2 || terms == 3, name, "2 or 3 terms");
    static const std::string expected = "an instruction set with tiles, but " + unsupported_reason();
    require(current_kernels() != nullptr, name, expected.c_str());
}

void check_matrix(const char* name, const Tensor& matrix) {
    require(matrix.dim() == 2 && is_fp32(matrix), name, "matrix in float32, [N, K] or transposed [K, N]");
}

// The rows of a [N, K] tensor, or of a [K, N] one that is transposed.
Matrix matrix_of(const Tensor& matrix, bool transposed) {
    const int rows = transposed ? 1 : 0, depth = 1 - rows;
    return {static_cast<const float*>(matrix.const_data_ptr()), matrix.size(rows), matrix.size(depth),
            matrix.stride(rows), matrix.stride(depth)};
}

int64_t panel_words_of(const Matrix& matrix, int64_t terms) { return matrix.steps() * terms * pair_words; }

void pack_into(const Matrix& matrix, int64_t terms, uint32_t* words) {
    const int64_t grain = ceil_divide(least_work, std::max<int64_t>(1, panel_words_of(matrix, terms) * 4));
    parallel_for(0, matrix.pairs(), grain, [&](int64_t begin, int64_t end) {
        kernels().pack(matrix, terms, words, begin, end);
    });
}

Tensor pack_split_bf16(Tensor matrix, bool transposed, int64_t terms) {
    check_matrix("_pack_split_bf16", matrix);
    check_terms("_pack_split_bf16", terms);
    const Matrix view = matrix_of(matrix, transposed);
    const std::vector<int64_t> shape{view.pairs(), panel_words_of(view, terms) * 4};
    const Tensor packed = torch::stable::new_empty(matrix, shape, ScalarType::Byte);
    if (packed.numel() > 0) pack_into(view, terms, static_cast<uint32_t*>(packed.mutable_data_ptr()));
    return packed;
}

struct Arguments {
    const Tensor& x;
    const Tensor& packed;
    int64_t out_features, terms;
    const OptionalTensor& bias;
    const OptionalTensor& residual;

    std::vector<int64_t> output_shape() const {
        std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
        shape.back() = out_features;
        return shape;
    }
};

// The shape of the bytes that `_pack_split_bf16` makes of a matrix [out_features, K].
std::vector<int64_t> packed_shape(const Arguments& given) {
    const int64_t steps = ceil_divide(given.x.size(-1), step_depth);
    return {ceil_divide(given.out_features, pair_side), steps * given.terms * pair_words * 4};
}

void check(const Arguments& given) {
    const auto expect = [&](bool condition, const char* expected) {
        require(condition, "_linear_split_bf16", expected);
    };
    check_terms("_linear_split_bf16", given.terms);
    expect(given.x.dim() > 0 && is_fp32(given.x), "x in float32, [..., K]");
    expect(given.out_features >= 0, "out_features of at least 0");
    expect(given.packed.scalar_type() == ScalarType::Byte && given.packed.is_contiguous() &&
               has_shape(given.packed, packed_shape(given)),
           "packed as _pack_split_bf16 returns it for [out_features, K] and as many terms");
    expect(!given.bias || (is_fp32(*given.bias) && has_shape(*given.bias, {given.out_features})),
           "bias in float32, [N]");
    expect(!given.residual || (is_fp32(*given.residual) && has_shape(*given.residual, given.output_shape())),
           "residual in float32, [..., N]");
    expect(on_one_device({&given.x, &given.packed, pointer_to(given.bias), pointer_to(given.residual)}),
           "tensors on one device");
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

// The words of `rows` split rows over `steps`.
int64_t words_of(const Params& params, int64_t rows, int64_t steps) {
    return ceil_divide(rows, pair_side) * steps * params.terms * pair_words;
}

// Many rows: each block of them is a task.
void run_blocks(const Params& params, int64_t tiles, int64_t blocks) {
    const int64_t steps = Chunks(params.left).largest();
    parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
        const AlignedArray<uint32_t> words(words_of(params, ceil_divide(tiles, blocks) * side, steps));
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * tiles / blocks * side, last = (block + 1) * tiles / blocks * side;
            kernels().run(params, {first, std::min(last, params.left.rows), words.data()});
        }
    });
}

// Few rows for many threads: all threads split a block of rows together and then share its products.
void run_items(const Params& params, int64_t block_rows) {
    const int64_t most_rows = std::min(block_rows, params.left.rows);
    const AlignedArray<uint32_t> words(words_of(params, most_rows, params.left.steps()));
    const int64_t work = sums_count * std::max<int64_t>(1, params.left.depth);
    for (int64_t first = 0; first < params.left.rows; first += block_rows) {
        const Block block{first, std::min(first + block_rows, params.left.rows), words.data()};
        parallel_for(0, block.pairs(), ceil_divide(least_work, work), [&](int64_t begin, int64_t end) {
            kernels().split(params, block, begin, end);
        });
        parallel_for(0, block.pairs() * params.panels(), ceil_divide(least_work, work),
                     [&](int64_t begin, int64_t end) { kernels().multiply(params, block, begin, end); });
    }
}

void run(const Params& params) {
    constexpr int64_t tiles_worth_a_block = 8;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tiles = ceil_divide(params.left.rows, side);
    const int64_t bytes = std::max<int64_t>(1, Chunks(params.left).largest()) * params.terms * tile_bytes;
    const int64_t block_tiles = block_bytes / bytes / 2 * 2;
    if (tiles >= tiles_worth_a_block * threads) {
        run_blocks(params, tiles, ceil_divide(ceil_divide(tiles, block_tiles), threads) * threads);
    } else {
        run_items(params, block_tiles * side);
    }
}

// The product of x and packed words, and what follows it, into an output that is not empty.
void multiply_into(const Tensor& output, Tensor x, const uint32_t* right, int64_t terms, OptionalTensor bias,
                   OptionalTensor residual, bool gelu) {
    x = as_rows(x);
    if (bias) bias = torch::stable::contiguous(*bias);
    if (residual) residual = residual->stride(-1) == 1 ? as_rows(*residual) : torch::stable::contiguous(*residual);
    Params params{};
    params.left = {static_cast<const float*>(x.const_data_ptr()), output.numel() / output.size(-1), x.size(-1),
                    *row_stride(x), x.stride(-1)};
    params.right = right;
    params.columns = output.size(-1);
    params.terms = terms;
    params.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
    params.residual = residual ? static_cast<const float*>(residual->const_data_ptr()) : nullptr;
    params.residual_stride = residual ? *row_stride(*residual) : 0;
    params.gelu = gelu;
    params.output = static_cast<float*>(output.mutable_data_ptr());
    run(params);
}

Tensor linear_split_bf16(Tensor x, Tensor packed, int64_t out_features, int64_t terms, OptionalTensor bias,
                    OptionalTensor residual, bool gelu) {
    const Arguments given{x, packed, out_features, terms, bias, residual};
    check(given);
    const Tensor output = torch::stable::new_empty(x, given.output_shape(), ScalarType::Float);
    if (output.numel() == 0) return output;

    const auto* right = static_cast<const uint32_t*>(packed.const_data_ptr());
    multiply_into(output, x, right, terms, bias, residual, gelu);
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

Tensor matmul_split_bf16(Tensor x, Tensor matrix, int64_t terms, OptionalTensor bias) {
    const char* name = "_matmul_split_bf16";
    check_matrix(name, matrix);
    check_terms(name, terms);
    require(x.dim() > 0 && is_fp32(x) && x.size(-1) == matrix.size(1), name, "x in float32, [..., K]");
    require(!bias || (is_fp32(*bias) && has_shape(*bias, {matrix.size(0)})), name, "bias in float32, [N]");
    require(on_one_device({&x, &matrix, pointer_to(bias)}), name, "tensors on one device");
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.back() = matrix.size(0);
    const Tensor output = torch::stable::new_empty(x, shape, ScalarType::Float);
    if (output.numel() == 0) return output;
    const Matrix view = matrix_of(matrix, false);
    uint32_t* words = packing_space(std::max<int64_t>(1, view.pairs() * panel_words_of(view, terms)));
    pack_into(view, terms, words);
    multiply_into(output, x, words, terms, bias, std::nullopt, false);
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CPU, m) {
    m.impl("_pack_split_bf16", TORCH_BOX(&pack_split_bf16));
    m.impl("_linear_split_bf16", TORCH_BOX(&linear_split_bf16));
    m.impl("_matmul_split_bf16", TORCH_BOX(&matmul_split_bf16));
}

}  // namespace beit_fast::linear

// For beit_fast/ops/cpu_linear/split_bf16.py: why the operators are not supported here; empty if they are.
extern "C" __attribute__((visibility("default"))) const char* beit_fast_split_bf16_unsupported() {
    static const std::string reason = [] {
        try {
            return beit_fast::linear::unsupported_reason();
        } catch (const std::invalid_argument& error) {
            return std::string(error.what());
        }
    }();
    return reason.c_str();
}
