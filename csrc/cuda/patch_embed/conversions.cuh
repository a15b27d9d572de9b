#pragma once

#include "cuda/patch_embed/instructions.cuh"

// Conversions between the dtypes of memory, fp32, and the operands of a product.
namespace beit_fast::cuda {

// Call function(constant<type>) for the type that is known at run time only; the branch is the same in every thread.
template <Scalar type>
struct Constant {
    static constexpr Scalar value = type;
};

template <class Function>
__device__ __forceinline__ void with_float_type(Scalar type, const Function& function) {
    if (type == Scalar::kFloat32) {
        function(Constant<Scalar::kFloat32>());
    } else if (type == Scalar::kFloat16) {
        function(Constant<Scalar::kFloat16>());
    } else {
        function(Constant<Scalar::kBFloat16>());
    }
}

template <class Function>
__device__ __forceinline__ void with_type(Scalar type, const Function& function) {
    if (type == Scalar::kUint8) {
        function(Constant<Scalar::kUint8>());
    } else {
        with_float_type(type, function);
    }
}

// Number `index` of numbers that are packed into words.
template <Scalar type>
__device__ __forceinline__ float number_in(const uint32_t* words, int index) {
    if constexpr (type == Scalar::kUint8) return byte_to_float(words[index / 4], index % 4);
    if constexpr (type == Scalar::kFloat32) return bits_to_float(words[index]);
    const uint32_t word = words[index / 2];
    if constexpr (type == Scalar::kFloat16) return half_to_float(index % 2 ? word >> 16 : word & 0xffffu);
    return bits_to_float(index % 2 ? word & 0xffff0000u : word << 16);
}

template <Scalar type>
__device__ __forceinline__ uint32_t load_number(const void* p) {
    if constexpr (type == Scalar::kUint8) return load_byte(p);
    if constexpr (type == Scalar::kFloat32) return load_word(p);
    return load_short(p);
}

// `length` bytes, 4 to 32 of them, to words.
template <int length>
__device__ __forceinline__ void load_bytes(uint32_t* words, const char* p) {
    if constexpr (length == 4) {
        words[0] = load_word(p);
    } else if constexpr (length == 8) {
        const uint2 two = load_two_words(p);
        words[0] = two.x, words[1] = two.y;
    } else {
#pragma unroll
        for (int i = 0; i < length / 16; ++i) {
            const uint4 four = load_four_words(p + 16 * i);
            words[4 * i] = four.x, words[4 * i + 1] = four.y, words[4 * i + 2] = four.z, words[4 * i + 3] = four.w;
        }
    }
}

// An operand of a product: numbers i and i + 1 for half precision, number i for fp32.
template <Arithmetic arithmetic>
__device__ __forceinline__ uint32_t pack_operands(float low, float high) {
    return arithmetic == Arithmetic::kFloat16 ? pack_halves(low, high) : pack_bfloats(low, high);
}

template <Arithmetic arithmetic>
__device__ __forceinline__ uint32_t round_operand(float value) {
    return arithmetic == Arithmetic::kTensorFloat32 ? round_to_tensor_float(value) : float_to_bits(value);
}

// Whether numbers of this type are operands of the product without a conversion.
template <Arithmetic arithmetic>
__device__ __forceinline__ bool is_operand(Scalar type) {
    if (arithmetic == Arithmetic::kFloat16) return type == Scalar::kFloat16;
    if (arithmetic == Arithmetic::kBFloat16) return type == Scalar::kBFloat16;
    return arithmetic == Arithmetic::kFloat32 && type == Scalar::kFloat32;
}

}  // namespace beit_fast::cuda
