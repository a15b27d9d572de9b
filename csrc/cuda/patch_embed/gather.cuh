#pragma once

#include "cuda/patch_embed/conversions.cuh"

namespace beit_fast::cuda {

// A row of the tile, which is one patch.
struct PatchRow {
    int64_t pixels;  // byte offset of its first pixel
    int64_t token;   // row of `out`
    int32_t patch;   // number within its image; -1 past the last row
    int32_t masked;
};

__device__ __forceinline__ PatchRow find_patch(const Arguments& arguments, int64_t row) {
    const bool exists = row < arguments.rows;
    const int64_t known = exists ? row : arguments.rows - 1;  // a patch that can be read
    const uint32_t patches = arguments.pixels.patches.value;
    const int64_t image = known / patches;
    const uint32_t patch = static_cast<uint32_t>(known - image * patches);
    const bool has_cls = arguments.cls.data != nullptr;
    return {arguments.pixels.row_offset(image, patch),
            image * (static_cast<int64_t>(patches) + has_cls) + has_cls + patch,
            exists ? static_cast<int32_t>(patch) : -1,
            arguments.mask != nullptr && load_byte(arguments.mask + known) != 0};
}

struct Normalization {
    float mean;
    float inverse_std;

    // Bytes and their mean have few bits, so one fused multiply-add is accurate; other pixels subtract first.
    __device__ __forceinline__ float apply(float pixel, Scalar type) const {
        if (type == Scalar::kUint8) return fmaf(pixel, inverse_std, -mean * inverse_std);
        return (pixel - mean) * inverse_std;
    }
};

// One thread's share of a tile of pixels, copied from the image through registers to shared memory. Of every slab
// the thread has one vector of depth (or, where pixels are not adjacent, one number) in some of the rows.
template <Arithmetic arithmetic, class Tile>
class PixelGather {
  public:
    static constexpr int kVector = vector_length(arithmetic);
    static constexpr int kSlabDepth = kChunks * kVector;
    static constexpr int kVectorRows = Tile::kRows * kChunks / kThreads;
    static constexpr int kNumberRows = kVectorRows * kVector;

    __device__ __forceinline__ PixelGather(const Arguments& arguments, const PatchRow* rows,
                                           const Normalization* normalization)
        : pixels_(arguments.pixels), depth_(arguments.depth), rows_(rows), normalization_(normalization) {}

    // Start to load depths `first` to `first` + kSlabs * kSlabDepth - 1.
    __device__ __forceinline__ void load(uint32_t first) {
        with_type(pixels_.type, [&](auto type) {
            constexpr Scalar kType = decltype(type)::value;
#pragma unroll
            for (int slab = 0; slab < Tile::kSlabs; ++slab) {
                if (pixels_.vector) {
                    load_vectors<kType>(words_[slab], first + slab * kSlabDepth + vector_place());
                } else {
                    load_numbers<kType>(words_[slab], first + slab * kSlabDepth + number_place());
                }
            }
        });
    }

    // Normalize, round and store what `load(first)` has loaded.
    __device__ __forceinline__ void store(char* stage, uint32_t first) const {
        const bool copied = pixels_.vector && !pixels_.normalized && is_operand<arithmetic>(pixels_.type);
#pragma unroll
        for (int slab = 0; slab < Tile::kSlabs; ++slab) {
            char* place = stage + slab * Tile::kRows * kSlabBytes;
            const uint32_t k = first + slab * kSlabDepth;
            if (copied) {
                copy_vectors(place, words_[slab]);
            } else if (pixels_.vector) {
                with_type(pixels_.type, [&](auto type) {
                    store_vectors<decltype(type)::value>(place, words_[slab], k + vector_place());
                });
            } else {
                store_numbers(place, words_[slab], k + number_place());
            }
        }
    }

  private:
    __device__ __forceinline__ static uint32_t vector_place() { return threadIdx.x % kChunks * kVector; }
    __device__ __forceinline__ static uint32_t vector_row(int i) {
        return threadIdx.x / kChunks + i * (kThreads / kChunks);
    }
    __device__ __forceinline__ static uint32_t number_place() { return threadIdx.x % kSlabDepth; }
    __device__ __forceinline__ static uint32_t number_row(int i) {
        return threadIdx.x / kSlabDepth + i * (kThreads / kSlabDepth);
    }

    template <Scalar type>
    __device__ __forceinline__ void load_vectors(uint32_t* words, uint32_t k) const {
        const bool exists = k < depth_;
        const char* source = pixels_.data + pixels_.depth_offset(exists ? k : 0);
#pragma unroll
        for (int i = 0; i < kVectorRows; ++i) {
            uint32_t* target = words + i * kVector;
            if (exists) {
                load_bytes<kVector * bytes_of(type)>(target, source + rows_[vector_row(i)].pixels);
            } else {
#pragma unroll
                for (int j = 0; j < kVector; ++j) target[j] = 0;
            }
        }
    }

    template <Scalar type>
    __device__ __forceinline__ void load_numbers(uint32_t* words, uint32_t k) const {
        const bool exists = k < depth_;
        const char* source = pixels_.data + pixels_.depth_offset(exists ? k : 0);
#pragma unroll
        for (int i = 0; i < kNumberRows; ++i) {
            words[i] = exists ? load_number<type>(source + rows_[number_row(i)].pixels) : 0;
        }
#pragma unroll
        for (int i = 0; i < kNumberRows; ++i) words[i] = float_to_bits(number_in<type>(words + i, 0));
    }

    // Of depths k, k + 1, ... Past the end any depth is valid: pixels are finite there, and weights are 0.
    template <int count>
    __device__ __forceinline__ void find_normalization(Normalization (&found)[count], uint32_t k) const {
        uint32_t channel = pixels_.normalized ? pixels_.channel(k < depth_ ? k : 0) : 0;
        found[0] = pixels_.normalized ? normalization_[channel] : Normalization{0.0f, 1.0f};
        const bool differ = pixels_.normalized && pixels_.channels_adjacent();
#pragma unroll
        for (int j = 0; j < count; ++j) {
            found[j] = differ ? normalization_[channel] : found[0];
            channel = channel + 1 == pixels_.channels.value ? 0 : channel + 1;
        }
    }

    __device__ __forceinline__ void copy_vectors(char* place, const uint32_t* words) const {
#pragma unroll
        for (int i = 0; i < kVectorRows; ++i) {
            const uint32_t* vector = words + i * kVector;
            store_chunk(place, vector_row(i), make_uint4(vector[0], vector[1], vector[2], vector[3]));
        }
    }

    template <Scalar type>
    __device__ __forceinline__ void store_vectors(char* place, const uint32_t* words, uint32_t k) const {
        Normalization normalization[kVector];
        find_normalization(normalization, k);
#pragma unroll
        for (int i = 0; i < kVectorRows; ++i) {
            float numbers[kVector];
#pragma unroll
            for (int j = 0; j < kVector; ++j) {
                numbers[j] = normalization[j].apply(number_in<type>(words + i * kVector, j), type);
            }
            store_chunk(place, vector_row(i), pack(numbers));
        }
    }

    __device__ __forceinline__ void store_numbers(char* place, const uint32_t* words, uint32_t k) const {
        Normalization normalization[1];
        find_normalization(normalization, k);
        const uint32_t chunk = threadIdx.x % kSlabDepth / kVector;
        const uint32_t within = threadIdx.x % kVector * (16 / kVector);
#pragma unroll
        for (int i = 0; i < kNumberRows; ++i) {
            const float pixel = normalization[0].apply(bits_to_float(words[i]), pixels_.type);
            char* target = place + pixel_place(number_row(i), chunk) + within;
            if constexpr (is_half(arithmetic)) {
                const uint32_t bits = pack_operands<arithmetic>(pixel, 0.0f);
                *reinterpret_cast<uint16_t*>(target) = static_cast<uint16_t>(bits);
            } else {
                *reinterpret_cast<uint32_t*>(target) = round_operand<arithmetic>(pixel);
            }
        }
    }

    __device__ __forceinline__ static uint4 pack(const float (&numbers)[kVector]) {
        if constexpr (is_half(arithmetic)) {
            return make_uint4(pack_operands<arithmetic>(numbers[0], numbers[1]),
                              pack_operands<arithmetic>(numbers[2], numbers[3]),
                              pack_operands<arithmetic>(numbers[4], numbers[5]),
                              pack_operands<arithmetic>(numbers[6], numbers[7]));
        } else {
            return make_uint4(round_operand<arithmetic>(numbers[0]), round_operand<arithmetic>(numbers[1]),
                              round_operand<arithmetic>(numbers[2]), round_operand<arithmetic>(numbers[3]));
        }
    }

    __device__ __forceinline__ static void store_chunk(char* place, uint32_t row, uint4 words) {
        *reinterpret_cast<uint4*>(place + pixel_place(row, threadIdx.x % kChunks)) = words;
    }

    const Pixels& pixels_;
    const uint32_t depth_;
    const PatchRow* rows_;
    const Normalization* normalization_;
    uint32_t words_[Tile::kSlabs][kNumberRows];  // as loaded; single numbers as fp32
};

// Copies the weight's depths `first` onwards of the block's columns to shared memory; zeros past its end.
template <Arithmetic arithmetic, class Tile>
__device__ __forceinline__ void copy_weights(const Arguments& arguments, char* stage, int32_t first_column,
                                             uint32_t first) {
    constexpr int kVector = vector_length(arithmetic);
    constexpr int kColumns = Tile::kColumns * kChunks / kThreads;
    const uint32_t chunk = threadIdx.x % kChunks;
#pragma unroll
    for (int slab = 0; slab < Tile::kSlabs; ++slab) {
        const uint32_t k = first + (slab * kChunks + chunk) * kVector;
#pragma unroll
        for (int i = 0; i < kColumns; ++i) {
            const uint32_t place = threadIdx.x / kChunks + i * (kThreads / kChunks);
            const int32_t column = first_column + static_cast<int32_t>(place);
            const bool exists = k < static_cast<uint32_t>(arguments.depth) && column < arguments.columns;
            const int64_t offset = column * arguments.weight_stride + static_cast<int64_t>(k) * (16 / kVector);
            copy_async(stage + slab * Tile::kColumns * kSlabBytes + weight_place(place, chunk),
                       arguments.weight + (exists ? offset : 0), exists);
        }
    }
}

}  // namespace beit_fast::cuda
