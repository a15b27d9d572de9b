#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/patch_embed/pack.h"
#include "cpu/patch_embed/params.h"

namespace beit_fast::patch_embed {
namespace {

// Sums of `count` columns of one patch plus bias, or the mask token, plus positions: written into its token.
template <typename Sum, typename Output>
[[gnu::always_inline]] inline void finish_row(const Params& params, Sum* sums, int64_t image, int64_t patch,
                                              int64_t column, int64_t count) {
    const bool masked = params.mask != nullptr &&
                        params.mask[image * params.mask_strides[0] + patch * params.mask_strides[1]];
    if (masked) {
        std::copy_n(static_cast<const Sum*>(params.mask_token) + column, count, sums);
    } else if (params.bias != nullptr) {
        const Sum* bias = static_cast<const Sum*>(params.bias) + column;
        for (int64_t place = 0; place < count; ++place) sums[place] += bias[place];
    }
    const int64_t token = params.first + patch;
    if (params.position != nullptr) {
        Sum position[panel_columns_of<Sum>];
        widen_row(static_cast<const Output*>(params.position) + token * params.embed + column, position, count);
        for (int64_t place = 0; place < count; ++place) sums[place] += position[place];
    }
    auto* output = static_cast<Output*>(params.output) + (image * params.tokens + token) * params.embed + column;
    narrow_row(sums, output, count);
}

// The CLS token plus its position, the same in every image.
template <typename Sum, typename Output>
void write_first_tokens(const Params& params) {
    const auto* cls = static_cast<const Sum*>(params.cls);
    const auto* position = static_cast<const Output*>(params.position);
    auto* output = static_cast<Output*>(params.output);
    for (int64_t place = 0; place < params.embed; ++place) {
        const Sum sum = position == nullptr ? cls[place] : cls[place] + static_cast<Sum>(widen(position[place]));
        narrow(sum, output[place]);
    }
    const int64_t image_stride = params.tokens * params.embed;
    for (int64_t image = 1; image < params.batch; ++image) {
        std::memcpy(output + image * image_stride, output, params.embed * sizeof(Output));
    }
}

}  // namespace
}  // namespace beit_fast::patch_embed
