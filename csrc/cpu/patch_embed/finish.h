#pragma once

#include <algorithm>
#include <cstring>

#include "cpu/patch_embed/pack.h"
#include "cpu/patch_embed/params.h"

namespace beit_fast::patch_embed {
namespace {

// Sums of `count` columns of one patch plus bias, or the mask token, plus positions: written as a part of its token.
template <typename Sum, typename Output>
[[gnu::always_inline]] inline void finish_row(const Problem& problem, Sum* sums, int64_t image, int64_t patch,
                                              int64_t column, int64_t count) {
    const bool masked = problem.mask != nullptr &&
                        problem.mask[image * problem.mask_strides[0] + patch * problem.mask_strides[1]];
    if (masked) {
        std::copy_n(static_cast<const Sum*>(problem.mask_token) + column, count, sums);
    } else if (problem.bias != nullptr) {
        const Sum* bias = static_cast<const Sum*>(problem.bias) + column;
        for (int64_t place = 0; place < count; ++place) sums[place] += bias[place];
    }
    const int64_t token = problem.first + patch;
    if (problem.position != nullptr) {
        Sum position[panel_columns_of<Sum>];
        widen_row(static_cast<const Output*>(problem.position) + token * problem.embed + column, position, count);
        for (int64_t place = 0; place < count; ++place) sums[place] += position[place];
    }
    auto* output = static_cast<Output*>(problem.output) + (image * problem.tokens + token) * problem.embed + column;
    narrow_row(sums, output, count);
}

// The CLS token plus its position, the same in every image.
template <typename Sum, typename Output>
void write_first_tokens(const Problem& problem) {
    const auto* cls = static_cast<const Sum*>(problem.cls);
    const auto* position = static_cast<const Output*>(problem.position);
    auto* output = static_cast<Output*>(problem.output);
    for (int64_t place = 0; place < problem.embed; ++place) {
        const Sum sum = position == nullptr ? cls[place] : cls[place] + static_cast<Sum>(widen(position[place]));
        narrow(sum, output[place]);
    }
    const int64_t image_stride = problem.tokens * problem.embed;
    for (int64_t image = 1; image < problem.batch; ++image) {
        std::memcpy(output + image * image_stride, output, problem.embed * sizeof(Output));
    }
}

}  // namespace
}  // namespace beit_fast::patch_embed
