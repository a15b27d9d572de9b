// The online softmax of a block of queries over groups of keys.
#pragma once

#include <algorithm>

#include "cpu/attention/logits.h"

namespace beit_fast {
namespace {

template <class T, int kVectors, int kDegree>
class Softmax {
public:
    static constexpr int64_t kQueries = Logits<T, kVectors>::kQueries;

    Softmax(const ForwardParams& params, const HeadBias<T>& head) : params_(params), logits_(params, head) {}

    // Starts the block of queries at inner token `first_query`.
    void begin(int64_t batch, int64_t head, int64_t first_query) {
        logits_.begin(batch, head, first_query);
        for (int v = 0; v < kVectors; ++v) {
            reference_[v] = splat(kLowest);
            total_[v] = Vector<T>{};
        }
    }

    // Raises the reference to the highest logits of `pairs` pairs of keys, rows of scores `[keys, kQueries]`.
    // The caller multiplies the sums of earlier keys by `factors[kVectors]`.
    void move_reference(const T* scores, int64_t first_key, int64_t pairs, Vector<T>* factors) {
        const Highest found = logits_.visit(scores, first_key, pairs, Highest());
        for (int v = 0; v < kVectors; ++v) {
            const auto moves = found.highest[v] > reference_[v];
            const Vector<T> reference = moves ? found.highest[v] : reference_[v];
            factors[v] = moves ? exp2<kDegree>(reference_[v] - reference) : splat(T(1));
            reference_[v] = reference;
            total_[v] *= factors[v];
        }
    }

    // Passes the weights exp2(logit - reference) of pairs of keys to `take(pair, vector, first, second)` and adds them
    // to the sums. If a sum exceeds kCrowded it returns false and discards the sums of these keys. The caller then
    // moves the reference, scales the sums of earlier keys, and repeats these keys.
    template <class Take>
    bool add_keys(const T* scores, int64_t first_key, int64_t pairs, Take take) {
        const Weigh<Take> done = logits_.visit(scores, first_key, pairs, Weigh<Take>(*this, take));
        for (int v = 0; v < kVectors; ++v) {
            if (any_greater<T>(done.total[v], splat(kCrowded))) return false;
        }
        for (int v = 0; v < kVectors; ++v) total_[v] = done.total[v];
        return true;
    }

    // Divides sums `[D, kQueries]`, padded to whole squares, by the total weights and writes out and lse.
    BEIT_FAST_FLAT void finish(const T* mixed, int64_t batch, int64_t head) const {
        const int64_t real = std::min(kQueries, params_.tokens - logits_.first_query());
        for (int v = 0; v < kVectors && v * kLanes<T> < real; ++v) {
            const int64_t first = v * kLanes<T>, count = std::min<int64_t>(kLanes<T>, real - first);
            const Vector<T> divisor = total_[v] == T(0) ? splat(T(1)) : total_[v];
            const Vector<T> inverse = T(1) / divisor;
            const Vector<T> lse = (log2(total_[v]) + reference_[v]) * static_cast<T>(0.6931471805599453);
            for (int64_t lane = 0; lane < count; ++lane) {
                const int64_t row = logits_.plane() * params_.tokens + logits_.token(first + lane);
                static_cast<T*>(params_.lse)[row] = lse[lane];
            }
            for (int64_t dim = 0; dim < params_.head_dim; dim += kLanes<T>) {
                Vector<T> square[kLanes<T>];
                for (int row = 0; row < kLanes<T>; ++row) {
                    square[row] = load(mixed + (dim + row) * kQueries + first) * inverse;
                }
                transpose<T>(square);
                for (int64_t lane = 0; lane < count; ++lane) {
                    const int64_t row = batch * params_.tokens + logits_.token(first + lane);
                    const int64_t at = (row * params_.heads + head) * params_.head_dim + dim;
                    write_lanes<T>(element(params_.out, params_.type, at), square[lane], params_.type,
                                   params_.head_dim - dim);
                }
            }
        }
    }

private:
    static constexpr T kLowest = std::numeric_limits<T>::lowest();
    // The reference need not be the maximum: sums may grow to this before they are rescaled, which is rare.
    static constexpr T kCrowded = T(1ull << 60);

    // Finds the highest logit of each query.
    struct Highest {
        Vector<T> highest[kVectors];

        Highest() {
            for (int v = 0; v < kVectors; ++v) highest[v] = splat(kLowest);
        }
        template <class Checked>
        void operator()(int64_t, int64_t, int v, Vector<T> first, Vector<T> second, Checked) {
            highest[v] = larger<T>(highest[v], larger<T>(first, second));
        }
    };

    // Sums weights and passes them to `take`.
    template <class Take>
    struct Weigh {
        const Logits<T, kVectors>& logits;
        const bool drops;
        Vector<T> total[kVectors], reference[kVectors];
        Take take;

        Weigh(const Softmax& softmax, Take take_weights)
            : logits(softmax.logits_), drops(softmax.logits_.drops()), take(take_weights) {
            for (int v = 0; v < kVectors; ++v) {
                total[v] = softmax.total_[v];
                reference[v] = softmax.reference_[v];
            }
        }
        template <class Checked>
        void operator()(int64_t pair, int64_t key, int v, Vector<T> first, Vector<T> second, Checked checked) {
            first = exp2<kDegree>(first - reference[v]);
            second = exp2<kDegree>(second - reference[v]);
            total[v] += first + second;
            if (checked && drops) {
                first *= logits.dropout_factor(v, key);
                second *= logits.dropout_factor(v, key + 1);
            }
            take(pair, v, first, second);
        }
    };

    const ForwardParams& params_;
    Logits<T, kVectors> logits_;
    Vector<T> reference_[kVectors], total_[kVectors];  // weights are relative to the reference
};

}  // namespace
}  // namespace beit_fast
