// Sums to results: bias, GELU, residual.
#pragma once

#include "cpu/simd.h"
#include "cpu/linear/params.h"

namespace beit_fast::linear {
namespace {

// x Phi(x) with the normal distribution's Phi, within 2^-21 of it above -1: max(x, 0) - |x| Phi(-|x|), where
// Phi(-z) = exp(-z^2 / 2) t S(t), t = 1 / (1 + kScale z), and S is a minimax polynomial, relative error 3.1e-8.
inline Vector<float> gelu(Vector<float> x) {
    constexpr float kScale = 0.35f, kHalfLog2E = 0.72134752f;
    constexpr float kFarthest = 12.5f;  // beyond this the result is 0; subnormal numbers are slow
    constexpr float kTail[] = {0.13962221f, 0.13984834f, 0.11992737f, 0.10514695f, -0.02228191f,
                               0.15800341f, -0.25471397f, 0.14349814f, -0.02905055f};
    const auto magnitude = reinterpret<Vector<float>>(reinterpret<Words>(x) & 0x7fffffffu);
    const auto z = (Vector<float>)_mm512_min_ps((__m512)magnitude, _mm512_set1_ps(kFarthest));
    const Vector<float> divisor = z * kScale + 1.0f;
    const auto rough = (Vector<float>)_mm512_rcp14_ps((__m512)divisor);
    const Vector<float> t = rough * (2.0f - rough * divisor);
    Vector<float> tail = splat(kTail[8]);
#pragma GCC unroll 8
    for (int order = 7; order >= 0; --order) tail = tail * t + splat(kTail[order]);
    const Vector<float> below = tail * t * exp2<6>(z * z * -kHalfLog2E);
    return larger<float>(Vector<float>{}, x) - z * below;  // NaN where x is
}

// Finished sums, written row by row between the products of the next ones.
class Results {
public:
    explicit Results(const Params& params) : params_(params) {}

    // `sums` [rows, 32] are those of `rows` rows from `row` on and of up to 32 columns from `column` on.
    void begin(const float* sums, int64_t row, int64_t rows, int64_t column) {
        sums_ = sums;
        rows_ = rows;
        place_ = row * params_.columns + column;
        residual_place_ = row * params_.residual_stride + column;
        bias_ = params_.bias == nullptr ? nullptr : params_.bias + column;
        const int64_t present = std::min(pair_side, params_.columns - column);
        masks_[0] = static_cast<__mmask16>(present >= side ? 0xffff : (1 << present) - 1);
        masks_[1] = static_cast<__mmask16>((1ll << std::max<int64_t>(0, present - side)) - 1);
    }

    void write_rows(int64_t count) {
        for (count = std::min(count, rows_); count > 0; --count) write_row();
    }

    void write_all() { write_rows(rows_); }

private:
    inline void write_row() {
        for (int64_t half = 0; half < 2; ++half) {
            const int64_t column = half * side;
            const __mmask16 mask = masks_[half];
            Vector<float> value = load(sums_ + column);
            if (bias_ != nullptr) value += (Vector<float>)_mm512_maskz_loadu_ps(mask, bias_ + column);
            if (params_.gelu) value = gelu(value);
            if (params_.residual != nullptr) {
                value += (Vector<float>)_mm512_maskz_loadu_ps(mask, params_.residual + residual_place_ + column);
            }
            _mm512_mask_storeu_ps(params_.output + place_ + column, mask, (__m512)value);
        }
        sums_ += pair_side;
        place_ += params_.columns;
        residual_place_ += params_.residual_stride;
        --rows_;
    }

    const Params& params_;
    const float* sums_ = nullptr;
    const float* bias_ = nullptr;
    int64_t rows_ = 0, place_ = 0, residual_place_ = 0;
    __mmask16 masks_[2] = {};
};

}  // namespace
}  // namespace beit_fast::linear
