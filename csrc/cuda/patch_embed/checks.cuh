#pragma once

#include <optional>
#include <string>
#include <vector>

#include "cuda/patch_embed/arguments.cuh"
#include "errors.h"

// What the CUDA kernel takes, and why it refuses the rest. beit_fast/validation.py has told most of it before.
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

inline void check_dtypes(const Inputs& inputs, std::vector<std::string>& problems) {
    const std::pair<const char*, const Tensor*> floats[] = {{"weight", &inputs.weight},
                                                            {"bias", pointer_to(inputs.bias)},
                                                            {"cls", pointer_to(inputs.cls)},
                                                            {"mask_token", pointer_to(inputs.mask_token)},
                                                            {"pos", pointer_to(inputs.pos)}};
    if (!scalar_of(inputs.pixels.scalar_type())) {
        problems.push_back("pixels must be uint8, float16, bfloat16 or float32");
    }
    for (const auto& [name, tensor] : floats) {
        if (tensor == nullptr) continue;
        const std::optional<Scalar> type = scalar_of(tensor->scalar_type());
        if (!type || *type == Scalar::kUint8) {
            problems.push_back(std::string(name) + " must be float16, bfloat16 or float32");
        }
    }
    if (inputs.mask && inputs.mask->scalar_type() != ScalarType::Bool) problems.push_back("mask must be bool");
}

inline void check_devices(const Inputs& inputs, std::vector<std::string>& problems) {
    const Tensor* others[] = {&inputs.weight,         pointer_to(inputs.bias),       pointer_to(inputs.cls),
                              pointer_to(inputs.mask), pointer_to(inputs.mask_token), pointer_to(inputs.pos)};
    for (const Tensor* other : others) {
        if (other == nullptr || other->device() == inputs.pixels.device()) continue;
        problems.push_back("all tensors must be on one device");
        return;
    }
}

inline void check_normalization(const Inputs& inputs, std::vector<std::string>& problems) {
    const int64_t channels = inputs.pixels.size(1);
    for (const Numbers* numbers : {&inputs.mean, &inputs.deviation}) {
        if (!*numbers) continue;
        if (static_cast<int64_t>((*numbers)->size()) != channels) {
            problems.push_back("mean and std must have one number for each of the " + std::to_string(channels) +
                               " channels");
        }
        if (channels > kMaxChannels) {
            problems.push_back("mean and std of more than " + std::to_string(kMaxChannels) + " channels");
        }
    }
}

inline void check_sizes(const Inputs& inputs, std::vector<std::string>& problems) {
    const Tensor& weight = inputs.weight;
    const int64_t columns = weight.size(0);
    if (inputs.pixels.size(1) != weight.size(1)) {
        problems.push_back("pixels have " + std::to_string(inputs.pixels.size(1)) + " channels, weight takes " +
                           std::to_string(weight.size(1)));
    }
    for (const OptionalTensor* tensor : {&inputs.bias, &inputs.cls, &inputs.mask_token}) {
        if (*tensor && (*tensor)->numel() != columns) {
            problems.push_back("bias, cls and mask_token must hold " + std::to_string(columns) + " numbers each");
        }
    }
    if (inputs.mask.has_value() != inputs.mask_token.has_value()) {
        problems.push_back("mask and mask_token go together: give both or neither");
    }
    if (inputs.mask && inputs.mask->numel() != inputs.pixels.size(0) * inputs.patches()) {
        problems.push_back("mask must be [B, patches]");
    }
    if (inputs.pos && inputs.pos->numel() != inputs.tokens() * columns) {
        problems.push_back("pos must be [1, tokens, E]");
    }
    if (inputs.patches() > kMaxPatches) problems.push_back("an image has more than 2**31 - 256 patches");
    if (inputs.depth() >= (int64_t{1} << 31) - 256 || columns >= (int64_t{1} << 31) - 256) {
        problems.push_back("weight has more than 2**31 - 256 rows or columns");
    }
}

// Throws std::invalid_argument unless the kernel can serve these inputs.
inline void check(const Inputs& inputs) {
    std::vector<std::string> problems;
    if (inputs.pixels.dim() != 4 || inputs.weight.dim() != 4) {
        problems.push_back("pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]");
    } else if (inputs.weight.size(2) < 1 || inputs.weight.size(3) < 1 || inputs.patches() < 1) {
        problems.push_back("the image is smaller than one patch");
    } else {
        check_sizes(inputs, problems);
        check_normalization(inputs, problems);
    }
    check_dtypes(inputs, problems);
    check_devices(inputs, problems);
    if (problems.empty()) return;
    raise_problems("_patch_embed_cuda", problems,
                   {{"pixels", &inputs.pixels},
                    {"weight", &inputs.weight},
                    {"bias", pointer_to(inputs.bias)},
                    {"cls", pointer_to(inputs.cls)},
                    {"mask", pointer_to(inputs.mask)},
                    {"mask_token", pointer_to(inputs.mask_token)},
                    {"pos", pointer_to(inputs.pos)}});
}

}  // namespace beit_fast::cuda
