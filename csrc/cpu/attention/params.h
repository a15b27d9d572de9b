// The parameters of the attention kernels: plain pointers, sizes and strides.
#pragma once

#include <cstdint>

namespace beit_fast {

enum class Scalar : uint8_t { f64, f32, bf16, f16 };

// [B, N, H, D] with any strides, in elements.
struct TokensView {
    const void* data = nullptr;
    int64_t batch_stride = 0, token_stride = 0, head_stride = 0, dim_stride = 1;
};

// The bias table [(2 * height - 1) * (2 * width - 1) + 3, H] with any strides; data is null without a bias.
struct TableView {
    const void* data = nullptr;
    Scalar type = Scalar::f32;
    int64_t row_stride = 0, head_stride = 0;
};

// bool [B, N], true where a key may be attended to; data is null if all may be.
struct MaskView {
    const uint8_t* data = nullptr;
    int64_t batch_stride = 0, token_stride = 0;
};

struct AttentionParams {
    int64_t batch = 0, tokens = 0, heads = 0, head_dim = 0;
    int64_t window_height = 0, window_width = 0;  // in patches; ignored without a table
    Scalar type = Scalar::f32;                    // of q, k and v
    TokensView q, k, v;
    TableView table;
    MaskView key_mask;
    double scale = 1.0;
    double dropout_p = 0.0;
    uint64_t seed = 0;

    bool has_bias() const { return table.data != nullptr; }
};

struct ForwardParams : AttentionParams {
    void* out = nullptr;  // [B, N, H, D], contiguous, of `type`
    void* lse = nullptr;  // [B, H, N], fp32, or fp64 if `type` is f64
};

// If there are few heads, several items share the keys of a head, so that more threads have work.
struct BackwardParams : AttentionParams {
    TokensView grad_out, out;
    const void* lse = nullptr;  // [B, H, N] with any strides, fp32, or fp64 if `type` is f64
    int64_t lse_batch_stride = 0, lse_head_stride = 0, lse_token_stride = 0;
    void *grad_q = nullptr, *grad_k = nullptr, *grad_v = nullptr;  // [B, N, H, D], contiguous; null if not needed
    void* grad_table = nullptr;                                    // [rows, H], contiguous, of the table's type
    int64_t num_splits = 1;
    void* partial_grad_q = nullptr;      // [num_splits, B, N, H, D] in fp32 (fp64), null if num_splits is 1
    void* partial_grad_table = nullptr;  // [H, B, num_splits, rows] in fp32 (fp64), null without a table gradient
};

}  // namespace beit_fast
