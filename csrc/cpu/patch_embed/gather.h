#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/half.h"
#include "cpu/patch_embed/params.h"

// Patches from the pixels into rows [C * patch height * patch width], normalized and converted on the way.

namespace beit_fast::patch_embed {
namespace {

template <typename Sum>
struct Normalization {
    Sum shift, factor;
};

// `count` pixels of one line and channel, `step` elements apart, as sums.
template <bool normalized, typename Pixel, typename Sum>
[[gnu::always_inline]] inline void convert_run(const Pixel* __restrict source, int64_t step, Sum* __restrict target,
                                               int64_t count, Normalization<Sum> constants) {
    if (step == 1) {
        widen_row(source, target, count);
    } else {
        for (int64_t place = 0; place < count; ++place) target[place] = static_cast<Sum>(widen(source[place * step]));
    }
    if constexpr (normalized) {
        for (int64_t place = 0; place < count; ++place) {
            target[place] = (target[place] - constants.shift) * constants.factor;
        }
    }
}

// The same with constants for the compiler in the usual cases: 16 pixels, adjacent or interleaved with three channels.
template <bool normalized, typename Pixel, typename Sum>
[[gnu::always_inline]] inline void gather_sums(const Pixel* source, int64_t step, Sum* target, int64_t count,
                                               Normalization<Sum> constants) {
    if (count == 16 && step == 1) return convert_run<normalized>(source, 1, target, 16, constants);
    if (count == 16 && step == 3) return convert_run<normalized>(source, 3, target, 16, constants);
    convert_run<normalized>(source, step, target, count, constants);
}

template <bool normalized, typename Pixel, typename Element, typename Sum>
inline void gather_run(const Pixel* source, int64_t step, Element* target, int64_t count,
                       Normalization<Sum> constants) {
    if constexpr (!normalized && std::is_same_v<Pixel, Element>) {
        if (step == 1) {
            std::memcpy(target, source, count * sizeof(Element));
        } else {
            for (int64_t place = 0; place < count; ++place) target[place] = source[place * step];
        }
    } else if constexpr (std::is_same_v<Element, Sum>) {
        gather_sums<normalized>(source, step, target, count, constants);
    } else {
        Sum sums[16];
        for (int64_t begin = 0; begin < count; begin += 16) {
            const int64_t length = std::min<int64_t>(16, count - begin);
            gather_sums<normalized>(source + begin * step, step, sums, length, constants);
            narrow_row(sums, target + begin, length);
        }
    }
}

template <bool normalized, typename Pixel, typename Element, typename Sum>
void gather_rows(const Params& params, Element* rows, int64_t row_stride, int64_t row_elements, int64_t first,
                 int64_t last) {
    const auto* pixels = static_cast<const Pixel*>(params.pixels);
    const auto* shift = static_cast<const Sum*>(params.shift);
    const auto* factor = static_cast<const Sum*>(params.factor);
    const int64_t* strides = params.pixel_strides;
    for (int64_t begin = first; begin < last;) {
        // Adjacent patches of one image: their pixels are read line by line.
        const int64_t image = begin / params.patches, patch = begin % params.patches;
        const int64_t row = patch / params.patch_columns, column = patch % params.patch_columns;
        const int64_t end = std::min(last, begin + params.patch_columns - column);
        for (int64_t channel = 0; channel < params.channels; ++channel) {
            Normalization<Sum> constants{0, 1};
            if constexpr (normalized) constants = {shift[channel], factor[channel]};
            for (int64_t line = 0; line < params.patch_height; ++line) {
                const Pixel* source = pixels + image * strides[0] + channel * strides[1] +
                                      (row * params.patch_height + line) * strides[2] +
                                      column * params.patch_width * strides[3];
                Element* target = rows + (begin - first) * row_stride +
                                  (channel * params.patch_height + line) * params.patch_width;
                for (int64_t count = begin; count < end; ++count) {
                    gather_run<normalized>(source, strides[3], target, params.patch_width, constants);
                    source += params.patch_width * strides[3];
                    target += row_stride;
                }
            }
        }
        begin = end;
    }
    for (int64_t row = 0; row < last - first; ++row) {
        Element* rest = rows + row * row_stride + params.depth;
        std::memset(rest, 0, (row_elements - params.depth) * sizeof(Element));
    }
}

template <typename Pixel, typename Element, typename Sum>
void gather_pixels(const Params& params, Element* rows, int64_t row_stride, int64_t row_elements, int64_t first,
                   int64_t last) {
    if (params.shift != nullptr) {
        gather_rows<true, Pixel, Element, Sum>(params, rows, row_stride, row_elements, first, last);
    } else {
        gather_rows<false, Pixel, Element, Sum>(params, rows, row_stride, row_elements, first, last);
    }
}

// Gathers into rows of `row_elements`, padded with zeros past K, `row_stride` elements apart.
template <typename Element, typename Sum>
void gather_any(const Params& params, Element* rows, int64_t row_stride, int64_t row_elements, int64_t first,
                int64_t last) {
    const auto gather = [&](auto pixel) {
        gather_pixels<decltype(pixel), Element, Sum>(params, rows, row_stride, row_elements, first, last);
    };
    switch (params.pixel_type) {
        case Number::uint8: return gather(uint8_t{});
        case Number::float16: return gather(Half{});
        case Number::bfloat16: return gather(BFloat16{});
        case Number::float32: return gather(float{});
        case Number::float64: return gather(double{});
    }
}

}  // namespace
}  // namespace beit_fast::patch_embed
