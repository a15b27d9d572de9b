#pragma once

#include <optional>
#include <vector>

#include "errors.h"

namespace beit_fast::patch_embed {

// The arguments of `beit_fast::patch_embed`, documented in beit_fast/ops/patch_embed.py.
struct Arguments {
    const Tensor& pixels;  // [B, C, H, W]
    const Tensor& weight;  // [E, C, patch height, patch width]
    const OptionalTensor& bias;
    const OptionalTensor& cls;
    const OptionalTensor& mask;  // [B, P]
    const OptionalTensor& mask_token;
    const OptionalTensor& pos;  // [1, tokens, E]
    const std::optional<std::vector<double>>& mean;
    const std::optional<std::vector<double>>& std;

    int64_t patches() const;
    int64_t tokens() const;
    // The widest type of weight, CLS, mask token and positions.
    torch::headeronly::ScalarType output_type() const;
};

// Throws std::invalid_argument if the arguments do not fit together.
void check(const Arguments& arguments);

}  // namespace beit_fast::patch_embed
