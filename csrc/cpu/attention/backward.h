// Backward of attention. An item is one head of one sample and one split of its keys. It visits all queries
// in blocks, 64 keys at a time. With P the weights and dP = dO V^T:
//     dS = P (dP - delta),  delta = sum(dO O),  dV = P^T dO,  dK = scale dS^T Q,  dQ = scale dS K,
// and the gradient of the bias is dS, summed in the layout of the packed bias, then along the diagonals of the table.
#pragma once

#include <algorithm>

#include "cpu/attention/forward_vector.h"
#include "cpu/attention/kernels.h"

namespace beit_fast {
namespace {

constexpr int64_t kKeyBlock = 64;

// Inner keys of one split.
struct KeyRange {
    int64_t first, count;

    KeyRange(const BackwardParams& params, int64_t split) {
        const int64_t blocks = padded(params.tokens, kKeyBlock) / kKeyBlock;
        first = blocks * split / params.num_splits * kKeyBlock;
        count = std::min(blocks * (split + 1) / params.num_splits * kKeyBlock, params.tokens) - first;
    }
};

inline int64_t table_rows(const AttentionParams& params) {
    return (2 * params.window_height - 1) * (2 * params.window_width - 1) + 3;
}

// Sums gradients in the layout of the packed bias along the diagonals into `rows`, table rows of one head.
template <class T>
inline void reduce_packed_bias(T* rows, const T* packed, T cls_to_patch, const PackedBiasLayout& layout) {
    const int64_t wide = 2 * layout.width - 1, tall = 2 * layout.height - 1;
    std::fill(rows, rows + wide * tall, T(0));
    for (int64_t cj = 0; cj < layout.width; ++cj) {
        for (int64_t u = 0; u < tall; ++u) {
            const T* from = packed + cj * layout.column + u * layout.width;
            T* to = rows + u * wide + layout.width - 1 - cj;
            for (int64_t ci = 0; ci < layout.width; ++ci) to[ci] += from[ci];
        }
    }
    T patch_to_cls = T(0);
    for (int64_t i = 0; i < layout.patches; ++i) patch_to_cls += packed[layout.cls_row + i];
    rows[wide * tall] = cls_to_patch;
    rows[wide * tall + 1] = patch_to_cls;
    rows[wide * tall + 2] = packed[layout.cls_row + layout.patches];
}

// The five products of a block of queries and a block of keys, on vectors. Rows of keys and of queries have `length`
// numbers; scores are [keys, columns], one column a query.
template <class T>
class VectorProducts {
    using Product = PlainProduct<T>;

public:
    using Number = T;
    static constexpr int kDegree = 6;
    static constexpr int kMostVectors = kBlockVectors, kLeastVectors = 1;
    static constexpr int64_t kMultiple = kLanes<T>;  // of `length`

    VectorProducts(int64_t length, int64_t, Scratch& scratch)
        : length_(length),
          queries_transposed_(scratch.take<T>(kMostVectors * kLanes<T> * length)),
          grads_transposed_(scratch.take<T>(kMostVectors * kLanes<T> * length)) {}

    void load_keys(const T* keys, const T* values, int64_t) {
        keys_ = keys;
        values_ = values;
    }

    template <int kVectors>
    void load_queries(const T* queries, const T* grads) {
        queries_ = queries;
        grads_ = grads;
        for (int v = 0; v < kVectors; ++v) {
            const int64_t row = v * kLanes<T>, columns = kVectors * kLanes<T>;
            transpose_rows(queries_transposed_ + row, columns, queries + row * length_, length_);
            transpose_rows(grads_transposed_ + row, columns, grads + row * length_, length_);
        }
    }

    // S = K Q^T and dP = V dO^T for `count` keys from `key` on.
    template <int kVectors>
    void score(int64_t key, int64_t count, T* scores, T* grad_weights) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        multiply<Product, kVectors>(count, {keys_ + key * length_, length_, 1}, queries_transposed_, kColumns, length_,
                                    scores, kColumns, false);
        multiply<Product, kVectors>(count, {values_ + key * length_, length_, 1}, grads_transposed_, kColumns, length_,
                                    grad_weights, kColumns, false);
    }

    // Adds P dO to dV, dS Q to dK, and K^T dS to dQ^T; the first keys overwrite dQ^T.
    template <int kVectors>
    void mix(int64_t key, int64_t count, const T* weights, const T* grad_scores, T* grad_values, T* grad_keys,
             T* grad_queries) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        add_product(grad_values + key * length_, weights, grads_, count, kColumns);
        add_product(grad_keys + key * length_, grad_scores, queries_, count, kColumns);
        multiply<Product, kVectors>(length_, {keys_ + key * length_, 1, length_}, grad_scores, kColumns, count,
                                    grad_queries, kColumns, key > 0);
    }

private:
    // C[rows, length] += A[rows, columns] B[columns, length].
    void add_product(T* c, const T* a, const T* b, int64_t rows, int64_t columns) {
        constexpr int64_t kWide = kBlockVectors * kLanes<T>;
        int64_t dim = 0;
        for (; dim + kWide <= length_; dim += kWide) {
            multiply<Product, kBlockVectors>(rows, {a, columns, 1}, b + dim, length_, columns, c + dim, length_, true);
        }
        for (; dim < length_; dim += kLanes<T>) {
            multiply<Product, 1>(rows, {a, columns, 1}, b + dim, length_, columns, c + dim, length_, true);
        }
    }

    const int64_t length_;
    const T *keys_ = nullptr, *values_ = nullptr, *queries_ = nullptr, *grads_ = nullptr;
    T *queries_transposed_, *grads_transposed_;
};

// The keys of the largest split, in whole blocks.
inline int64_t most_keys(const BackwardParams& params) {
    const int64_t blocks = padded(params.tokens, kKeyBlock) / kKeyBlock;
    return padded(blocks, params.num_splits) / params.num_splits * kKeyBlock;
}

template <class Products>
class Backward {
    using T = typename Products::Number;

public:
    static constexpr int64_t kQueries = Products::kMostVectors * kLanes<T>;

    Backward(const BackwardParams& params, Scratch& scratch)
        : params_(params),
          layout_(params),
          length_(padded(params.head_dim, Products::kMultiple)),
          most_keys_(most_keys(params)),
          products_(length_, most_keys_, scratch),
          keys_(scratch.take<T>(most_keys_ * length_)),
          values_(scratch.take<T>(most_keys_ * length_)),
          grad_keys_(scratch.take<T>(most_keys_ * length_)),
          grad_values_(scratch.take<T>(most_keys_ * length_)),
          queries_(scratch.take<T>(kQueries * length_)),
          grads_(scratch.take<T>(kQueries * length_)),
          outs_(scratch.take<T>(kQueries * length_)),
          grad_queries_(scratch.take<T>(kQueries * length_)),
          weights_(scratch.take<T>(kKeyBlock * kQueries)),
          grad_scores_(scratch.take<T>(kKeyBlock * kQueries)),
          grad_bias_(params.grad_table == nullptr ? nullptr : scratch.take<T>(layout_.size)) {}

    void run(int64_t batch, int64_t head, int64_t split, const HeadBias<T>& bias) {
        const KeyRange keys(params_, split);
        const int64_t rows = padded(keys.count, kKeyBlock);
        const TokenOrder order{params_.tokens};
        read_tokens(keys_, length_, params_, params_.k, batch, head, order, keys.first, rows);
        read_tokens(values_, length_, params_, params_.v, batch, head, order, keys.first, rows);
        products_.load_keys(keys_, values_, rows);
        std::fill(grad_keys_, grad_keys_ + rows * length_, T(0));
        std::fill(grad_values_, grad_values_ + rows * length_, T(0));
        if (grad_bias_ != nullptr) std::fill(grad_bias_, grad_bias_ + layout_.size, T(0));
        cls_to_patch_ = T(0);
        for (int64_t query = 0; query < params_.tokens; query += kQueries) {
            const int64_t vectors = padded(std::min(kQueries, params_.tokens - query), kLanes<T>) / kLanes<T>;
            run_queries<Products::kMostVectors>(vectors, batch, head, split, query, keys, bias);
        }
        write_rows(params_.grad_k, grad_keys_, static_cast<T>(params_.scale), batch, head, keys.first, keys.count);
        write_rows(params_.grad_v, grad_values_, T(1), batch, head, keys.first, keys.count);
        if (grad_bias_ != nullptr) {
            const int64_t at = (head * params_.batch + batch) * params_.num_splits + split;
            T* to = static_cast<T*>(params_.partial_grad_table) + at * table_rows(params_);
            reduce_packed_bias(to, grad_bias_, cls_to_patch_, layout_);
        }
    }

private:
    template <int kVectors>
    void run_queries(int64_t vectors, int64_t batch, int64_t head, int64_t split, int64_t first_query, KeyRange keys,
                     const HeadBias<T>& bias) {
        if constexpr (kVectors > Products::kLeastVectors) {
            if (vectors <= kVectors / 2) {
                return run_queries<kVectors / 2>(vectors, batch, head, split, first_query, keys, bias);
            }
        }
        Logits<T, kVectors> logits(params_, bias);
        logits.begin(batch, head, first_query);
        Vector<T> lse[kVectors], delta[kVectors];
        load_queries<kVectors>(logits, batch, head, lse, delta);
        for (int64_t key = 0; key < keys.count; key += kKeyBlock) {
            const int64_t count = std::min(kKeyBlock, padded(keys.count - key, 2));
            products_.template score<kVectors>(key, count, weights_, grad_scores_);
            differentiate<kVectors>(logits, keys.first + key, count / 2, bias, lse, delta);
            products_.template mix<kVectors>(key, count, weights_, grad_scores_, grad_values_, grad_keys_,
                                             grad_queries_);
        }
        write_grad_queries<kVectors>(logits, batch, head, split);
    }

    template <int kVectors>
    void load_queries(const Logits<T, kVectors>& logits, int64_t batch, int64_t head, Vector<T>* lse,
                      Vector<T>* delta) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        const int64_t first = logits.first_query();
        const TokenOrder order{params_.tokens};
        read_tokens(queries_, length_, params_, params_.q, batch, head, order, first, kColumns);
        read_tokens(grads_, length_, params_, params_.grad_out, batch, head, order, first, kColumns);
        read_tokens(outs_, length_, params_, params_.out, batch, head, order, first, kColumns);
        products_.template load_queries<kVectors>(queries_, grads_);
        for (int v = 0; v < kVectors; ++v) {
            const int64_t row = v * kLanes<T>;
            for (int64_t lane = 0; lane < kLanes<T>; ++lane) {
                const int64_t at = batch * params_.lse_batch_stride + head * params_.lse_head_stride +
                                   logits.token(row + lane) * params_.lse_token_stride;
                const T value = static_cast<const T*>(params_.lse)[at] * static_cast<T>(1.4426950408889634);
                // Padding and queries without any key: their weights must be 0.
                const bool real = first + row + lane < params_.tokens && value != -Logits<T, kVectors>::kInfinity;
                lse[v][lane] = real ? value : Logits<T, kVectors>::kInfinity;
                Vector<T> products{};
                for (int64_t dim = (row + lane) * length_; dim < (row + lane + 1) * length_; dim += kLanes<T>) {
                    products += load(grads_ + dim) * load(outs_ + dim);
                }
                T sum = T(0);
                for (int i = 0; i < kLanes<T>; ++i) sum += products[i];
                delta[v][lane] = sum;
            }
        }
    }

    // Turns scores and dP into the weights and dS of a block of keys, in place; adds dS to the bias's gradient.
    template <int kVectors>
    void differentiate(const Logits<T, kVectors>& logits, int64_t first_key, int64_t pairs, const HeadBias<T>& bias,
                       const Vector<T>* lse, const Vector<T>* delta) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        const auto take = [&](int64_t pair, int64_t key, int v, Vector<T> first, Vector<T> second, auto checked) {
#pragma GCC unroll 2
            for (int i = 0; i < 2; ++i) {
                const int64_t at = (2 * pair + i) * kColumns + v * kLanes<T>;
                Vector<T> weight = exp2<Products::kDegree>((i == 0 ? first : second) - lse[v]);
                Vector<T> grad = load(grad_scores_ + at);
                Vector<T> kept = weight;
                if (checked && logits.drops()) {
                    const Vector<T> factor = logits.dropout_factor(v, key + i);
                    kept *= factor;
                    grad *= factor;
                }
                grad = weight * (grad - delta[v]);
                store(weights_ + at, kept);
                store(grad_scores_ + at, grad);
                if (grad_bias_ != nullptr && key + i < params_.tokens) add_to_grad_bias(logits, bias, key + i, v, grad);
            }
        };
        logits.visit(weights_, first_key, pairs, take);
    }

    template <int kVectors>
    void add_to_grad_bias(const Logits<T, kVectors>& logits, const HeadBias<T>& bias, int64_t key, int v,
                          Vector<T> grad) {
        if (logits.has_cls() && key + 1 != params_.tokens) {
            const Vector<T> of_cls = logits.is_cls(v) ? grad : Vector<T>{};
            for (int lane = 0; lane < kLanes<T>; ++lane) cls_to_patch_ += of_cls[lane];
            grad = logits.is_cls(v) ? Vector<T>{} : grad;
        }
        T* at = grad_bias_ + bias.offsets[key] + logits.first_query() + v * kLanes<T>;
        store(at, load(at) + grad);
    }

    template <int kVectors>
    void write_grad_queries(const Logits<T, kVectors>& logits, int64_t batch, int64_t head, int64_t split) {
        constexpr int64_t kColumns = kVectors * kLanes<T>;
        if (params_.grad_q == nullptr) return;
        for (int v = 0; v < kVectors; ++v) {  // write dQ as rows into queries_
            for (int64_t dim = 0; dim < length_; dim += kLanes<T>) {
                Vector<T> square[kLanes<T>];
                for (int row = 0; row < kLanes<T>; ++row) {
                    square[row] = load(grad_queries_ + (dim + row) * kColumns + v * kLanes<T>);
                }
                transpose<T>(square);
                for (int row = 0; row < kLanes<T>; ++row) {
                    store(queries_ + (v * kLanes<T> + row) * length_ + dim, square[row]);
                }
            }
        }
        const int64_t count = std::min(kColumns, params_.tokens - logits.first_query());
        if (params_.num_splits == 1) {
            const T scale = static_cast<T>(params_.scale);
            write_rows(params_.grad_q, queries_, scale, batch, head, logits.first_query(), count);
            return;
        }
        T* partial = static_cast<T*>(params_.partial_grad_q);
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = (split * params_.batch + batch) * params_.tokens + logits.token(i);
            std::memcpy(partial + (row * params_.heads + head) * params_.head_dim, queries_ + i * length_,
                        sizeof(T) * params_.head_dim);
        }
    }

    // Writes rows of T times `factor` to tokens of a contiguous gradient, or nothing if `grad` is null.
    void write_rows(void* grad, const T* rows, T factor, int64_t batch, int64_t head, int64_t first, int64_t count) {
        if (grad == nullptr) return;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t row = batch * params_.tokens + token_of(first + i, params_.tokens);
            const int64_t at = (row * params_.heads + head) * params_.head_dim;
            for (int64_t dim = 0; dim < params_.head_dim; dim += kLanes<T>) {
                write_lanes<T>(element(grad, params_.type, at + dim), load(rows + i * length_ + dim) * factor,
                               params_.type, params_.head_dim - dim);
            }
        }
    }

    const BackwardParams& params_;
    const PackedBiasLayout layout_;
    const int64_t length_, most_keys_;
    Products products_;
    T *keys_, *values_, *grad_keys_, *grad_values_;
    T *queries_, *grads_, *outs_, *grad_queries_;
    T *weights_, *grad_scores_, *grad_bias_;
    T cls_to_patch_ = T(0);
};

// Sums the partial results of dQ and of the table, in an order that does not depend on the number of threads.
template <class T>
inline void reduce_head(const BackwardParams& params, int64_t head) {
    if (params.partial_grad_q != nullptr) {
        const T* partial = static_cast<const T*>(params.partial_grad_q);
        const int64_t plane = params.batch * params.tokens * params.heads * params.head_dim;
        for (int64_t row = 0; row < params.batch * params.tokens; ++row) {
            const int64_t at = (row * params.heads + head) * params.head_dim, end = at + params.head_dim;
            int64_t dim = at;
            for (; dim + kLanes<T> <= end; dim += kLanes<T>) {
                Vector<T> sum{};
                for (int64_t split = 0; split < params.num_splits; ++split) sum += load(partial + split * plane + dim);
                write_lanes<T>(element(params.grad_q, params.type, dim), sum * static_cast<T>(params.scale),
                               params.type, kLanes<T>);
            }
            for (; dim < end; ++dim) {
                T sum = T(0);
                for (int64_t split = 0; split < params.num_splits; ++split) sum += partial[split * plane + dim];
                write_number<T>(params.grad_q, params.type, dim, sum * static_cast<T>(params.scale));
            }
        }
    }
    if (params.grad_table != nullptr) {
        const int64_t rows = table_rows(params), partials = params.batch * params.num_splits;
        const T* partial = static_cast<const T*>(params.partial_grad_table) + head * partials * rows;
        for (int64_t row = 0; row < rows; ++row) {
            double sum = 0;
            for (int64_t i = 0; i < partials; ++i) sum += partial[i * rows + row];
            write_number<double>(params.grad_table, params.table.type, row * params.heads + head, sum);
        }
    }
}

}  // namespace
}  // namespace beit_fast
