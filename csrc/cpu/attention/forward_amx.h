// Forward on AMX tiles, 16 queries and a block of keys at a time. Scores are S^T [keys, queries] = K Q^T, so that a
// vector holds one key and 16 queries, and the output is O^T [dims, queries] = V^T P^T. While vectors turn the scores
// of a block into weights, tiles work on the scores of the next one: a few products after each pair of keys.
#pragma once

#include <algorithm>

#include "cpu/attention/amx_rows.h"
#include "cpu/attention/scratch.h"
#include "cpu/attention/softmax.h"

namespace beit_fast {
namespace {

template <int kTerms>
class AmxForward {
public:
    static constexpr int64_t kQueries = kTileRows;

    AmxForward(const ForwardParams& params, Scratch& scratch)
        : params_(params),
          steps_(padded(params.tokens, kStepDepth) / kStepDepth),
          blocks_(padded(params.tokens, kBlockKeys) / kBlockKeys),
          depth_steps_(padded(params.head_dim, kStepDepth) / kStepDepth),
          groups_(padded(params.head_dim, kGroup * kTileRows) / (kGroup * kTileRows)),
          key_tiles_(scratch.take<uint32_t>(steps_ * 2 * depth_steps_ * kTileSize)),
          value_tiles_(scratch.take<uint32_t>(steps_ * groups_ * kGroup * kTileSize)),
          query_tiles_(scratch.take<uint32_t>(steps_ * 2 * depth_steps_ * kTileSize)),
          weight_tiles_(scratch.take<uint32_t>(2 * kBlockSteps * kTileSize)),
          scores_(scratch.take<float>(2 * kBlockTiles * kTileWords)),
          mixed_(scratch.take<float>(groups_ * kGroup * kTileWords)),
          rows_(params, groups_ * kGroup * kTileRows, scratch) {}

    // Packs one head: all keys and values, keys in `order`, and the queries from `first_query` to `last_query`.
    void load_head(int64_t batch, int64_t head, TokenOrder order, int64_t first_query, int64_t last_query) {
        for (int64_t step = 0; step < steps_; ++step) {
            rows_.read(params_.k, batch, head, order, step * kStepDepth, kStepDepth);
            rows_.pack_keys(key_tiles_ + step * 2 * depth_steps_ * kTileSize, depth_steps_);
            rows_.read(params_.v, batch, head, order, step * kStepDepth, kStepDepth);
            rows_.pack_values(value_tiles_ + step * groups_ * kGroup * kTileSize, groups_ * kGroup);
        }
        for (int64_t query = first_query; query < last_query; query += kQueries) {
            rows_.read(params_.q, batch, head, {params_.tokens}, query, kQueries);
            rows_.pack_queries(query_tiles_ + query / kTileRows * depth_steps_ * kTileSize, depth_steps_);
        }
    }

    // Attention of 16 queries from `first_query` on, inner tokens.
    template <class Softmax>
    void run(Softmax& softmax, int64_t batch, int64_t head, int64_t first_query) {
        Vector<float> factor;
        const uint32_t* queries = query_tiles_ + first_query / kTileRows * depth_steps_ * kTileSize;
        const Scoring first = scoring_of(queries, 0);
        for (int64_t turn = 0; turn < first.turns; ++turn) score(first, turn);
        softmax.move_reference(scores_, 0, std::min(kTileRows / 2, pairs_of(0)), &factor);
        if (holds_output()) zero_output();
        for (int64_t block = 0; block < blocks_; ++block) {
            const Scoring scoring = scoring_of(queries, block + 1);
            const Mixing mixing = mixing_of(block - 1);
            const auto take_turn = [scoring, mixing](int64_t turn) {
                if (turn < scoring.turns) score(scoring, turn);
                else mix(mixing, turn - scoring.turns);
            };
            if (!weigh(softmax, block, scoring.turns + mixing.turns, take_turn)) {
                softmax.move_reference(scores_of(block), block * kBlockKeys, pairs_of(block), &factor);
                if (block > 0) rescale_output(factor);
                weigh(softmax, block, 0, take_turn);
            }
        }
        const Mixing last = mixing_of(blocks_ - 1);
        for (int64_t turn = 0; turn < last.turns; ++turn) mix(last, turn);
        if (holds_output()) save_tiles(mixed_);
        softmax.finish(mixed_, batch, head);
    }

private:
    static constexpr int kGroup = 4;  // tiles of O^T that are added up at once
    static constexpr int64_t kTileSize = beit_fast::kTileSize<kTerms>;
    // With one term vectors have more work than tiles: few keys at a time stay in the L1 cache, and four tiles hold the
    // output throughout. With more terms tiles have more work; they need four sums and all terms of the queries.
    static constexpr bool kOneTerm = kTerms == 1;
    static constexpr int kBlockTiles = kOneTerm ? 2 : 4;
    static constexpr int64_t kBlockKeys = kBlockTiles * kTileRows;
    static constexpr int64_t kBlockSteps = kBlockKeys / kStepDepth;
    static constexpr int kScores = kOneTerm ? 4 : 0;  // the first tile of scores
    static constexpr int kLeft = kOneTerm ? 6 : 7, kRight = kOneTerm ? 7 : 4;

    bool holds_output() const { return kOneTerm && groups_ == 1; }
    int64_t keys_of(int64_t block) const { return std::min(kBlockKeys, params_.tokens - block * kBlockKeys); }
    int64_t pairs_of(int64_t block) const { return padded(keys_of(block), 2) / 2; }
    int64_t steps_of(int64_t block) const { return padded(keys_of(block), kStepDepth) / kStepDepth; }
    float* scores_of(int64_t block) const { return scores_ + block % 2 * kBlockTiles * kTileWords; }
    uint32_t* weights_of(int64_t block) const { return weight_tiles_ + block % 2 * kBlockSteps * kTileSize; }

    // Turns the scores of a block into weights: rows of one pair of keys of 16 queries, term by term. Between them
    // `take_turn(turn)` is called for each of `turns`.
    template <class Softmax, class TakeTurn>
    bool weigh(Softmax& softmax, int64_t block, int64_t turns, TakeTurn take_turn) {
        if (keys_of(block) == kBlockKeys) return weigh_pairs<kBlockKeys / 2>(softmax, block, 0, turns, take_turn);
        uint32_t* to = weights_of(block);
        for (int64_t pair = pairs_of(block); pair < steps_of(block) * kTileRows; ++pair) {  // their values are zeros
            uint32_t* row = to + pair / kTileRows * kTileSize + pair % kTileRows * 16;
            for (int term = 0; term < kTerms; ++term) store(row + term * kTileWords, Words{});
        }
        return weigh_pairs<0>(softmax, block, pairs_of(block), turns, take_turn);
    }

    // kPairs of pairs, a constant, or `some` where that is 0.
    template <int64_t kPairs, class Softmax, class TakeTurn>
    BEIT_FAST_APART bool weigh_pairs(Softmax& softmax, int64_t block, int64_t some, int64_t turns, TakeTurn take_turn) {
        uint32_t* to = weights_of(block);
        constexpr bool kKnown = kPairs > 0;
        const int64_t pairs = kKnown ? kPairs : some;
        int64_t turn = 0, due = 0;
        const auto take = [=](int64_t pair, int, Vector<float> low, Vector<float> high) mutable {
            split_bf16<kTerms>(to + pair / kTileRows * kTileSize + pair % kTileRows * 16, kTileWords, low, high);
            for (due += turns; due >= (kKnown ? kPairs : pairs); due -= kKnown ? kPairs : pairs) take_turn(turn++);
        };
        return softmax.add_keys(scores_of(block), block * kBlockKeys, pairs, take);
    }

    // What multiplying `kTiles` tiles of A takes: a turn for each term of each tile, small terms first, which loses
    // least; a single turn for the output if there is one term.
    template <int kTiles>
    static constexpr int64_t kTurns = kOneTerm && kTiles == kGroup ? 1 : kTerms * kTiles;

    // The scores of a block, 32 dims after 32 dims.
    struct Scoring {
        const uint32_t *keys, *queries;
        float* scores;
        int64_t stride, tiles, turns;
    };

    Scoring scoring_of(const uint32_t* queries, int64_t block) const {
        if (block == blocks_) return {};
        const int64_t stride = depth_steps_ * kTileSize, tiles = padded(keys_of(block), kTileRows) / kTileRows;
        return {key_tiles_ + block * kBlockTiles * stride, queries, scores_of(block), stride, tiles,
                depth_steps_ * kTurns<kBlockTiles>};
    }

    static void score(const Scoring& scoring, int64_t turn) {
        constexpr int64_t kCount = kTurns<kBlockTiles>;
        const int64_t depth = turn / kCount, rest = turn % kCount;
        if (turn == 0) zero_scores();
        if (rest == 0) load_terms(scoring.queries + depth * kTileSize);
        multiply_turn<kScores, kBlockTiles>(rest, scoring.keys + depth * kTileSize, scoring.stride, scoring.tiles);
        if (turn + 1 == scoring.turns) store_scores(scoring.scores);
    }

    // Adding the weighted values of a block to the output, 32 keys after 32 keys.
    struct Mixing {
        const uint32_t *values, *weights;
        float* mixed;  // null where tiles hold the output
        int64_t steps, groups, turns;
        bool first;
    };

    Mixing mixing_of(int64_t block) const {
        if (block < 0) return {};
        return {value_tiles_ + block * kBlockSteps * groups_ * kGroup * kTileSize, weights_of(block),
                holds_output() ? nullptr : mixed_, steps_of(block), groups_,
                groups_ * steps_of(block) * kTurns<kGroup>, block == 0};
    }

    static void mix(const Mixing& mixing, int64_t turn) {
        constexpr int64_t kCount = kTurns<kGroup>;
        const int64_t rest = turn % kCount;
        int64_t step = turn / kCount, group = 0;
        for (; step >= mixing.steps; step -= mixing.steps) ++group;
        float* mixed = mixing.mixed + group * kGroup * kTileWords;
        if (rest == 0 && step == 0 && mixing.mixed != nullptr) {
            if (mixing.first) zero_output();
            else load_tiles(mixed);
        }
        if (rest == 0) load_terms(mixing.weights + step * kTileSize);
        const uint32_t* values = mixing.values + (step * mixing.groups + group) * kGroup * kTileSize;
        multiply_turn<0, kGroup>(rest, values, kTileSize, kGroup);
        if (rest + 1 == kCount && step + 1 == mixing.steps && mixing.mixed != nullptr) save_tiles(mixed);
    }

    // Leaves out tiles behind `count`.
    template <int kFirst, int kTiles, int kTurn = 0>
    static void multiply_turn(int64_t turn, const uint32_t* tiles, int64_t stride, int64_t count) {
        constexpr int kTile = kTurn % kTiles, kTerm = kTerms - 1 - kTurn / kTiles;
        constexpr bool kAll = kTurns<kTiles> == 1;
        if constexpr (kTurn < kTerms * kTiles) {
            const bool due = kAll || turn == kTurn;
            if (due && kTile < count) multiply_term<kFirst + kTile, kTerm>(tiles + kTile * stride);
            if (kAll || !due) multiply_turn<kFirst, kTiles, kTurn + 1>(turn, tiles, stride, count);
        }
    }

    // Adds one term of A times all terms of B that matter.
    template <int kSum, int kTerm>
    static void multiply_term(const uint32_t* tile) {
        constexpr int kLast = last_partner<kTerms>(kTerm);
        tile_load<kLeft>(tile + kTerm * kTileWords);
        if constexpr (kLast > 1) tile_multiply<kSum, kLeft, kRight + 2>();
        if constexpr (kLast > 0) tile_multiply<kSum, kLeft, kRight + 1>();
        tile_multiply<kSum, kLeft, kRight>();
    }

    static void load_terms(const uint32_t* tile) {
        tile_load<kRight>(tile);
        if constexpr (kTerms > 1) tile_load<kRight + 1>(tile + kTileWords);
        if constexpr (kTerms > 2) tile_load<kRight + 2>(tile + 2 * kTileWords);
    }

    static void zero_scores() {
        tile_zero<kScores>();
        tile_zero<kScores + 1>();
        if constexpr (kBlockTiles > 2) {
            tile_zero<kScores + 2>();
            tile_zero<kScores + 3>();
        }
    }

    static void store_scores(float* to) {
        tile_store<kScores>(to);
        tile_store<kScores + 1>(to + kTileWords);
        if constexpr (kBlockTiles > 2) {
            tile_store<kScores + 2>(to + 2 * kTileWords);
            tile_store<kScores + 3>(to + 3 * kTileWords);
        }
    }

    static void zero_output() {
        tile_zero<0>();
        tile_zero<1>();
        tile_zero<2>();
        tile_zero<3>();
    }

    static void load_tiles(const float* tiles) {
        tile_load<0>(tiles);
        tile_load<1>(tiles + kTileWords);
        tile_load<2>(tiles + 2 * kTileWords);
        tile_load<3>(tiles + 3 * kTileWords);
    }

    static void save_tiles(float* tiles) {
        tile_store<0>(tiles);
        tile_store<1>(tiles + kTileWords);
        tile_store<2>(tiles + 2 * kTileWords);
        tile_store<3>(tiles + 3 * kTileWords);
    }

    // Scales what the blocks before added up.
    void rescale_output(Vector<float> factor) {
        if (holds_output()) save_tiles(mixed_);
        for (int64_t row = 0; row < groups_ * kGroup * kTileRows; ++row) {
            store(mixed_ + row * 16, load(mixed_ + row * 16) * factor);
        }
        if (holds_output()) load_tiles(mixed_);
    }

    const ForwardParams& params_;
    const int64_t steps_, blocks_, depth_steps_, groups_;
    uint32_t *key_tiles_, *value_tiles_, *query_tiles_, *weight_tiles_;
    float *scores_, *mixed_;
    AmxRows<kTerms> rows_;
};

}  // namespace
}  // namespace beit_fast
