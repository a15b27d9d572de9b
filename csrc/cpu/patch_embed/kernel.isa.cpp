#include "cpu/memory.h"
#include "cpu/patch_embed/finish.h"
#include "cpu/patch_embed/gather.h"
#include "cpu/patch_embed/kernel.h"
#include "cpu/patch_embed/multiply.h"
#include "cpu/patch_embed/pack.h"

#if defined(__AMX_BF16__)
#include "cpu/patch_embed/multiply_amx.h"
#include "cpu/patch_embed/multiply_split_bf16.h"
#endif

namespace beit_fast::patch_embed {
namespace {

// The functions of a Kernel for one way to multiply.
template <typename Multiplier>
struct Functions {
    using Sum = typename Multiplier::Sum;
    using Unit = typename Multiplier::Unit;
    using Element = typename Multiplier::Element;

    static int64_t units(const Params& params) {
        if constexpr (Multiplier::terms > 1) {
            return steps_of(params) * Multiplier::terms * 16;
        } else {
            const int64_t bytes = params.depth * static_cast<int64_t>(sizeof(Element));
            constexpr int64_t multiple = Multiplier::units_multiple * static_cast<int64_t>(sizeof(Unit));
            return (bytes + multiple - 1) / multiple * Multiplier::units_multiple;
        }
    }

    // Steps of 32 numbers, for split rows.
    static int64_t steps_of(const Params& params) {
        return (params.depth + 31) / 32;
    }

    static void pack(const Params& params, void* packed, int64_t panel) {
        auto* units_of_panel = static_cast<Unit*>(packed);
        if constexpr (Multiplier::terms > 1) {
            const bool half = params.weight_type == Number::float16;
            if (half) pack_split_bf16<Half>(params, panel, units(params), units_of_panel);
            else pack_split_bf16<float>(params, panel, units(params), units_of_panel);
        } else if constexpr (!std::is_same_v<Unit, Element>) {
            pack_panel<Element>(params, panel, units(params), units_of_panel);
        } else {
            switch (params.weight_type) {
                case Number::float16: return pack_panel<Half>(params, panel, units(params), units_of_panel);
                case Number::bfloat16: return pack_panel<BFloat16>(params, panel, units(params), units_of_panel);
                case Number::float32: return pack_panel<float>(params, panel, units(params), units_of_panel);
                default: return pack_panel<Sum>(params, panel, units(params), units_of_panel);
            }
        }
    }

    static void gather(const Params& params, void* rows, int64_t first, int64_t last) {
        const int64_t row_elements = units(params) * sizeof(Unit) / sizeof(Element);
        auto* elements = static_cast<Element*>(rows);
        if constexpr (Multiplier::terms > 1) {
            const int64_t steps = steps_of(params), length = steps * 32;
            elements += row_elements - length;
            gather_any<Element, Sum>(params, elements, row_elements, length, first, last);
            auto* words = static_cast<Unit*>(rows);
            for (int64_t row = 0; row < last - first; ++row) split_row(words + row * row_elements, steps);
        } else {
            gather_any<Element, Sum>(params, elements, row_elements, row_elements, first, last);
        }
    }

    static void multiply(const Params& params, const void* rows, const void* panel, const void* next_panel,
                         int64_t panel_number, int64_t first, int64_t last) {
        with_output(params, [&](auto output) {
            multiply_into<decltype(output)>(params, rows, panel, next_panel, panel_number, first, last);
        });
    }

    static void write_cls(const Params& params) {
        with_output(params, [&](auto output) { write_first_tokens<Sum, decltype(output)>(params); });
    }

    // Calls `function` with a number of the output's type: that of the sums or, of fp32 sums, one of 16 bits.
    template <typename Function>
    static void with_output(const Params& params, Function function) {
        if constexpr (std::is_same_v<Sum, float>) {
            if (params.output_type == Number::float16) return function(Half{});
            if (params.output_type == Number::bfloat16) return function(BFloat16{});
        }
        function(Sum{});
    }

    template <typename Output>
    static void multiply_into(const Params& params, const void* all_rows, const void* panel, const void* next_panel,
                              int64_t panel_number, int64_t first, int64_t last) {
        constexpr int columns = Multiplier::columns;
        constexpr int height = Multiplier::rows_at_once;
        constexpr int64_t most_rows = 128 / height * height;
        const int64_t row_units = units(params);
        const auto* rows = static_cast<const Unit*>(all_rows);
        const int64_t column = panel_number * columns;
        const int64_t present = std::min<int64_t>(columns, params.embed - column);
        const Multiplier multiplier;
        alignas(64) Sum sums[most_rows * columns];
        const int64_t blocks = (last - first + most_rows - 1) / most_rows;
        const int64_t block_rows = ((last - first + blocks - 1) / blocks + height - 1) / height * height;
        Prefetch next(next_panel, row_units * columns * sizeof(Unit),
                      ((last - first) / height + 1) * (row_units / Multiplier::units_at_once + 1));
        int64_t image = first / params.patches, patch = first % params.patches;
        for (int64_t begin = first; begin < last; begin += block_rows, rows += block_rows * row_units) {
            const int64_t count = std::min(block_rows, last - begin);
            for (int64_t unit = 0; unit < row_units; unit += Multiplier::units_at_once) {
                const int64_t end = std::min(row_units, unit + Multiplier::units_at_once);
                for (int64_t row = 0; row < count; row += height) {
                    next.advance();
                    multiplier.run(std::min<int64_t>(height, count - row),
                                   {rows + row * row_units, row_units, static_cast<const Unit*>(panel), unit, end,
                                    sums + row * columns});
                }
            }
            for (int64_t row = 0; row < count; ++row) {
                if (present == columns) {  // a constant for the compiler in the usual case
                    finish_row<Sum, Output>(params, sums + row * columns, image, patch, column, columns);
                } else {
                    finish_row<Sum, Output>(params, sums + row * columns, image, patch, column, present);
                }
                if (++patch == params.patches) ++image, patch = 0;
            }
        }
    }

    static Kernel kernel(const Params& params) {
        const int64_t row_bytes = units(params) * sizeof(Unit);
        return {Multiplier::columns, Multiplier::rows_at_once, row_bytes, row_bytes * Multiplier::columns,
                pack, gather, multiply, write_cls};
    }
};

}  // namespace

namespace BEIT_FAST_ISA {

Kernel kernel_for(const Params& params) {
    if (params.output_type == Number::float64) return Functions<Multiply<double>>::kernel(params);
#if defined(__AMX_BF16__)
    if (params.weight_type == Number::bfloat16) return Functions<MultiplyTiles>::kernel(params);
    // Splitting the weight pays off if there are many patches.
    if (params.batch * params.patches > 256) return Functions<MultiplySplitBf16>::kernel(params);
#elif defined(__AVX512BF16__)
    if (params.weight_type == Number::bfloat16) return Functions<MultiplyPairs>::kernel(params);
#endif
    return Functions<Multiply<float>>::kernel(params);
}

}  // namespace BEIT_FAST_ISA
}  // namespace beit_fast::patch_embed
