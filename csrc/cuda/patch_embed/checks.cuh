#pragma once

#include <optional>
#include <vector>

#include "cuda/patch_embed/arguments.cuh"
#include "errors.h"

// The inputs of the CUDA kernel and the invariants that it needs.
namespace beit_fast::cuda {

using torch::headeronly::ScalarType;
using Numbers = std::optional<std::vector<double>>;

struct Inputs {
    const Tensor& pixels;
    const Tensor& weight;
    const OptionalTensor& bias;
    const OptionalTensor& cls;
    const OptionalTensor& mask;
    const OptionalTensor& mask_token;
    const OptionalTensor& pos;
    const Numbers& mean;
    const Numbers& deviation;

    int64_t patch_rows() const { return pixels.size(2) / weight.size(2); }
    int64_t patch_columns() const { return pixels.size(3) / weight.size(3); }
    int64_t patches() const { return patch_rows() * patch_columns(); }
    int64_t tokens() const { return patches() + (cls ? 1 : 0); }
    int64_t depth() const { return weight.size(1) * weight.size(2) * weight.size(3); }
};

inline std::optional<Scalar> scalar_of(ScalarType type) {
    switch (type) {
        case ScalarType::Byte:
            return Scalar::kUint8;
        case ScalarType::Half:
            return Scalar::kFloat16;
        case ScalarType::BFloat16:
            return Scalar::kBFloat16;
        case ScalarType::Float:
            return Scalar::kFloat32;
        default:
            return std::nullopt;
    }
}

inline void expect(bool condition, const char* expected) { require(condition, "_patch_embed_cuda", expected); }

inline bool is_supported_float(ScalarType type) { return scalar_of(type) && type != ScalarType::Byte; }

inline void check_dtypes(const Inputs& inputs) {
    expect(scalar_of(inputs.pixels.scalar_type()).has_value(), "pixels in uint8, float16, bfloat16 or float32");
    for (const Tensor* tensor : {&inputs.weight, pointer_to(inputs.bias), pointer_to(inputs.cls),
                                 pointer_to(inputs.mask_token), pointer_to(inputs.pos)}) {
        expect(tensor == nullptr || is_supported_float(tensor->scalar_type()),
               "weight, tokens and positions in float16, bfloat16 or float32");
    }
    expect(!inputs.mask || inputs.mask->scalar_type() == ScalarType::Bool, "mask in bool");
}

inline void check_normalization(const Inputs& inputs) {
    const int64_t channels = inputs.pixels.size(1);
    for (const Numbers* numbers : {&inputs.mean, &inputs.deviation}) {
        if (!*numbers) continue;
        expect(static_cast<int64_t>((*numbers)->size()) == channels, "a mean and a std for each channel");
        expect(channels <= kMaxChannels, "at most 128 channels with mean and std");
    }
}

inline void check_sizes(const Inputs& inputs) {
    constexpr int64_t kMaxSize = (int64_t{1} << 31) - 256;
    const Tensor& weight = inputs.weight;
    const int64_t columns = weight.size(0);
    expect(weight.size(2) > 0 && weight.size(3) > 0 && inputs.patches() > 0, "an image of at least one patch");
    expect(inputs.pixels.size(1) == weight.size(1), "pixels and weight with as many channels");
    for (const Tensor* tensor : {pointer_to(inputs.bias), pointer_to(inputs.cls), pointer_to(inputs.mask_token)}) {
        expect(tensor == nullptr || tensor->numel() == columns, "bias, cls and mask_token of E numbers");
    }
    expect(inputs.mask.has_value() == inputs.mask_token.has_value(), "both or neither of mask and mask_token");
    expect(!inputs.mask || inputs.mask->numel() == inputs.pixels.size(0) * inputs.patches(), "mask [B, patches]");
    expect(!inputs.pos || inputs.pos->numel() == inputs.tokens() * columns, "pos [1, tokens, E]");
    expect(inputs.patches() <= kMaxPatches, "at most 2**31 - 256 patches in an image");
    expect(inputs.depth() < kMaxSize && columns < kMaxSize, "a weight of less than 2**31 - 256 rows and columns");
}

// Throws std::invalid_argument unless the kernel supports these inputs.
inline void check(const Inputs& inputs) {
    expect(inputs.pixels.dim() == 4 && inputs.weight.dim() == 4,
           "pixels [B, C, H, W] and weight [E, C, patch height, patch width]");
    check_sizes(inputs);
    check_normalization(inputs);
    check_dtypes(inputs);
    expect(on_one_device({&inputs.pixels, &inputs.weight, pointer_to(inputs.bias), pointer_to(inputs.cls),
                          pointer_to(inputs.mask), pointer_to(inputs.mask_token), pointer_to(inputs.pos)}),
           "tensors on one device");
}

}  // namespace beit_fast::cuda
