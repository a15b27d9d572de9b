#ifndef __CUDA_ARCH__  // host code only: no pass over torch's headers for each architecture

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/patch_embed/checks.cuh"
#include "cuda/patch_embed/device.cuh"
#include "cuda/patch_embed/launch.cuh"
#include "cuda/patch_embed/plan.cuh"

// beit_fast::_patch_embed_cuda: the arguments of patch_embed, and whether fp32 products may use TF32.
namespace beit_fast::cuda {
namespace {

ScalarType wider(ScalarType left, ScalarType right) { return left == right ? left : ScalarType::Float; }

ScalarType result_type(const Inputs& inputs) {
    ScalarType type = inputs.weight.scalar_type();
    for (const OptionalTensor* tensor : {&inputs.mask_token, &inputs.cls, &inputs.pos}) {
        if (*tensor) type = wider(type, (*tensor)->scalar_type());
    }
    return type;
}

Arithmetic arithmetic_of(ScalarType weight, bool allow_tf32) {
    if (weight == ScalarType::Half) return Arithmetic::kFloat16;
    if (weight == ScalarType::BFloat16) return Arithmetic::kBFloat16;
    return allow_tf32 ? Arithmetic::kTensorFloat32 : Arithmetic::kFloat32;
}

const char* address_of(const Tensor& tensor) { return static_cast<const char*>(tensor.const_data_ptr()); }

// The weight as [E, depth] in the order in which the pixels are read, in rows that begin at multiples of 16 bytes:
// a view if it is already stored so.
Tensor weight_rows(const Inputs& inputs, bool last) {
    Tensor weight = inputs.weight;
    if (last) weight = torch::stable::transpose(torch::stable::transpose(weight, 1, 3), 1, 2);  // [E, ph, pw, C]
    const int64_t columns = weight.size(0), depth = inputs.depth();
    Tensor rows = torch::stable::reshape(torch::stable::contiguous(weight), {columns, depth});
    const int64_t per_vector = 16 / static_cast<int64_t>(rows.element_size());
    if (is_multiple(depth, per_vector) && is_aligned(address_of(rows), 16)) return rows;
    Tensor padded = torch::stable::new_zeros(rows, {columns, tiles_of(depth, per_vector) * per_vector});
    Tensor inside = torch::stable::narrow(padded, 1, 0, depth);
    torch::stable::copy_(inside, rows);
    return padded;
}

// Contiguous, if passed; `kept` holds a reference until the launch.
Rows rows_of(const OptionalTensor& tensor, std::vector<Tensor>& kept) {
    if (!tensor) return {nullptr, Scalar::kFloat32};
    kept.push_back(torch::stable::contiguous(*tensor));
    return {address_of(kept.back()), *scalar_of(tensor->scalar_type())};
}

void launch_call(const Call& call, Arithmetic arithmetic, int32_t device) {
    Arguments arguments = plan(call, arithmetic);
    const bool large = wants_large_tiles(arguments, count_sms(device));
    switch (arithmetic) {
        case Arithmetic::kFloat16:
            return launch<Arithmetic::kFloat16>(arguments, large, device);
        case Arithmetic::kBFloat16:
            return launch<Arithmetic::kBFloat16>(arguments, large, device);
        case Arithmetic::kTensorFloat32:
            return launch<Arithmetic::kTensorFloat32>(arguments, large, device);
        case Arithmetic::kFloat32:
            return launch<Arithmetic::kFloat32>(arguments, large, device);
    }
}

Tensor embed(const Inputs& inputs, bool allow_tf32) {
    check(inputs);
    const Tensor& pixels = inputs.pixels;
    const int32_t device = pixels.get_device_index();
    const OnDevice guard(device);
    const ScalarType type = result_type(inputs);
    const int64_t columns = inputs.weight.size(0);
    Tensor out = torch::stable::new_empty(inputs.weight, {pixels.size(0), inputs.tokens(), columns}, type);
    if (out.numel() == 0) return out;

    Call call{};
    call.pixels = address_of(pixels);
    call.pixel_type = *scalar_of(pixels.scalar_type());
    for (int64_t i = 0; i < 4; ++i) call.sizes[i] = pixels.size(i), call.strides[i] = pixels.stride(i);
    call.patch_height = inputs.weight.size(2), call.patch_width = inputs.weight.size(3);

    std::vector<Tensor> kept;
    const Tensor weight = weight_rows(inputs, channels_last(call.sizes, call.strides));
    call.weight = address_of(weight);
    call.weight_stride = weight.stride(0) * static_cast<int64_t>(weight.element_size());
    call.columns = columns;
    call.bias = rows_of(inputs.bias, kept);
    call.cls = rows_of(inputs.cls, kept);
    call.mask_token = rows_of(inputs.mask_token, kept);
    call.positions = rows_of(inputs.pos, kept);
    if (inputs.mask) {
        kept.push_back(torch::stable::contiguous(*inputs.mask));
        call.mask = reinterpret_cast<const uint8_t*>(address_of(kept.back()));
    }
    call.out = static_cast<char*>(out.mutable_data_ptr());
    call.out_type = *scalar_of(type);
    call.mean = inputs.mean ? inputs.mean->data() : nullptr;
    call.deviation = inputs.deviation ? inputs.deviation->data() : nullptr;
    launch_call(call, arithmetic_of(inputs.weight.scalar_type(), allow_tf32), device);
    return out;
}

Tensor patch_embed(const Tensor& pixels, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& cls,
                   const OptionalTensor& mask, const OptionalTensor& mask_token, const OptionalTensor& pos,
                   const Numbers& mean, const Numbers& deviation, bool allow_tf32) {
    return embed({pixels, weight, bias, cls, mask, mask_token, pos, mean, deviation}, allow_tf32);
}

}  // namespace
}  // namespace beit_fast::cuda

STABLE_TORCH_LIBRARY_IMPL(beit_fast, CUDA, m) {
    m.impl("_patch_embed_cuda", TORCH_BOX(&beit_fast::cuda::patch_embed));
}

#endif
