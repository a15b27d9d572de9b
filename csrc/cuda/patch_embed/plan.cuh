#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>

#include "cuda/patch_embed/arguments.cuh"

// From the sizes, strides and addresses of one call to the kernel's arguments: free of CUDA and torch.
namespace beit_fast::cuda {

// One call. The weight is [E, depth] in the order of `channels_last`, in rows that begin at multiples of 16 bytes.
struct Call {
    const char* pixels;
    Scalar pixel_type;
    int64_t sizes[4], strides[4];  // of the pixels [B, C, H, W]; strides in elements
    int64_t patch_height, patch_width;
    const char* weight;
    int64_t weight_stride;  // bytes
    int64_t columns;        // E
    Rows bias, cls, mask_token, positions;
    const uint8_t* mask;
    char* out;
    Scalar out_type;
    const double* mean;  // null, or one number per channel; likewise the standard deviation
    const double* deviation;
};

// Whether the depth of a patch is best taken as (row, column, channel), because the channels are adjacent in memory.
inline bool channels_last(const int64_t* sizes, const int64_t* strides) {
    return sizes[1] > 1 && strides[1] < strides[3];
}

inline bool is_multiple(int64_t number, int64_t of) { return number % of == 0; }

inline bool is_aligned(const void* pointer, int64_t to) {
    return is_multiple(static_cast<int64_t>(reinterpret_cast<uintptr_t>(pointer)), to);
}

inline bool depth_is_adjacent(const Pixels& pixels, int vector_length) {
    const int64_t bytes = bytes_of(pixels.type);
    const int64_t alignment = std::min<int64_t>(16, vector_length * bytes);
    const int64_t steps[] = {pixels.image_stride, pixels.patch_row_stride, pixels.patch_column_stride,
                             pixels.outer_stride, pixels.middle_stride};
    const bool steps_fit = std::all_of(std::begin(steps), std::end(steps),
                                       [&](int64_t step) { return is_multiple(step, alignment); });
    return pixels.inner_stride == bytes && is_multiple(pixels.inner_size.value, vector_length) && steps_fit &&
           is_aligned(pixels.data, alignment);
}

inline Pixels plan_pixels(const Call& call, int vector_length) {
    const int64_t bytes = bytes_of(call.pixel_type);
    const int64_t image = call.strides[0] * bytes, channel = call.strides[1] * bytes;
    const int64_t row = call.strides[2] * bytes, column = call.strides[3] * bytes;
    const int64_t channels = call.sizes[1], height = call.patch_height, width = call.patch_width;
    const int64_t patch_columns = call.sizes[3] / width;
    const int64_t patches = call.sizes[2] / height * patch_columns;

    Pixels pixels{};
    pixels.data = call.pixels;
    pixels.type = call.pixel_type;
    pixels.image_stride = image;
    pixels.patch_row_stride = row * height;
    pixels.patch_column_stride = column * width;
    pixels.patches = make_divisor(patches);
    pixels.patch_columns = make_divisor(patch_columns);
    pixels.channels = make_divisor(std::max<int64_t>(channels, 1));
    pixels.normalized = call.mean != nullptr || call.deviation != nullptr;

    const bool last = channels_last(call.sizes, call.strides);
    int64_t middle_size = width, inner_size = std::max<int64_t>(channels, 1);
    pixels.outer_stride = row, pixels.middle_stride = column, pixels.inner_stride = channel;
    if (!last) {
        middle_size = height, inner_size = width;
        pixels.outer_stride = channel, pixels.middle_stride = row, pixels.inner_stride = column;
    }
    pixels.channel_span = make_divisor(last ? 1 : height * width);
    if (pixels.middle_stride == inner_size * pixels.inner_stride) {
        inner_size *= middle_size;
        middle_size = 1;
        pixels.middle_stride = 0;
    }
    pixels.inner_size = make_divisor(inner_size);
    pixels.middle_size = make_divisor(middle_size);
    pixels.vector = depth_is_adjacent(pixels, vector_length);
    return pixels;
}

// Whether every access to eight columns, from a multiple of eight on, can be one of 16 bytes.
inline bool columns_are_aligned(const Call& call) {
    const void* addresses[] = {call.bias.data, call.cls.data, call.mask_token.data, call.positions.data, call.out};
    return is_multiple(call.columns, 8) && std::all_of(std::begin(addresses), std::end(addresses),
                                                       [](const void* address) { return is_aligned(address, 16); });
}

inline Arguments plan(const Call& call, Arithmetic arithmetic) {
    Arguments arguments{};
    arguments.pixels = plan_pixels(call, vector_length(arithmetic));
    arguments.weight = call.weight;
    arguments.weight_stride = call.weight_stride;
    arguments.bias = call.bias;
    arguments.cls = call.cls;
    arguments.mask_token = call.mask_token;
    arguments.positions = call.positions;
    arguments.mask = call.mask;
    arguments.out = call.out;
    arguments.out_type = call.out_type;
    arguments.aligned = columns_are_aligned(call);
    arguments.rows = call.sizes[0] * arguments.pixels.patches.value;
    arguments.depth = static_cast<int32_t>(call.sizes[1] * call.patch_height * call.patch_width);
    arguments.columns = static_cast<int32_t>(call.columns);
    for (int64_t channel = 0; arguments.pixels.normalized && channel < call.sizes[1]; ++channel) {
        arguments.mean[channel] = call.mean ? static_cast<float>(call.mean[channel]) : 0.0f;
        arguments.inverse_std[channel] = call.deviation ? 1.0f / static_cast<float>(call.deviation[channel]) : 1.0f;
    }
    return arguments;
}

inline int64_t tiles_of(int64_t size, int64_t tile) { return (size + tile - 1) / tile; }

template <class Tile>
int64_t blocks_of(const Arguments& arguments) {
    return tiles_of(arguments.rows, Tile::kRows) * tiles_of(arguments.columns, Tile::kColumns);
}

// The number of blocks to launch: one-dimensional, since the other dimensions of a grid end at 65535.
template <class Tile>
int64_t plan_tiles(Arguments& arguments) {
    arguments.column_tiles = make_divisor(tiles_of(arguments.columns, Tile::kColumns));
    return blocks_of<Tile>(arguments);
}

// Large tiles read less memory. Small tiles occupy more SMs if there is little work.
inline bool wants_large_tiles(const Arguments& arguments, int num_sms) {
    return blocks_of<LargeTile>(arguments) >= num_sms;
}

}  // namespace beit_fast::cuda
