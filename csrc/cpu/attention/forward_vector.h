// Forward on vectors, a block of queries and 64 keys at a time. Scores are S^T [keys, queries] = K Q^T and the output
// is O^T [dims, queries] = V^T P^T: queries are lanes in both, keys and values are read number by number.
#pragma once

#include <algorithm>

#include "cpu/attention/matmul.h"
#include "cpu/attention/scratch.h"
#include "cpu/attention/softmax.h"
#include "cpu/attention/tokens.h"
#include "cpu/split_bf16.h"

namespace beit_fast {
namespace {

// The layout of operands of single numbers.
template <class T>
struct PlainOperands {
    using Product = PlainProduct<T>;
    using Element = T;
    using Sum = T;
    static constexpr int64_t kNumbers = 1;  // of an element

    static void pack_rows(T* to, const T* rows, int64_t count) { std::memcpy(to, rows, sizeof(T) * count); }
    static void pack_pair(T* to, const T* first, const T* second, int64_t length) {
        std::memcpy(to, first, sizeof(T) * length);
        std::memcpy(to + length, second, sizeof(T) * length);
    }
    static void put_pair(T* to, int64_t stride, Vector<T> first, Vector<T> second) {
        store(to, first);
        store(to + stride, second);
    }
};

#if defined(__AVX512BF16__)
// The layout of operands of bf16 pairs: two neighbours in the dimension of the sum share a word.
struct PairOperands {
    using Product = PairProduct;
    using Element = uint32_t;
    using Sum = float;
    static constexpr int64_t kNumbers = 2;

    // Neighbours in a row.
    static void pack_rows(uint32_t* to, const float* rows, int64_t count) {
        for (int64_t i = 0; i < count; i += 32) {
            const auto bits = _mm512_cvtne2ps_pbh((__m512)load(rows + i + 16), (__m512)load(rows + i));
            std::memcpy(to + i / 2, &bits, sizeof(bits));
        }
    }
    // Neighbours in a column.
    static void pack_pair(uint32_t* to, const float* first, const float* second, int64_t length) {
        for (int64_t i = 0; i < length; i += 16) store(to + i, pair_bf16(load(first + i), load(second + i)));
    }
    static void put_pair(uint32_t* to, int64_t, Vector<float> first, Vector<float> second) {
        store(to, pair_bf16(first, second));
    }
};
#endif

template <class Operands, int kDegree>
class VectorForward {
    using Element = typename Operands::Element;
    using Product = typename Operands::Product;
    using T = typename Operands::Sum;
    static constexpr int64_t kKeys = 64;
    static constexpr int64_t kNumbers = Operands::kNumbers;
    static_assert(kLanes<T> % kNumbers == 0 && kKeys % kLanes<T> == 0);

public:
    static constexpr int64_t kQueries = kBlockVectors * kLanes<T>;

    VectorForward(const ForwardParams& params, Scratch& scratch)
        : params_(params),
          keys_padded_(padded(params.tokens, kKeys)),
          length_(padded(params.head_dim, 2 * kLanes<T>)),
          keys_(scratch.take<Element>(keys_padded_ * length_ / kNumbers)),
          values_(scratch.take<Element>(keys_padded_ * length_ / kNumbers)),
          queries_(scratch.take<Element>(length_ / kNumbers * kQueries)),
          scores_(scratch.take<T>(kKeys * kQueries)),
          weights_(scratch.take<Element>(kKeys / kNumbers * kQueries)),
          mixed_(scratch.take<T>(length_ * kQueries)),
          rows_(scratch.take<T>(kKeys * length_)),
          packed_(scratch.take<Element>(kLanes<T> * length_)) {}

    // Converts the keys and values of one head.
    void load_head(int64_t batch, int64_t head, TokenOrder order, int64_t, int64_t) {
        for (int64_t first = 0; first < keys_padded_; first += kKeys) {
            read_tokens(rows_, length_, params_, params_.k, batch, head, order, first, kKeys);
            Operands::pack_rows(keys_ + first * length_ / kNumbers, rows_, kKeys * length_);
            read_tokens(rows_, length_, params_, params_.v, batch, head, order, first, kKeys);
            for (int64_t key = 0; key < kKeys; key += 2) {
                Operands::pack_pair(values_ + (first + key) * length_ / kNumbers, rows_ + key * length_,
                                    rows_ + (key + 1) * length_, length_);
            }
        }
    }

    // Attention of kVectors vectors of queries from `first_query` on, inner tokens.
    template <int kVectors>
    void run(int64_t batch, int64_t head, int64_t first_query, const HeadBias<T>& bias) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        Softmax<T, kVectors, kDegree> softmax(params_, bias);
        softmax.begin(batch, head, first_query);
        pack_queries<kVectors>(batch, head, first_query);
        Vector<T> factors[kVectors];
        for (int64_t key = 0; key < params_.tokens; key += kKeys) {
            const int64_t count = std::min(kKeys, padded(params_.tokens - key, 2));
            const LeftOperand<Element> keys{keys_ + key * length_ / kNumbers, length_ / kNumbers, 1};
            multiply<Product, kVectors>(count, keys, queries_, kColumns, length_ / kNumbers, scores_, kColumns, false);
            if (key == 0) softmax.move_reference(scores_, 0, std::min<int64_t>(8, count / 2), factors);
            if (!weigh<kVectors>(softmax, key, count / 2)) {
                softmax.move_reference(scores_, key, count / 2, factors);
                if (key > 0) rescale<kVectors>(factors);
                weigh<kVectors>(softmax, key, count / 2);
            }
            const LeftOperand<Element> values{values_ + key * length_ / kNumbers, 1, length_};
            multiply<Product, kVectors>(params_.head_dim, values, weights_, kColumns, count / kNumbers, mixed_,
                                        kColumns, key > 0);
        }
        softmax.finish(mixed_, batch, head);
    }

private:
    template <int kVectors>
    void pack_queries(int64_t batch, int64_t head, int64_t first_query) {
        for (int v = 0; v < kVectors; ++v) {
            const int64_t first = first_query + v * kLanes<T>;
            read_tokens(rows_, length_, params_, params_.q, batch, head, {params_.tokens}, first, kLanes<T>);
            Operands::pack_rows(packed_, rows_, kLanes<T> * length_);
            transpose_rows(queries_ + v * kLanes<T>, kVectors * kLanes<T>, packed_, length_ / kNumbers);
        }
    }

    template <int kVectors, class Softmax>
    bool weigh(Softmax& softmax, int64_t first_key, int64_t pairs) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        const auto take = [this](int64_t pair, int v, Vector<T> first, Vector<T> second) {
            Operands::put_pair(weights_ + 2 / kNumbers * pair * kColumns + v * kLanes<T>, kColumns, first, second);
        };
        return softmax.add_keys(scores_, first_key, pairs, take);
    }

    template <int kVectors>
    void rescale(const Vector<T>* factors) {
        for (int64_t row = 0; row < params_.head_dim; ++row) {
            for (int v = 0; v < kVectors; ++v) {
                T* at = mixed_ + (row * kVectors + v) * kLanes<T>;
                store(at, load(at) * factors[v]);
            }
        }
    }

    const ForwardParams& params_;
    const int64_t keys_padded_, length_;
    Element *keys_, *values_, *queries_;
    T* scores_;
    Element* weights_;
    T *mixed_, *rows_;
    Element* packed_;
};

}  // namespace
}  // namespace beit_fast
