// The products of the backward on AMX tiles, 32 queries at a time.
#pragma once

#include "cpu/attention/amx_pack.h"
#include "cpu/attention/backward.h"

namespace beit_fast {
namespace {

template <int kTerms>
class AmxProducts {
public:
    using Number = float;
    static constexpr int kDegree = kTerms == 3 ? 6 : 5;
    static constexpr int kMostVectors = 2, kLeastVectors = 2;
    static constexpr int64_t kMultiple = kStepDepth;

    AmxProducts(int64_t length, int64_t most_keys, Scratch& scratch)
        : length_(length),
          key_tiles_(scratch.take<uint32_t>(tiles_of(most_keys))),
          value_tiles_(scratch.take<uint32_t>(tiles_of(most_keys))),
          transposed_keys_(scratch.take<uint32_t>(tiles_of(most_keys))),
          query_columns_(scratch.take<uint32_t>(tiles_of(kColumns))),
          grad_columns_(scratch.take<uint32_t>(tiles_of(kColumns))),
          query_rows_(scratch.take<uint32_t>(tiles_of(kColumns))),
          grad_rows_(scratch.take<uint32_t>(tiles_of(kColumns))),
          weights_(scratch.take<uint32_t>(kBlockTiles * kSize)),
          grad_scores_(scratch.take<uint32_t>(kBlockTiles * kSize)),
          grad_score_columns_(scratch.take<uint32_t>(kBlockTiles * kSize)) {}

    void load_keys(const float* keys, const float* values, int64_t count) {
        for (int64_t key = 0; key < count; key += kTileRows) {
            pack_left<kTerms>(key_tiles_ + tiles_of(key), keys + key * length_, length_, length_);
            pack_left<kTerms>(value_tiles_ + tiles_of(key), values + key * length_, length_, length_);
        }
        for (int64_t key = 0; key < count; key += kStepDepth) {
            pack_left_transposed<kTerms>(transposed_keys_ + tiles_of(key), keys + key * length_, length_, length_);
        }
    }

    template <int>
    void load_queries(const float* queries, const float* grads) {
        for (int64_t query = 0; query < kColumns; query += kTileRows) {
            const int64_t row = query * length_;
            pack_right_transposed<kTerms>(query_columns_ + tiles_of(query), queries + row, length_, length_);
            pack_right_transposed<kTerms>(grad_columns_ + tiles_of(query), grads + row, length_, length_);
        }
        pack_right<kTerms>(query_rows_, queries, length_, length_);
        pack_right<kTerms>(grad_rows_, grads, length_, length_);
    }

    template <int>
    void score(int64_t key, int64_t count, float* scores, float* grad_weights) {
        for (int64_t step = 0; step < count; step += kStepDepth) {
            multiply_columns(key_tiles_ + tiles_of(key + step), query_columns_, scores + step * kColumns);
            multiply_columns(value_tiles_ + tiles_of(key + step), grad_columns_, grad_weights + step * kColumns);
        }
    }

    // Rows of keys past `count` are padding. Their weights may be any finite number, so they are set to 0.
    template <int>
    void mix(int64_t key, int64_t count, float* weights, float* grad_scores, float* grad_values, float* grad_keys,
             float* grad_queries) {
        const int64_t rows = padded(count, kStepDepth);
        std::fill(weights + count * kColumns, weights + rows * kColumns, 0.0f);
        std::fill(grad_scores + count * kColumns, grad_scores + rows * kColumns, 0.0f);
        for (int64_t row = 0; row < rows; row += kTileRows) {
            pack_left<kTerms>(weights_ + row / kTileRows * kSize, weights + row * kColumns, kColumns, kColumns);
            pack_left<kTerms>(grad_scores_ + row / kTileRows * kSize, grad_scores + row * kColumns, kColumns, kColumns);
        }
        for (int64_t row = 0; row < rows; row += kStepDepth) {
            const int64_t tile = row / kTileRows * kSize;
            pack_right<kTerms>(grad_score_columns_ + tile, grad_scores + row * kColumns, kColumns, kColumns);
            add_rows(weights_ + tile, grad_rows_, grad_values + (key + row) * length_);
            add_rows(grad_scores_ + tile, query_rows_, grad_keys + (key + row) * length_);
        }
        for (int64_t dim = 0; dim < length_; dim += kStepDepth) {
            float* sums = grad_queries + dim * kColumns;
            if (key == 0) FourSums::zero();
            else FourSums::load(sums, kColumns);
            for (int64_t row = 0; row < rows; row += kStepDepth) {
                const uint32_t* left = transposed_keys_ + tiles_of(key + row) + dim / kTileRows * kSize;
                FourSums::add<kTerms>(left, kSize, grad_score_columns_ + row / kTileRows * kSize, kSize);
            }
            FourSums::store(sums, kColumns);
        }
    }

private:
    static constexpr int64_t kColumns = 32;
    static constexpr int64_t kBlockTiles = kKeyBlock / kTileRows;
    static constexpr int64_t kSize = kTileSize<kTerms>;

    // Words of `rows` rows of `length_` numbers.
    int64_t tiles_of(int64_t rows) const { return rows / kTileRows * (length_ / kStepDepth) * kSize; }

    // 32 rows of A by 32 columns of B, summed over `length_`.
    void multiply_columns(const uint32_t* a, const uint32_t* b, float* sums) {
        const int64_t stride = tiles_of(kTileRows);
        FourSums::zero();
        for (int64_t depth = 0; depth < stride; depth += kSize) {
            FourSums::add<kTerms>(a + depth, stride, b + depth, stride);
        }
        FourSums::store(sums, kColumns);
    }

    // Adds 32 rows of A, summed over 32 queries, times B `[32, length_]`.
    void add_rows(const uint32_t* a, const uint32_t* b, float* sums) {
        for (int64_t dim = 0; dim < length_; dim += kStepDepth) {
            FourSums::load(sums + dim, length_);
            FourSums::add<kTerms>(a, kSize, b + dim / kTileRows * kSize, kSize);
            FourSums::store(sums + dim, length_);
        }
    }

    const int64_t length_;
    uint32_t *key_tiles_, *value_tiles_, *transposed_keys_;
    uint32_t *query_columns_, *grad_columns_;  // summed over dims
    uint32_t *query_rows_, *grad_rows_;        // summed over queries
    uint32_t *weights_, *grad_scores_, *grad_score_columns_;
};

}  // namespace
}  // namespace beit_fast
