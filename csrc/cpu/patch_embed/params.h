#pragma once

#include <cstdint>

// The parameters and the kernels of an instruction set: plain data, so that code compiled for different instruction
// sets shares no inline function.

namespace beit_fast::patch_embed {

enum class Number : int8_t { uint8, float16, bfloat16, float32, float64 };

// tokens[b, first + p, e] = sum over k of patch[b, p, k] * weight[e, k] + bias[e], with mask tokens and positions.
// "Sums" are float, or double if the output is float64. Optional tensors are nullptr.
struct Params {
    const void* pixels;
    Number pixel_type;
    int64_t pixel_strides[4];  // of [B, C, H, W], in elements
    int64_t batch, channels, patch_height, patch_width;
    int64_t patch_columns;  // patches in a row of the image
    int64_t patches;        // P, in an image
    const void* shift;      // [C] sums: pixels become (pixel - shift) * factor
    const void* factor;     // [C] sums

    const void* weight;  // [E, K] contiguous
    Number weight_type;
    int64_t embed;  // E
    int64_t depth;  // K = C * patch height * patch width

    const void* bias;        // [E] sums
    const void* cls;         // [E] sums
    const void* mask_token;  // [E] sums
    const bool* mask;        // [B, P]
    int64_t mask_strides[2];
    const void* position;  // [T, E] contiguous, in the type of the output

    void* output;  // [B, T, E] contiguous
    Number output_type;
    int64_t tokens;  // T = first + P
    int64_t first;   // 1 with a CLS token, else 0
};

// The functions of an instruction set. The weight is packed into panels of columns and patches are gathered into rows.
// A product of a block of rows and a panel writes one block of the output.
struct Kernel {
    int64_t panel_columns;  // E in a panel
    int64_t row_tile;       // rows that are multiplied at once: blocks of rows are best multiples of it
    int64_t row_bytes;      // one gathered patch
    int64_t panel_bytes;    // one packed panel

    void (*pack)(const Params& params, void* packed_panel, int64_t panel);
    // Patches [first, last) of all B * P into consecutive rows of `rows`.
    void (*gather)(const Params& params, void* rows, int64_t first, int64_t last);
    // The same patches, gathered in `rows`, times the panel packed at `packed_panel`. Full tiles of `rows` are read.
    // Prefetches the panel at `next_panel` unless it is nullptr.
    void (*multiply)(const Params& params, const void* rows, const void* packed_panel, const void* next_panel,
                     int64_t panel, int64_t first, int64_t last);
    void (*write_cls)(const Params& params);  // the first token of every image
};

}  // namespace beit_fast::patch_embed
