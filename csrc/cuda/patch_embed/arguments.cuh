#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define BEIT_FAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define BEIT_FAST_HOST_DEVICE inline
#endif

// The arguments of the kernel, and index arithmetic; plain C++.
namespace beit_fast::cuda {

enum class Scalar : int32_t { kUint8, kFloat16, kBFloat16, kFloat32 };

BEIT_FAST_HOST_DEVICE constexpr int bytes_of(Scalar type) {
    return type == Scalar::kUint8 ? 1 : type == Scalar::kFloat32 ? 4 : 2;
}

// The precision of products; sums are always fp32.
enum class Arithmetic { kFloat16, kBFloat16, kTensorFloat32, kFloat32 };

BEIT_FAST_HOST_DEVICE constexpr bool is_half(Arithmetic arithmetic) {
    return arithmetic == Arithmetic::kFloat16 || arithmetic == Arithmetic::kBFloat16;
}

// Numbers in 16 bytes of shared memory.
BEIT_FAST_HOST_DEVICE constexpr int vector_length(Arithmetic arithmetic) { return is_half(arithmetic) ? 8 : 4; }

constexpr int kMaxChannels = 128;  // with a mean or a standard deviation
constexpr int64_t kMaxPatches = (int64_t{1} << 31) - 256;  // of an image: a tile's patch numbers stay below 2^31

// Division by a number that is known at launch, of 0 <= n < 2^31: one multiplication (Granlund & Montgomery 1994).
struct Divisor {
    uint32_t value;
    uint32_t multiplier;
    uint32_t shift;

    BEIT_FAST_HOST_DEVICE uint32_t quotient(uint32_t n) const {
        const uint32_t high = static_cast<uint32_t>((static_cast<uint64_t>(n) * multiplier) >> 32);
        return (high + n) >> shift;
    }

    BEIT_FAST_HOST_DEVICE uint32_t remainder(uint32_t n) const { return n - quotient(n) * value; }
};

inline Divisor make_divisor(int64_t value) {
    uint32_t shift = 0;
    while ((int64_t{1} << shift) < value) ++shift;
    const uint64_t excess = (uint64_t{1} << shift) - static_cast<uint64_t>(value);
    const uint64_t multiplier = ((excess << 32) / static_cast<uint64_t>(value)) + 1;
    return {static_cast<uint32_t>(value), static_cast<uint32_t>(multiplier), shift};
}

// Where the number of patch m and depth k lies: row_offset(m) + depth_offset(k), in bytes. The depth runs over
// (channel, row, column) of a patch, or over (row, column, channel) for channels-last pixels.
struct Pixels {
    const char* data;
    Scalar type;
    bool vector;  // vector_length numbers of one depth vector are adjacent and aligned
    int64_t image_stride, patch_row_stride, patch_column_stride;
    int64_t outer_stride, middle_stride, inner_stride;  // of the depth's three dimensions
    Divisor inner_size, middle_size;
    Divisor patches, patch_columns;  // of an image; in a row of patches
    Divisor channel_span, channels;  // channel of depth k: (k / span) % channels
    bool normalized;

    BEIT_FAST_HOST_DEVICE int64_t row_offset(int64_t image, uint32_t patch) const {
        const uint32_t row = patch_columns.quotient(patch);
        const uint32_t column = patch - row * patch_columns.value;
        return image * image_stride + row * patch_row_stride + column * patch_column_stride;
    }

    BEIT_FAST_HOST_DEVICE int64_t depth_offset(uint32_t k) const {
        const uint32_t outer_middle = inner_size.quotient(k);
        const uint32_t outer = middle_size.quotient(outer_middle);
        const uint32_t inner = k - outer_middle * inner_size.value;
        const uint32_t middle = outer_middle - outer * middle_size.value;
        return outer * outer_stride + middle * middle_stride + inner * inner_stride;
    }

    BEIT_FAST_HOST_DEVICE uint32_t channel(uint32_t k) const { return channels.remainder(channel_span.quotient(k)); }

    // Whether the next number of a vector is of the next channel: otherwise all are of one.
    BEIT_FAST_HOST_DEVICE bool channels_adjacent() const { return channel_span.value == 1; }
};

// Rows of `columns` numbers each; data is null if the argument was not passed.
struct Rows {
    const char* data;
    Scalar type;
};

struct Arguments {
    Pixels pixels;
    const char* weight;     // [E, depth], rows padded with zeros to 16 bytes
    int64_t weight_stride;  // bytes
    Rows bias, cls, mask_token, positions;
    const uint8_t* mask;  // [B * P]
    char* out;            // [B, has_cls + P, E]
    Scalar out_type;
    bool aligned;  // eight columns of every row of numbers lie at a multiple of 16 bytes, and E is a multiple of 8
    int64_t rows;  // B * P
    int32_t depth, columns;
    Divisor column_tiles;
    float mean[kMaxChannels];
    float inverse_std[kMaxChannels];
};

// A block of 128 threads makes kRows x kColumns tokens; its four warps are two by two. In shared memory a slab is 64
// bytes of depth of each row.
template <int rows, int columns, int slabs>
struct Tile {
    static constexpr int kRows = rows, kColumns = columns, kSlabs = slabs;
    static constexpr int kResidentBlocks = rows * columns > 64 * 64 ? 2 : 4;  // that fit on an SM by their registers
    static constexpr int kWarpRows = rows / 2, kWarpColumns = columns / 2;
    static constexpr int kRowFragments = kWarpRows / 16;        // of 16 rows
    static constexpr int kColumnFragments = kWarpColumns / 32;  // of 32 columns
};

using LargeTile = Tile<128, 128, 1>;
using SmallTile = Tile<64, 64, 2>;

constexpr int kThreads = 128;
constexpr int kSlabBytes = 64;
constexpr int kChunks = 4;  // of 16 bytes in a slab
constexpr int kPixelStages = 2;
constexpr int kWeightStages = 3;

// Places of 16-byte chunks in a slab. The eight rows that a matrix load reads together, adjacent ones of the pixels
// and those of `fragment_column` of the weights, fall on all 32 banks. Rows 8 further on, columns 32 further on, and
// the other columns of a fragment have their chunks in the same order.
BEIT_FAST_HOST_DEVICE constexpr uint32_t pixel_place(uint32_t row, uint32_t chunk) {
    return row * kSlabBytes + ((chunk ^ ((row >> 1) & 3)) << 4);
}

BEIT_FAST_HOST_DEVICE constexpr uint32_t weight_place(uint32_t column, uint32_t chunk) {
    return column * kSlabBytes + ((chunk ^ ((column >> 3) & 3)) << 4);
}

// Map column n (0 to 7) of product `product` (0 to 3) to one of 32 columns. A thread holds columns 2q and 2q + 1 of each
// product, so it owns eight adjacent columns, 8q to 8q + 7.
BEIT_FAST_HOST_DEVICE constexpr uint32_t fragment_column(uint32_t product, uint32_t n) {
    return 8 * (n >> 1) + 2 * product + (n & 1);
}

}  // namespace beit_fast::cuda
