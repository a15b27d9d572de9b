// Forward on AMX tiles, 16 queries and 32 keys at a time. Scores are S^T [keys, queries] = K Q^T, so that a vector holds
// one key and 16 queries, and the output is O^T [dims, queries] = V^T P^T, of which 64 dims stay in tiles 0 to 3 while the
// keys pass by. The tile unit works while the vector units do: scores are asked for a step ahead, output a step behind.
#pragma once

#include <algorithm>

#include "attention/amx.h"
#include "attention/scratch.h"
#include "attention/softmax.h"
#include "attention/tokens.h"

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
            if (step == 0) multiply_step<true, false>(queries, 1, 0);
            else multiply_step<true, true>(queries, step + 1, step - 1);
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
    static constexpr int64_t kGroup = 4;                       // tiles of O^T that are held at once
    static constexpr int64_t kTileSize = kParts * kTileWords;  // words of a tile in all its parts
    static constexpr int kProducts = kParts == 3 ? 6 : kParts * kParts;
    // The parts of A and B that each product multiplies: small ones first, which loses least.
    static constexpr int kPartOfA[3][6] = {{0}, {1, 0, 1, 0}, {2, 1, 0, 1, 0, 0}};
    static constexpr int kPartOfB[3][6] = {{0}, {1, 1, 0, 0}, {0, 1, 2, 0, 1, 0}};

    int64_t row_length() const { return groups_ * kGroup * kTileRows; }
    float* scores_of(int64_t step) const { return scores_ + step % 2 * 2 * kTileWords; }
    uint32_t* weights_of(int64_t step) const { return weight_tiles_ + step % 2 * kTileSize; }

    void read_rows(const TokensView& view, int64_t batch, int64_t head, int64_t first, int64_t count) {
        read_tokens(rows_, row_length(), problem_, view, batch, head, first, count);
    }

    // [key tile][depth step][part], rows of 32 numbers of one key.
    BEIT_FAST_FLAT void pack_keys(int64_t batch, int64_t head) {
        for (int64_t first = 0; first < steps_ * kStepDepth; first += kStepDepth) {
            read_rows(problem_.k, batch, head, first, kStepDepth);
            for (int64_t i = 0; i < kStepDepth; ++i) {
                uint32_t* tiles = key_tiles_ + (first + i) / kTileRows * depth_steps_ * kTileSize;
                pack_row<kParts>(tiles + i % kTileRows * 16, kTileWords, kTileSize, rows_ + i * row_length(),
                                 depth_steps_);
            }
        }
    }

    // [step][dim tile][part], rows of 32 keys of one dim.
    BEIT_FAST_FLAT void pack_values(int64_t batch, int64_t head) {
        for (int64_t step = 0; step < steps_; ++step) {
            read_rows(problem_.v, batch, head, step * kStepDepth, kStepDepth);
            for (int64_t tile = 0; tile < groups_ * kGroup; ++tile) {
                Words words[kParts][kTileRows];
                for (int pair = 0; pair < kTileRows; ++pair) {
                    const float* row = rows_ + 2 * pair * row_length() + tile * kTileRows;
                    Vector<float> low = load(row), high = load(row + row_length());
                    for (int part = 0; part < kParts; ++part) {
                        const Words first = split_leading(low), second = split_leading(high);
                        words[part][pair] = pair_upper_halves(first, second);
                    }
                }
                uint32_t* to = value_tiles_ + (step * groups_ * kGroup + tile) * kTileSize;
                for (int part = 0; part < kParts; ++part) {
                    transpose<uint32_t>(words[part]);
                    for (int row = 0; row < kTileRows; ++row) {
                        store(to + part * kTileWords + row * 16, words[part][row]);
                    }
                }
            }
        }
    }

    // [query tile][depth step][part], rows of one pair of dims of 16 queries.
    BEIT_FAST_FLAT void pack_queries(int64_t batch, int64_t head, int64_t first) {
        uint32_t* tiles = query_tiles_ + first / kTileRows * depth_steps_ * kTileSize;
        read_rows(problem_.q, batch, head, first, kTileRows);
        for (int query = 0; query < kTileRows; ++query) {
            pack_row<kParts>(tiles + query * 16, kTileWords, kTileSize, rows_ + query * row_length(), depth_steps_);
        }
        for (int64_t tile = 0; tile < depth_steps_ * kParts; ++tile) {
            uint32_t* words = tiles + tile * kTileWords;
            Words square[kTileRows];
            for (int row = 0; row < kTileRows; ++row) square[row] = load(words + row * 16);
            transpose<uint32_t>(square);
            for (int row = 0; row < kTileRows; ++row) store(words + row * 16, square[row]);
        }
    }

    // Turns the scores of a step into weights: rows of one pair of keys of 16 queries, part by part.
    template <class Softmax>
    bool weigh(Softmax& softmax, int64_t step) {
        uint32_t* to = weights_of(step);
        return softmax.add_keys(scores_of(step), step * kStepDepth, kTileRows,
                                [to](int64_t pair, int, Vector<float> low, Vector<float> high) {
#pragma GCC unroll 3
            for (int part = 0; part < kParts; ++part) {
                Words first, second;
                if (kParts == 1) {
                    first = reinterpret<Words>(low) + kHalfUnit;
                    second = reinterpret<Words>(high) + kHalfUnit;
                } else {
                    first = split_leading(low);
                    second = split_leading(high);
                }
                store(to + part * kTileWords + pair * 16, pair_upper_halves(first, second));
            }
        });
    }

    // Scores `score_step` and adds the weighted values of `mix_step` to the output, by turns: six sums hide the time that
    // one product takes where two would not. The last score is asked for in vain, of the padding behind the keys.
    template <bool kScore, bool kMix>
    void multiply_step(const uint32_t* queries, int64_t score_step, int64_t mix_step) {
        const int64_t stride = depth_steps_ * kTileSize;
        const uint32_t* keys = key_tiles_ + 2 * std::min(score_step, steps_ - 1) * stride;
        if constexpr (kScore) {
            tile_zero<4>();
            tile_zero<5>();
        }
#pragma GCC unroll 6
        for (int product = 0; product < kProducts; ++product) {
            const int64_t a = kPartOfA[kParts - 1][product] * kTileWords, b = kPartOfB[kParts - 1][product] * kTileWords;
            if constexpr (kScore) add_to_scores(keys + a, queries + b);
            if (kMix && groups_ == 1) add_to_output(value_tiles_ + mix_step * kGroup * kTileSize + a, weights_of(mix_step) + b);
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
