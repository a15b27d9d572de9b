#pragma once

#include "cuda/patch_embed/conversions.cuh"
#include "cuda/patch_embed/gather.cuh"
#include "cuda/patch_embed/multiply.cuh"

namespace beit_fast::cuda {

constexpr int kColumnsOfThread = 8;

// Eight adjacent columns, of which `count` exist.
struct Columns {
    float of[kColumnsOfThread];

    __device__ __forceinline__ void add(const Columns& other) {
#pragma unroll
        for (int e = 0; e < kColumnsOfThread; ++e) of[e] += other.of[e];
    }
};

__device__ __forceinline__ Columns load_columns(const Rows& rows, int64_t first, int count, bool aligned) {
    Columns columns{};
    if (rows.data == nullptr) return columns;
    with_float_type(rows.type, [&](auto type) {
        constexpr Scalar kType = decltype(type)::value;
        const char* source = rows.data + first * bytes_of(kType);
        if (aligned) {
            uint32_t words[kColumnsOfThread];
            load_bytes<kColumnsOfThread * bytes_of(kType)>(words, source);
#pragma unroll
            for (int e = 0; e < kColumnsOfThread; ++e) columns.of[e] = number_in<kType>(words, e);
        } else {
#pragma unroll
            for (int e = 0; e < kColumnsOfThread; ++e) {
                if (e >= count) continue;
                const uint32_t word = load_number<kType>(source + e * bytes_of(kType));
                columns.of[e] = number_in<kType>(&word, 0);
            }
        }
    });
    return columns;
}

__device__ __forceinline__ void store_columns(const Arguments& arguments, int64_t first, int count,
                                              const Columns& columns) {
    const Scalar type = arguments.out_type;
    char* target = arguments.out + first * bytes_of(type);
    uint32_t words[kColumnsOfThread];
    if (type == Scalar::kFloat32) {
#pragma unroll
        for (int e = 0; e < kColumnsOfThread; ++e) words[e] = float_to_bits(columns.of[e]);
    } else {
#pragma unroll
        for (int e = 0; e < kColumnsOfThread; e += 2) {
            words[e / 2] = type == Scalar::kFloat16 ? pack_halves(columns.of[e], columns.of[e + 1])
                                                    : pack_bfloats(columns.of[e], columns.of[e + 1]);
        }
    }
    if (arguments.aligned) {
        store_four_words(target, make_uint4(words[0], words[1], words[2], words[3]));
        if (type == Scalar::kFloat32) store_four_words(target + 16, make_uint4(words[4], words[5], words[6], words[7]));
        return;
    }
#pragma unroll
    for (int e = 0; e < kColumnsOfThread; ++e) {
        if (e >= count) continue;
        if (type == Scalar::kFloat32) {
            store_word(target + 4 * e, words[e]);
        } else {
            store_short(target + 2 * e, words[e / 2] >> (16 * (e % 2)) & 0xffffu);
        }
    }
}

// A warp's sums become tokens, 16 rows at a time through shared memory of its own, so that each row is written in one
// piece: + bias, or the mask token, + position. The row of an image's first patch writes the CLS token as well.
template <class Tile>
class TokenWriter {
  public:
    static constexpr int kLanes = Tile::kWarpColumns / kColumnsOfThread;  // of a row
    static constexpr int kRowBytes = Tile::kWarpColumns * 4 + 16;         // 16 spread the rows over the banks
    static constexpr int kWarpBytes = 16 * kRowBytes;

    // `scratch` is the warp's own kWarpBytes; `rows` those of its first row.
    __device__ __forceinline__ TokenWriter(const Arguments& arguments, char* scratch, const PatchRow* rows,
                                           int32_t first_column)
        : arguments_(arguments), scratch_(scratch), rows_(rows), lane_(threadIdx.x % 32) {
        column_ = first_column + lane_ % kLanes * kColumnsOfThread;
        count_ = arguments.columns - column_;
        if (count_ <= 0) return;
        bias_ = load(arguments.bias, 0);
        mask_token_ = load(arguments.mask_token, 0);
    }

    __device__ __forceinline__ void write(const Sums<Tile>& sums) const {
#pragma unroll 1
        for (int f = 0; f < Tile::kRowFragments; ++f) {
            __syncwarp();
#pragma unroll
            for (int known = 0; known < Tile::kRowFragments; ++known) {
                if (known == f) stage(sums.of[known]);  // registers have no index
            }
            __syncwarp();
            if (count_ <= 0) continue;
#pragma unroll 1
            for (int row = lane_ / kLanes; row < 16; row += 32 / kLanes) write_token(16 * f + row, row);
        }
    }

  private:
    __device__ __forceinline__ void stage(const float (&fragments)[Tile::kColumnFragments][2][8]) const {
#pragma unroll
        for (int g = 0; g < Tile::kColumnFragments; ++g) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                char* target = scratch_ + (lane_ / 4 + 8 * half) * kRowBytes + (32 * g + lane_ % 4 * 8) * 4;
                const float(&of)[8] = fragments[g][half];
                reinterpret_cast<float4*>(target)[0] = make_float4(of[0], of[1], of[2], of[3]);
                reinterpret_cast<float4*>(target)[1] = make_float4(of[4], of[5], of[6], of[7]);
            }
        }
    }

    __device__ __forceinline__ void write_token(int row, int staged_row) const {
        const PatchRow& patch = rows_[row];
        if (patch.patch < 0) return;
        Columns token = mask_token_;
        if (!patch.masked) {
            const char* source = scratch_ + staged_row * kRowBytes + lane_ % kLanes * kColumnsOfThread * 4;
            const float4 low = reinterpret_cast<const float4*>(source)[0];
            const float4 high = reinterpret_cast<const float4*>(source)[1];
            token = {{low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w}};
            token.add(bias_);
        }
        const bool has_cls = arguments_.cls.data != nullptr;
        write_row(token, patch.token, patch.patch + has_cls);
        if (has_cls && patch.patch == 0) write_row(load(arguments_.cls, 0), patch.token - 1, 0);
    }

    __device__ __forceinline__ void write_row(Columns token, int64_t row, int64_t position) const {
        token.add(load(arguments_.positions, position));
        store_columns(arguments_, row * arguments_.columns + column_, count_, token);
    }

    __device__ __forceinline__ Columns load(const Rows& rows, int64_t row) const {
        return load_columns(rows, row * arguments_.columns + column_, count_, arguments_.aligned);
    }

    const Arguments& arguments_;
    char* scratch_;
    const PatchRow* rows_;
    int lane_;
    int32_t column_;
    int32_t count_;
    Columns bias_{};
    Columns mask_token_{};
};

}  // namespace beit_fast::cuda
