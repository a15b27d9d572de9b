#include "cpu/patch_embed/arguments.h"

#include <algorithm>
#include <string>

namespace beit_fast::patch_embed {

using torch::headeronly::ScalarType;

namespace {

using Problems = std::vector<std::string>;
using Numbers = std::optional<std::vector<double>>;

constexpr const char* float_types = "float16, bfloat16, float32 or float64";

ScalarType wider(ScalarType first, ScalarType second) {
    if (first == second) return first;
    return first == ScalarType::Double || second == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_types(const Arguments& given, Problems& problems) {
    const ScalarType pixels = given.pixels.scalar_type();
    if (!is_float(pixels) && pixels != ScalarType::Byte) {
        problems.push_back(std::string("pixels must be uint8, ") + float_types);
    }
    for (const auto& [name, tensor] : {Argument{"weight", &given.weight}, {"bias", pointer_to(given.bias)},
                                       {"cls", pointer_to(given.cls)}, {"mask_token", pointer_to(given.mask_token)},
                                       {"pos", pointer_to(given.pos)}}) {
        if (tensor != nullptr && !is_float(tensor->scalar_type())) {
            problems.push_back(std::string(name) + " must be " + float_types);
        }
    }
}

void check_pixels(const Arguments& given, Problems& problems) {
    const int64_t channels = given.pixels.size(1);
    const Tensor& weight = given.weight;
    if (channels != weight.size(1)) {
        problems.push_back("pixels have " + std::to_string(channels) + " channels, weight takes " +
                           std::to_string(weight.size(1)));
    }
    if (given.pixels.size(2) < weight.size(2) || given.pixels.size(3) < weight.size(3)) {
        problems.push_back("the image is smaller than one patch");
    }
    using NamedNumbers = std::pair<const char*, const Numbers&>;
    for (const auto& [name, numbers] : {NamedNumbers{"mean", given.mean}, {"std", given.std}}) {
        if (numbers && static_cast<int64_t>(numbers->size()) != channels) {
            problems.push_back(std::string(name) + " must have one number for each of the " +
                               std::to_string(channels) + " channels");
        }
    }
    if (given.std && std::count(given.std->begin(), given.std->end(), 0.0) > 0) {
        problems.push_back("std must not contain 0");
    }
    if (given.pixels.scalar_type() == ScalarType::Byte && !(given.mean && given.std)) {
        problems.push_back("uint8 pixels need mean and std");
    }
}

void check_tokens(const Arguments& given, Problems& problems) {
    const int64_t embed = given.weight.size(0);
    for (const auto& [name, tensor] : {Argument{"bias", pointer_to(given.bias)}, {"cls", pointer_to(given.cls)},
                                       {"mask_token", pointer_to(given.mask_token)}}) {
        if (tensor != nullptr && tensor->numel() != embed) {
            problems.push_back(std::string(name) + " must hold " + std::to_string(embed) + " numbers, as weight has " +
                               std::to_string(embed) + " output channels");
        }
    }
    if (given.mask.has_value() != given.mask_token.has_value()) {
        problems.push_back("mask and mask_token go together: give both or neither");
    }
    if (given.patches() == 0) return;  // said before; what must have a token each is not judged
    const std::vector<int64_t> mask_shape = {given.pixels.size(0), given.patches()};
    if (given.mask && (given.mask->scalar_type() != ScalarType::Bool || !given.mask->sizes().equals(mask_shape))) {
        problems.push_back("mask must be bool [B, patches] = " + shape_text(mask_shape));
    }
    const std::vector<int64_t> pos_shape = {1, given.tokens(), embed};
    if (given.pos && !given.pos->sizes().equals(pos_shape)) {
        problems.push_back("pos must be [1, tokens, E] = " + shape_text(pos_shape));
    }
}

void check_devices(const Arguments& given, Problems& problems) {
    for (const Tensor* tensor : {&given.weight, pointer_to(given.bias), pointer_to(given.cls), pointer_to(given.mask),
                                 pointer_to(given.mask_token), pointer_to(given.pos)}) {
        if (tensor != nullptr && !(tensor->device() == given.pixels.device())) {
            return problems.push_back("all tensors must be on one device");
        }
    }
}

}  // namespace

int64_t Arguments::patches() const {
    return (pixels.size(2) / weight.size(2)) * (pixels.size(3) / weight.size(3));
}

int64_t Arguments::tokens() const { return patches() + (cls ? 1 : 0); }

ScalarType Arguments::output_type() const {
    ScalarType type = weight.scalar_type();
    for (const OptionalTensor* other : {&mask_token, &cls, &pos}) {
        if (*other) type = wider(type, (*other)->scalar_type());
    }
    return type;
}

void check(const Arguments& given) {
    Problems problems;
    if (given.pixels.dim() != 4 || given.weight.dim() != 4) {
        problems.push_back("pixels must be [B, C, H, W] and weight [E, C, patch height, patch width]");
    } else if (given.weight.size(1) == 0 || given.weight.size(2) == 0 || given.weight.size(3) == 0) {
        problems.push_back("weight must have at least one channel, row and column");
    } else {
        check_types(given, problems);
        check_pixels(given, problems);
        check_devices(given, problems);
        check_tokens(given, problems);
    }
    if (problems.empty()) return;
    raise_problems("patch_embed", problems,
                   {{"pixels", &given.pixels}, {"weight", &given.weight}, {"bias", pointer_to(given.bias)},
                    {"cls", pointer_to(given.cls)}, {"mask", pointer_to(given.mask)},
                    {"mask_token", pointer_to(given.mask_token)}, {"pos", pointer_to(given.pos)}});
}

}  // namespace beit_fast::patch_embed
