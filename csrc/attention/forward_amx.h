// Forward on AMX tiles, 16 queries and 32 keys at a time. Scores are S^T [keys, queries] = K Q^T, so that a vector
// holds one key and 16 queries, and the output is O^T [dims, queries] = V^T P^T, of which 64 dims stay in tiles 0 to 3
// while the keys pass by. The tile unit works while the vector units do: scores are asked for a step ahead, output a
// step behind.
#pragma once

#include <algorithm>

#include "attention/amx_pack.h"
#include "attention/scratch.h"
#include "attention/softmax.h"

namespace beit_fast {
namespace {

template <int kParts>
class AmxForward {
public:
    static constexpr int64_t kQueries = kTileRows;

    AmxForward(const ForwardProblem& problem, Scratch& scratch)
        : problem_(problem),
          steps_(padded(problem.tokens, kStepDepth) / kStepDepth),
          depth_steps_(padded(problem.head_dim, kStepDepth) / kStepDepth),
          groups_(padded(problem.head_dim, kGroup * kTileRows) / (kGroup * kTileRows)),
          key_tiles_(scratch.take<uint32_t>(steps_ * 2 * depth_steps_ * kTileSize)),
          value_tiles_(scratch.take<uint32_t>(steps_ * groups_ * kGroup * kTileSize)),
          query_tiles_(scratch.take<uint32_t>(steps_ * 2 * depth_steps_ * kTileSize)),
          weight_tiles_(scratch.take<uint32_t>(2 * kTileSize)),
          scores_(scratch.take<float>(2 * 2 * kTileWords)),
          mixed_(scratch.take<float>(groups_ * kGroup * kTileWords)),
          rows_(scratch.take<float>(kStepDepth * row_length())) {}

    // Packs one head: all keys and values, and the queries from `first_query` to `last_query`.
    void load_head(int64_t batch, int64_t head, int64_t first_query, int64_t last_query) {
        pack_keys(batch, head);
        pack_values(batch, head);
        for (int64_t query = first_query; query < last_query; query += kQueries) pack_queries(batch, head, query);
    }

    // Attention of 16 queries from `first_query` on, inner tokens.
    template <class Softmax>
    void run(Softmax& softmax, int64_t batch, int64_t head, int64_t first_query) {
        const uint32_t* queries = query_tiles_ + first_query / kTileRows * depth_steps_ * kTileSize;
        Vector<float> factor;
        multiply_step<true, false>(queries, 0, 0);
        softmax.move_reference(scores_, 0, kTileRows / 2, &factor);
        zero_output();
        for (int64_t step = 0; step < steps_; ++step) {
            if (step + 1 == steps_) {
                if (step > 0) multiply_step<false, true>(queries, 0, step - 1);
            } else if (step == 0) {
                multiply_step<true, false>(queries, 1, 0);
            } else {
                multiply_step<true, true>(queries, step + 1, step - 1);
            }
            if (!weigh(softmax, step)) {
                softmax.move_reference(scores_of(step), step * kStepDepth, kTileRows, &factor);
                rescale_output(factor);
                weigh(softmax, step);
            }
        }
        multiply_step<false, true>(queries, 0, steps_ - 1);
        if (groups_ == 1) save_output(0);
        softmax.finish(mixed_, batch, head);
    }

private:
    static constexpr int64_t kGroup = 4;  // tiles of O^T that are held at once
    static constexpr int64_t kTileSize = beit_fast::kTileSize<kParts>;
    static constexpr int kProducts = beit_fast::kProducts<kParts>;

    int64_t row_length() const { return groups_ * kGroup * kTileRows; }
    float* scores_of(int64_t step) const { return scores_ + step % 2 * 2 * kTileWords; }
    uint32_t* weights_of(int64_t step) const { return weight_tiles_ + step % 2 * kTileSize; }

    void read_rows(const TokensView& view, int64_t batch, int64_t head, int64_t first, int64_t count) {
        read_tokens(rows_, row_length(), problem_, view, batch, head, first, count);
    }

    // [key tile][depth step].
    void pack_keys(int64_t batch, int64_t head) {
        for (int64_t first = 0; first < steps_ * kStepDepth; first += kTileRows) {
            read_rows(problem_.k, batch, head, first, kTileRows);
            pack_left<kParts>(key_tiles_ + first / kTileRows * depth_steps_ * kTileSize, rows_, row_length(),
                              depth_steps_ * kStepDepth);
        }
    }

    // [step][dim tile].
    void pack_values(int64_t batch, int64_t head) {
        for (int64_t step = 0; step < steps_; ++step) {
            read_rows(problem_.v, batch, head, step * kStepDepth, kStepDepth);
            pack_left_transposed<kParts>(value_tiles_ + step * groups_ * kGroup * kTileSize, rows_, row_length(),
                                         row_length());
        }
    }

    // [query tile][depth step].
    void pack_queries(int64_t batch, int64_t head, int64_t first) {
        read_rows(problem_.q, batch, head, first, kTileRows);
        uint32_t* tiles = query_tiles_ + first / kTileRows * depth_steps_ * kTileSize;
        pack_right_transposed<kParts>(tiles, rows_, row_length(), depth_steps_ * kStepDepth);
    }

    // Turns the scores of a step into weights: rows of one pair of keys of 16 queries, part by part.
    template <class Softmax>
    bool weigh(Softmax& softmax, int64_t step) {
        uint32_t* to = weights_of(step);
        return softmax.add_keys(scores_of(step), step * kStepDepth, kTileRows,
                                [to](int64_t pair, int, Vector<float> low, Vector<float> high) {
            put_pairs<kParts>(to + pair * 16, kTileWords, low, high);
        });
    }

    // Scores `score_step` and adds the weighted values of `mix_step` to the output, by turns: six sums hide the time
    // that one product takes where two would not.
    template <bool kScore, bool kMix>
    void multiply_step(const uint32_t* queries, int64_t score_step, int64_t mix_step) {
        const int64_t stride = depth_steps_ * kTileSize;
        const uint32_t* keys = key_tiles_ + 2 * score_step * stride;
        const uint32_t* values = value_tiles_ + mix_step * groups_ * kGroup * kTileSize;
        if constexpr (kScore) {
            tile_zero<4>();
            tile_zero<5>();
        }
#pragma GCC unroll 6
        for (int product = 0; product < kProducts; ++product) {
            const int64_t a = kPartOfA[kParts - 1][product] * kTileWords;
            const int64_t b = kPartOfB[kParts - 1][product] * kTileWords;
            if constexpr (kScore) add_to_scores(keys + a, queries + b);
            if (kMix && groups_ == 1) add_to_output(values + a, weights_of(mix_step) + b);
            if constexpr (kScore) {
                for (int64_t depth = kTileSize; depth < stride; depth += kTileSize) {
                    add_to_scores(keys + depth + a, queries + depth + b);
                }
            }
        }
        if constexpr (kScore) {
            tile_store<4>(scores_of(score_step));
            tile_store<5>(scores_of(score_step) + kTileWords);
        }
        if (kMix && groups_ > 1) mix_groups(mix_step);
    }

    // 32 keys of 32 dims in tiles 4 and 5; tile 6 holds keys, 7 queries.
    void add_to_scores(const uint32_t* keys, const uint32_t* queries) {
        tile_load<7>(queries);
        tile_load<6>(keys);
        tile_multiply<4, 6, 7>();
        tile_load<6>(keys + depth_steps_ * kTileSize);
        tile_multiply<5, 6, 7>();
    }

    // 32 keys for 64 dims in tiles 0 to 3; tile 6 holds values, 7 weights.
    void add_to_output(const uint32_t* values, const uint32_t* weights) {
        tile_load<7>(weights);
        tile_load<6>(values);
        tile_multiply<0, 6, 7>();
        tile_load<6>(values + kTileSize);
        tile_multiply<1, 6, 7>();
        tile_load<6>(values + 2 * kTileSize);
        tile_multiply<2, 6, 7>();
        tile_load<6>(values + 3 * kTileSize);
        tile_multiply<3, 6, 7>();
    }

    // Heads of more than 64 dims keep their sums in memory.
    void mix_groups(int64_t step) {
        for (int64_t group = 0; group < groups_; ++group) {
            const uint32_t* values = value_tiles_ + (step * groups_ + group) * kGroup * kTileSize;
            load_output(group);
            for (int product = 0; product < kProducts; ++product) {
                add_to_output(values + kPartOfA[kParts - 1][product] * kTileWords,
                              weights_of(step) + kPartOfB[kParts - 1][product] * kTileWords);
            }
            save_output(group);
        }
    }

    void zero_output() {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
        for (int64_t group = 0; groups_ > 1 && group < groups_; ++group) save_output(group);
    }

    void load_output(int64_t group) {
        const float* tiles = mixed_ + group * kGroup * kTileWords;
        tile_load<0>(tiles);
        tile_load<1>(tiles + kTileWords);
        tile_load<2>(tiles + 2 * kTileWords);
        tile_load<3>(tiles + 3 * kTileWords);
    }

    void save_output(int64_t group) {
        float* tiles = mixed_ + group * kGroup * kTileWords;
        tile_store<0>(tiles);
        tile_store<1>(tiles + kTileWords);
        tile_store<2>(tiles + 2 * kTileWords);
        tile_store<3>(tiles + 3 * kTileWords);
    }

    void rescale_output(Vector<float> factor) {
        if (groups_ == 1) save_output(0);
        for (int64_t row = 0; row < groups_ * kGroup * kTileRows; ++row) {
            store(mixed_ + row * 16, load(mixed_ + row * 16) * factor);
        }
        if (groups_ == 1) load_output(0);
    }

    const ForwardProblem& problem_;
    const int64_t steps_, depth_steps_, groups_;
    uint32_t *key_tiles_, *value_tiles_, *query_tiles_, *weight_tiles_;
    float *scores_, *mixed_, *rows_;
};

}  // namespace
}  // namespace beit_fast
