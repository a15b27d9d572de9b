// The logits of a block of queries: scaled scores plus the packed bias; one key a row, one query a lane.
#pragma once

#include "cpu/attention/dropout.h"
#include "cpu/attention/tokens.h"

namespace beit_fast {
namespace {

// The bias and the mask of one head, shared by its queries.
template <class T>
struct HeadBias {
    const T* packed = nullptr;         // null without a bias
    const int64_t* offsets = nullptr;  // [N], where the slice of each inner key starts
    T cls_to_patch = T(0);
    const uint8_t* allowed = nullptr;  // [N], inner keys; null if all are allowed
    TokenOrder keys{0};
};

template <class T, int kVectors>
class Logits {
public:
    static constexpr int64_t kQueries = static_cast<int64_t>(kVectors) * kLanes<T>;
    static constexpr T kInfinity = std::numeric_limits<T>::infinity();

    Logits(const AttentionParams& params, const HeadBias<T>& head)
        : params_(params),
          head_(head),
          dropout_(params.dropout_p, params.seed),
          scale_(static_cast<T>(params.scale * 1.4426950408889634)) {}

    // Selects the block of queries that starts at inner token `first_query`.
    void begin(int64_t batch, int64_t head, int64_t first_query) {
        first_query_ = first_query;
        plane_ = batch * params_.heads + head;
        const int64_t cls_lane = params_.tokens - 1 - first_query;
        has_cls_ = head_.packed != nullptr && cls_lane < kQueries;
        for (int64_t lane = 0; lane < kQueries; ++lane) {
            is_cls_[lane / kLanes<T>][lane % kLanes<T>] = lane == cls_lane ? -1 : 0;
            tokens_[lane] = static_cast<uint32_t>(token_of(first_query + lane, params_.tokens));
        }
    }

    int64_t first_query() const { return first_query_; }
    int64_t plane() const { return plane_; }  // b * H + h
    int64_t token(int64_t lane) const { return tokens_[lane]; }
    bool has_cls() const { return has_cls_; }
    auto is_cls(int v) const { return is_cls_[v]; }
    bool drops() const { return dropout_.active(); }

    // Calls `take(pair, key, vector, first, second, checked)` with the logits of pairs of keys in units of log2(e),
    // from rows of scores `[keys, kQueries]`; minus infinity if a key is masked or padding. `checked` is a constant,
    // false if neither occurs and there is no dropout. `take` is passed and returned by value: its sums stay in
    // registers.
    template <class Take>
    Take visit(const T* scores, int64_t first_key, int64_t pairs, Take take) const {
        if (head_.allowed != nullptr || first_key + 2 * pairs > params_.tokens || drops()) {
            if (head_.packed == nullptr) return visit_as<Bias::none, true>(scores, first_key, pairs, take);
            return visit_as<Bias::with_cls, true>(scores, first_key, pairs, take);
        }
        if (head_.packed == nullptr) return visit_as<Bias::none, false>(scores, first_key, pairs, take);
        if (has_cls_) return visit_as<Bias::with_cls, false>(scores, first_key, pairs, take);
        return visit_as<Bias::patches, false>(scores, first_key, pairs, take);
    }

    // Dropout's factors for the weights of one key.
    Vector<T> dropout_factor(int v, int64_t key) const {
        T factors[kLanes<T>];
        const auto key_token = static_cast<uint32_t>(head_.keys(key));
        dropout_.factors(factors, tokens_ + v * kLanes<T>, kLanes<T>, key_token, static_cast<uint32_t>(plane_));
        return load(factors);
    }

private:
    enum class Bias { none, patches, with_cls };

    template <Bias kBias, bool kChecked, class Take>
    BEIT_FAST_FLAT Take visit_as(const T* scores, int64_t first_key, int64_t pairs, Take take) const {
        const T scale = scale_;
        const T* packed = head_.packed + first_query_;
        const int64_t* offsets = head_.offsets + first_key;
        const auto logit = [&](const T* row, int64_t key, int v) {
            if (kChecked && !usable(key)) return splat(-kInfinity);
            Vector<T> value = load(row + v * kLanes<T>) * scale;
            if constexpr (kBias != Bias::none) {
                Vector<T> bias = load(packed + offsets[key - first_key] + v * kLanes<T>);
                if (kBias == Bias::with_cls && key + 1 != params_.tokens) {
                    bias = is_cls_[v] ? splat(head_.cls_to_patch) : bias;
                }
                value += bias;
            }
            return value;
        };
        constexpr std::bool_constant<kChecked> checked;
        for (int64_t pair = 0; pair < pairs; ++pair) {
            const int64_t key = first_key + 2 * pair;
            const T* row = scores + 2 * pair * kQueries;
#pragma GCC unroll 4
            for (int v = 0; v < kVectors; ++v) {
                take(pair, key, v, logit(row, key, v), logit(row + kQueries, key + 1, v), checked);
            }
        }
        return take;
    }

    bool usable(int64_t key) const {
        return key < params_.tokens && (head_.allowed == nullptr || head_.allowed[key] != 0);
    }

    const AttentionParams& params_;
    const HeadBias<T>& head_;
    const Dropout dropout_;
    const T scale_;
    int64_t first_query_ = 0, plane_ = 0;
    bool has_cls_ = false;
    decltype(Vector<T>{} == Vector<T>{}) is_cls_[kVectors];
    uint32_t tokens_[kQueries];
};

}  // namespace
}  // namespace beit_fast
