// Rows of q, k and v of one head on their way into tiles.
#pragma once

#include <type_traits>

#include "cpu/attention/amx_pack.h"
#include "cpu/attention/scratch.h"

namespace beit_fast {
namespace {

// bf16, one term, stays as it is; other types come as fp32.
template <int kTerms>
class AmxRows {
public:
    AmxRows(const AttentionParams& params, int64_t length, Scratch& scratch)
        : params_(params), length_(length), rows_(scratch.take<Number>(kStepDepth * length)) {}

    // Reads up to 32 inner tokens from `first` on; zeros behind D and behind the last token.
    void read(const TokensView& view, int64_t batch, int64_t head, TokenOrder order, int64_t first, int64_t count) {
        read_tokens(rows_, length_, params_, view, batch, head, order, first, count);
    }

    // 32 rows as two rows of tiles of A, summed over dims: [key tile][depth step].
    BEIT_FAST_FLAT void pack_keys(uint32_t* to, int64_t depth_steps) const {
        const int64_t size = depth_steps * kTileSize<kTerms>;
        if constexpr (kTerms > 1) {
            pack_left<kTerms>(to, rows_, length_, depth_steps * kStepDepth);
            pack_left<kTerms>(to + size, rows_ + kTileRows * length_, length_, depth_steps * kStepDepth);
        } else {
            for (int row = 0; row < kStepDepth; ++row) {
                uint32_t* tile = to + row / kTileRows * size + row % kTileRows * 16;
                for (int64_t depth = 0; depth < depth_steps; ++depth) {
                    store(tile + depth * kTileWords, load_words(row, depth * kStepDepth));
                }
            }
        }
    }

    // 16 rows as columns of B, summed over dims: [depth step].
    BEIT_FAST_FLAT void pack_queries(uint32_t* to, int64_t depth_steps) const {
        if constexpr (kTerms > 1) {
            pack_right_transposed<kTerms>(to, rows_, length_, depth_steps * kStepDepth);
        } else {
            for (int64_t depth = 0; depth < depth_steps; ++depth) {
                Words square[kTileRows];
                for (int row = 0; row < kTileRows; ++row) square[row] = load_words(row, depth * kStepDepth);
                put_square(to + depth * kTileWords, 16, square);
            }
        }
    }

    // 32 rows, of which neighbours share a word, as columns of A, summed over the rows: [dim tile].
    BEIT_FAST_FLAT void pack_values(uint32_t* to, int64_t tiles) const {
        for (int64_t dim = 0; dim < tiles * kTileRows; dim += 2 * kTileRows) {
            uint32_t* tile = to + dim / kTileRows * kTileSize<kTerms>;
            if constexpr (kTerms > 1) {
                const float* rows = rows_ + dim;
                put_transposed<kTerms>(tile, rows, rows + length_, 2 * length_);
                put_transposed<kTerms>(tile + kTileSize<kTerms>, rows + kTileRows, rows + kTileRows + length_,
                                       2 * length_);
            } else {
                Words even[kTileRows], odd[kTileRows];  // dims
                for (int pair = 0; pair < kTileRows; ++pair) {
                    const Words low = load_words(2 * pair, dim), high = load_words(2 * pair + 1, dim);
                    even[pair] = (low & 0xffffu) | (high << 16);
                    odd[pair] = (low >> 16) | (high & 0xffff0000u);
                }
                put_square(tile, 32, even);
                put_square(tile + 16, 32, odd);
            }
        }
    }

private:
    using Number = std::conditional_t<kTerms == 1, uint16_t, float>;

    // 32 numbers of a row from `dim` on, neighbours in a word.
    Words load_words(int64_t row, int64_t dim) const {
        return reinterpret<Words>(load(rows_ + row * length_ + dim));
    }

    static void put_square(uint32_t* to, int64_t stride, Words* square) {
        transpose<uint32_t>(square);
        for (int row = 0; row < kTileRows; ++row) store(to + row * stride, square[row]);
    }

    const AttentionParams& params_;
    const int64_t length_;
    Number* rows_;
};

}  // namespace
}  // namespace beit_fast
