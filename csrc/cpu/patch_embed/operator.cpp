#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstddef>

#include "cpu/half.h"
#include "cpu/isa.h"
#include "cpu/memory.h"
#include "cpu/patch_embed/arguments.h"
#include "cpu/patch_embed/kernel.h"

namespace beit_fast::patch_embed {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;

namespace {

constexpr int64_t block_bytes = 5 << 17;  // gathered patches that fit in a core's L2 cache beside a panel
constexpr int64_t least_work = 1 << 15;   // multiplications for which a thread pays

Number number_of(ScalarType type) {
    switch (type) {
        case ScalarType::Byte: return Number::uint8;
        case ScalarType::Half: return Number::float16;
        case ScalarType::BFloat16: return Number::bfloat16;
        case ScalarType::Double: return Number::float64;
        default: return Number::float32;
    }
}

// A row of E or C numbers in the type of the sums.
class Row {
public:
    Row(const OptionalTensor& tensor, bool as_double) {
        if (!tensor) return;
        const Tensor values = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
        const void* data = values.const_data_ptr();
        const int64_t count = values.numel();
        switch (number_of(values.scalar_type())) {
            case Number::float16: fill(static_cast<const Half*>(data), count, as_double); break;
            case Number::bfloat16: fill(static_cast<const BFloat16*>(data), count, as_double); break;
            case Number::float64: fill(static_cast<const double*>(data), count, as_double); break;
            default: fill(static_cast<const float*>(data), count, as_double);
        }
    }

    Row(const std::vector<double>& values, bool as_double) {
        fill(values.data(), static_cast<int64_t>(values.size()), as_double);
    }

    const void* data() const { return bytes_.empty() ? nullptr : bytes_.data(); }

private:
    template <typename Value>
    void fill(const Value* values, int64_t count, bool as_double) {
        bytes_.resize(count * (as_double ? sizeof(double) : sizeof(float)));
        if (as_double) {
            convert(values, reinterpret_cast<double*>(bytes_.data()), count);
        } else {
            convert(values, reinterpret_cast<float*>(bytes_.data()), count);
        }
    }

    template <typename Value, typename Sum>
    static void convert(const Value* values, Sum* sums, int64_t count) {
        for (int64_t place = 0; place < count; ++place) sums[place] = static_cast<Sum>(widen(values[place]));
    }

    std::vector<std::byte> bytes_;
};

std::vector<double> shifts(const Arguments& given) {
    if (given.mean) return *given.mean;
    return given.std ? std::vector<double>(given.std->size(), 0.0) : std::vector<double>();
}

std::vector<double> factors(const Arguments& given) {
    if (!given.std) return given.mean ? std::vector<double>(given.mean->size(), 1.0) : std::vector<double>();
    std::vector<double> factors;
    for (double value : *given.std) factors.push_back(1.0 / value);
    return factors;
}

Kernel kernel_for(const Params& params) {
#define BEIT_FAST_FUNCTION(isa) isa::kernel_for,
    static constexpr decltype(&portable::kernel_for) functions[] = {BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_FUNCTION)};
#undef BEIT_FAST_FUNCTION
    return functions[static_cast<size_t>(current_isa())](params);
}

int64_t ceil_divide(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Few patches, gathered by all threads: each panel of columns is a task, which packs it into its own cache.
void run_panels(const Params& params, const Kernel& kernel, int64_t rows, int64_t panels) {
    const AlignedArray<std::byte> gathered(ceil_divide(rows, kernel.row_tile) * kernel.row_tile * kernel.row_bytes);
    parallel_for(0, rows, ceil_divide(least_work, params.depth), [&](int64_t begin, int64_t end) {
        kernel.gather(params, gathered.data() + begin * kernel.row_bytes, begin, end);
    });
    const int64_t work = rows * kernel.panel_columns * params.depth;
    parallel_for(0, panels, ceil_divide(least_work, work), [&](int64_t begin, int64_t end) {
        const AlignedArray<std::byte> packed(kernel.panel_bytes);
        for (int64_t panel = begin; panel < end; ++panel) {
            kernel.pack(params, packed.data(), panel);
            kernel.multiply(params, gathered.data(), packed.data(), nullptr, panel, 0, rows);
        }
    });
}

// Many patches: all panels are packed, then each block of patches is a task; every thread has equally many.
void run_blocks(const Params& params, const Kernel& kernel, int64_t rows, int64_t panels, int64_t least_blocks) {
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t tiles = ceil_divide(rows, kernel.row_tile);
    const int64_t wanted_blocks = ceil_divide(least_blocks, threads) * threads;
    const int64_t block_rows = ceil_divide(tiles, wanted_blocks) * kernel.row_tile;
    const AlignedArray<std::byte> packed(panels * kernel.panel_bytes);
    parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
            kernel.pack(params, packed.data() + panel * kernel.panel_bytes, panel);
        }
    });
    parallel_for(0, ceil_divide(rows, block_rows), 1, [&](int64_t begin, int64_t end) {
        const AlignedArray<std::byte> gathered(block_rows * kernel.row_bytes);
        for (int64_t block = begin; block < end; ++block) {
            const int64_t first = block * block_rows, last = std::min(first + block_rows, rows);
            kernel.gather(params, gathered.data(), first, last);
            for (int64_t panel = 0; panel < panels; ++panel) {
                const std::byte* own = packed.data() + panel * kernel.panel_bytes;
                const std::byte* next = panel + 1 < panels ? own + kernel.panel_bytes : nullptr;
                kernel.multiply(params, gathered.data(), own, next, panel, first, last);
            }
        }
    });
}

void run(const Params& params, const Kernel& kernel) {
    const int64_t rows = params.batch * params.patches;
    const int64_t panels = ceil_divide(params.embed, kernel.panel_columns);
    const int64_t blocks = ceil_divide(rows * kernel.row_bytes, block_bytes);
    if (blocks == 1) {
        run_panels(params, kernel, rows, panels);
    } else {
        run_blocks(params, kernel, rows, panels, blocks);
    }
    if (params.first != 0) kernel.write_cls(params);
}

Tensor patch_embed(Tensor pixels, Tensor weight, OptionalTensor bias, OptionalTensor cls, OptionalTensor mask,
                   OptionalTensor mask_token, OptionalTensor pos, std::optional<std::vector<double>> mean,
                   std::optional<std::vector<double>> std) {
    const Arguments given{pixels, weight, bias, cls, mask, mask_token, pos, mean, std};
    check(given);
    const ScalarType type = given.output_type();
    const Tensor output = torch::stable::new_empty(weight, {pixels.size(0), given.tokens(), weight.size(0)}, type);
    if (output.numel() == 0) return output;

    const bool as_double = type == ScalarType::Double;
    const Row shift(shifts(given), as_double), factor(factors(given), as_double), bias_row(bias, as_double),
        cls_row(cls, as_double), mask_token_row(mask_token, as_double);
    if (!weight.is_contiguous()) weight = torch::stable::contiguous(weight);
    if (pos && pos->scalar_type() != type) pos = torch::stable::to(*pos, type);
    if (pos && !pos->is_contiguous()) pos = torch::stable::contiguous(*pos);

    Params params{};
    params.pixels = pixels.const_data_ptr();
    params.pixel_type = number_of(pixels.scalar_type());
    std::copy_n(pixels.strides().begin(), 4, params.pixel_strides);
    params.batch = pixels.size(0);
    params.channels = weight.size(1);
    params.patch_height = weight.size(2);
    params.patch_width = weight.size(3);
    params.patch_columns = pixels.size(3) / weight.size(3);
    params.patches = given.patches();
    params.shift = shift.data();
    params.factor = factor.data();
    params.weight = weight.const_data_ptr();
    params.weight_type = number_of(weight.scalar_type());
    params.embed = weight.size(0);
    params.depth = weight.size(1) * weight.size(2) * weight.size(3);
    params.bias = bias_row.data();
    params.cls = cls_row.data();
    params.mask_token = mask_token_row.data();
    if (mask) {
        params.mask = static_cast<const bool*>(mask->const_data_ptr());
        std::copy_n(mask->strides().begin(), 2, params.mask_strides);
    }
    params.position = pos ? pos->const_data_ptr() : nullptr;
    params.output = output.mutable_data_ptr();
    params.output_type = number_of(type);
    params.tokens = given.tokens();
    params.first = cls ? 1 : 0;
    run(params, kernel_for(params));
    return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CPU, m) { m.impl("patch_embed", TORCH_BOX(&patch_embed)); }

}  // namespace beit_fast::patch_embed
