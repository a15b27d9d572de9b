#include "cpu/patch_embed/arguments.h"

#include <algorithm>

namespace beit_fast::patch_embed {

using torch::headeronly::ScalarType;

namespace {

using Numbers = std::optional<std::vector<double>>;

void expect(bool condition, const char* expected) { require(condition, "patch_embed", expected); }

ScalarType wider(ScalarType first, ScalarType second) {
    if (first == second) return first;
    return first == ScalarType::Double || second == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_types(const Arguments& given) {
    const ScalarType pixels = given.pixels.scalar_type();
    expect(is_float(pixels) || pixels == ScalarType::Byte, "pixels in uint8 or floating point");
    for (const Tensor* tensor : {&given.weight, pointer_to(given.bias), pointer_to(given.cls),
                                 pointer_to(given.mask_token), pointer_to(given.pos)}) {
        expect(tensor == nullptr || is_float(tensor->scalar_type()), "weight, tokens and positions in floating point");
    }
}

void check_pixels(const Arguments& given) {
    const int64_t channels = given.pixels.size(1);
    const Tensor& weight = given.weight;
    expect(channels == weight.size(1), "pixels and weight with as many channels");
    expect(given.pixels.size(2) >= weight.size(2) && given.pixels.size(3) >= weight.size(3),
           "an image of at least one patch");
    for (const Numbers* numbers : {&given.mean, &given.std}) {
        expect(!*numbers || static_cast<int64_t>((*numbers)->size()) == channels, "a mean and a std for each channel");
    }
    expect(!given.std || std::count(given.std->begin(), given.std->end(), 0.0) == 0, "std without 0");
    expect(given.pixels.scalar_type() != ScalarType::Byte || (given.mean && given.std),
           "mean and std for uint8 pixels");
}

void check_tokens(const Arguments& given) {
    const int64_t embed = given.weight.size(0);
    for (const Tensor* tensor : {pointer_to(given.bias), pointer_to(given.cls), pointer_to(given.mask_token)}) {
        expect(tensor == nullptr || tensor->numel() == embed, "bias, cls and mask_token of E numbers");
    }
    expect(given.mask.has_value() == given.mask_token.has_value(), "both or neither of mask and mask_token");
    expect(!given.mask || (given.mask->scalar_type() == ScalarType::Bool &&
                           has_shape(*given.mask, {given.pixels.size(0), given.patches()})),
           "mask in bool, [B, patches]");
    expect(!given.pos || has_shape(*given.pos, {1, given.tokens(), embed}), "pos [1, tokens, E]");
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
    expect(given.pixels.dim() == 4 && given.weight.dim() == 4,
           "pixels [B, C, H, W] and weight [E, C, patch height, patch width]");
    expect(given.weight.size(1) > 0 && given.weight.size(2) > 0 && given.weight.size(3) > 0,
           "weight with at least one channel, row and column");
    check_types(given);
    check_pixels(given);
    check_tokens(given);
    expect(on_one_device({&given.pixels, &given.weight, pointer_to(given.bias), pointer_to(given.cls),
                          pointer_to(given.mask), pointer_to(given.mask_token), pointer_to(given.pos)}),
           "tensors on one device");
}

}  // namespace beit_fast::patch_embed
