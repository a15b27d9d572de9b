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

    static int64_t units(const Problem& problem) {
        if constexpr (Multiplier::parts > 1) {
            return steps_of(problem) * Multiplier::parts * 16;
        } else {
            const int64_t bytes = problem.depth * static_cast<int64_t>(sizeof(Element));
            constexpr int64_t multiple = Multiplier::units_multiple * static_cast<int64_t>(sizeof(Unit));
            return (bytes + multiple - 1) / multiple * Multiplier::units_multiple;
        }
    }

    // Of 32 numbers, where numbers are split.
    static int64_t steps_of(const Problem& problem) {
        return (problem.depth + 31) / 32;
    }

    static void pack(const Problem& problem, void* packed, int64_t panel) {
        auto* units_of_panel = static_cast<Unit*>(packed);
        if constexpr (Multiplier::parts > 1) {
            const bool half = problem.weight_type == Number::float16;
            if (half) pack_parts<Half>(problem, panel, units(problem), units_of_panel);
            else pack_parts<float>(problem, panel, units(problem), units_of_panel);
        } else if constexpr (!std::is_same_v<Unit, Element>) {
            pack_panel<Element>(problem, panel, units(problem), units_of_panel);
        } else {
            switch (problem.weight_type) {
                case Number::float16: return pack_panel<Half>(problem, panel, units(problem), units_of_panel);
                case Number::bfloat16: return pack_panel<BFloat16>(problem, panel, units(problem), units_of_panel);
                case Number::float32: return pack_panel<float>(problem, panel, units(problem), units_of_panel);
                default: return pack_panel<Sum>(problem, panel, units(problem), units_of_panel);
            }
        }
    }

    static void gather(const Problem& problem, void* rows, int64_t first, int64_t last) {
        const int64_t row_elements = units(problem) * sizeof(Unit) / sizeof(Element);
        auto* elements = static_cast<Element*>(rows);
        if constexpr (Multiplier::parts > 1) {
            const int64_t steps = steps_of(problem), length = steps * 32;
            elements += row_elements - length;
            gather_any<Element, Sum>(problem, elements, row_elements, length, first, last);
            auto* words = static_cast<Unit*>(rows);
            for (int64_t row = 0; row < last - first; ++row) split_row(words + row * row_elements, steps);
        } else {
            gather_any<Element, Sum>(problem, elements, row_elements, row_elements, first, last);
        }
    }

    static void multiply(const Problem& problem, const void* rows, const void* panel, const void* next_panel,
                         int64_t panel_number, int64_t first, int64_t last) {
        with_output(problem, [&](auto output) {
            multiply_into<decltype(output)>(problem, rows, panel, next_panel, panel_number, first, last);
        });
    }

    static void write_cls(const Problem& problem) {
        with_output(problem, [&](auto output) { write_first_tokens<Sum, decltype(output)>(problem); });
    }

    // Calls `function` with a number of the output's type: that of the sums or, of fp32 sums, one of 16 bits.
    template <typename Function>
    static void with_output(const Problem& problem, Function function) {
        if constexpr (std::is_same_v<Sum, float>) {
            if (problem.output_type == Number::float16) return function(Half{});
            if (problem.output_type == Number::bfloat16) return function(BFloat16{});
        }
        function(Sum{});
    }

    template <typename Output>
    static void multiply_into(const Problem& problem, const void* all_rows, const void* panel, const void* next_panel,
                              int64_t panel_number, int64_t first, int64_t last) {
        constexpr int columns = Multiplier::columns;
        constexpr int height = Multiplier::rows_at_once;
        constexpr int64_t most_rows = 128 / height * height;
        const int64_t row_units = units(problem);
        const auto* rows = static_cast<const Unit*>(all_rows);
        const int64_t column = panel_number * columns;
        const int64_t present = std::min<int64_t>(columns, problem.embed - column);
        const Multiplier multiplier;
        alignas(64) Sum sums[most_rows * columns];
        const int64_t blocks = (last - first + most_rows - 1) / most_rows;
        const int64_t block_rows = ((last - first + blocks - 1) / blocks + height - 1) / height * height;
        Prefetch next(next_panel, row_units * columns * sizeof(Unit),
                      ((last - first) / height + 1) * (row_units / Multiplier::units_at_once + 1));
        int64_t image = first / problem.patches, patch = first % problem.patches;
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
                if (present == columns) {  // the usual count, known to the compiler
                    finish_row<Sum, Output>(problem, sums + row * columns, image, patch, column, columns);
                } else {
                    finish_row<Sum, Output>(problem, sums + row * columns, image, patch, column, present);
                }
                if (++patch == problem.patches) ++image, patch = 0;
            }
        }
    }

    static Kernel kernel(const Problem& problem) {
        const int64_t row_bytes = units(problem) * sizeof(Unit);
        return {Multiplier::columns, Multiplier::rows_at_once, row_bytes, row_bytes * Multiplier::columns,
                pack, gather, multiply, write_cls};
    }
};

}  // namespace

namespace BEIT_FAST_ISA {

Kernel kernel_for(const Problem& problem) {
    if (problem.output_type == Number::float64) return Functions<Multiply<double>>::kernel(problem);
#if defined(__AMX_BF16__)
    if (problem.weight_type == Number::bfloat16) return Functions<MultiplyTiles>::kernel(problem);
    // Splitting the weight pays where there are many patches.
    if (problem.batch * problem.patches > 256) return Functions<MultiplyParts>::kernel(problem);
#elif defined(__AVX512BF16__)
    if (problem.weight_type == Number::bfloat16) return Functions<MultiplyPairs>::kernel(problem);
#endif
    return Functions<Multiply<float>>::kernel(problem);
}

}  // namespace BEIT_FAST_ISA
}  // namespace beit_fast::patch_embed
