// Loops over ranges of items, and the memory of a thread that runs them.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/attention/backward.h"
#include "cpu/attention/forward_vector.h"

namespace beit_fast {
namespace {

// Memory of this thread, cached for its next call unless it is large.
class ThreadMemory {
public:
    ~ThreadMemory() { std::free(memory_); }

    char* reserve(int64_t bytes) {
        if (bytes > size_) {
            std::free(memory_);
            size_ = 0;
            memory_ = static_cast<char*>(std::aligned_alloc(4096, padded(bytes, 4096)));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = bytes;
        }
        return memory_;
    }

    void trim() {
        constexpr int64_t kKept = int64_t{16} << 20;
        if (size_ <= kKept) return;
        std::free(memory_);
        memory_ = nullptr;
        size_ = 0;
    }

private:
    char* memory_ = nullptr;
    int64_t size_ = 0;
};

// Runs `work(scratch, counting)` twice: to count the bytes that it needs, and with that memory.
template <class Work>
void with_scratch(Work work) {
    static thread_local ThreadMemory memory;
    Scratch counter(nullptr);
    work(counter, true);
    Scratch scratch(memory.reserve(counter.used()));
    work(scratch, false);
    memory.trim();
}

// The bias and the mask of the current head.
template <class T>
class HeadContext {
public:
    // With `by_columns` the order of the keys follows the packed bias, if there is one.
    HeadContext(const AttentionParams& params, bool by_columns, Scratch& scratch)
        : params_(params),
          by_columns_(by_columns && params.has_bias()),
          layout_(params),
          packed_(scratch.take<T>(layout_.size)),
          column_(scratch.take<T>(params.has_bias() ? column_scratch(layout_) : 0)),
          offsets_(scratch.take<int64_t>(params.has_bias() ? params.tokens : 0)),
          key_tokens_(scratch.take<int64_t>(by_columns_ ? params.tokens : 0)),
          allowed_(scratch.take<uint8_t>(params.key_mask.data != nullptr ? params.tokens : 0)) {}

    void prepare() {
        bias_.keys = {params_.tokens, by_columns_ ? key_tokens_ : nullptr};
        if (!params_.has_bias()) return;
        for (int64_t key = 0; key < params_.tokens; ++key) {
            const bool moves = by_columns_ && key < layout_.patches;
            const int64_t inner = moves ? layout_.patch_by_column(key) : key;
            offsets_[key] = layout_.offset(inner);
            if (by_columns_) key_tokens_[key] = token_of(inner, params_.tokens);
        }
        bias_.packed = packed_;
        bias_.offsets = offsets_;
    }

    void load(int64_t batch, int64_t head) {
        if (params_.has_bias() && head != head_) {
            bias_.cls_to_patch = pack_bias(packed_, column_, params_, layout_, head);
        }
        const MaskView& mask = params_.key_mask;
        if (mask.data != nullptr && batch != batch_) {
            for (int64_t key = 0; key < params_.tokens; ++key) {
                allowed_[key] = mask.data[batch * mask.batch_stride + bias_.keys(key) * mask.token_stride];
            }
            bias_.allowed = allowed_;
        }
        head_ = head;
        batch_ = batch;
    }

    const HeadBias<T>& bias() const { return bias_; }

private:
    const AttentionParams& params_;
    const bool by_columns_;
    const PackedBiasLayout layout_;
    T *packed_, *column_;
    int64_t *offsets_, *key_tokens_;
    uint8_t* allowed_;
    HeadBias<T> bias_;
    int64_t head_ = -1, batch_ = -1;
};

template <class Kernel>
int64_t query_blocks(const ForwardParams& params) {
    return padded(params.tokens, Kernel::kQueries) / Kernel::kQueries;
}

// Items of the forward are (head, sample, block of queries), the last fastest.
template <class Kernel, class T, class Run>
void forward_range(const ForwardParams& params, int64_t begin, int64_t end, Run run) {
    with_scratch([&](Scratch& scratch, bool counting) {
        HeadContext<T> context(params, true, scratch);
        Kernel kernel(params, scratch);
        if (counting) return;
        context.prepare();
        const int64_t blocks = query_blocks<Kernel>(params);
        for (int64_t item = begin; item < end;) {
            const int64_t plane = item / blocks, head = plane / params.batch, batch = plane % params.batch;
            const int64_t last = std::min(end, (plane + 1) * blocks);
            const int64_t first_query = item % blocks * Kernel::kQueries;
            const int64_t last_query = std::min(params.tokens, first_query + (last - item) * Kernel::kQueries);
            context.load(batch, head);
            kernel.load_head(batch, head, context.bias().keys, first_query, last_query);
            for (int64_t query = first_query; query < last_query; query += Kernel::kQueries) {
                run(kernel, context.bias(), batch, head, query);
                if (last < end) {  // prefetch a share of the next head
                    const int64_t next = plane + 1, share = query + Kernel::kQueries;
                    prefetch_tokens(params, next % params.batch, next / params.batch, query,
                                    std::min(params.tokens, share));
                }
            }
            item = last;
        }
    });
}

// Runs with the fewest vectors, halved from kVectors, that hold `vectors`.
template <int kVectors, class Kernel, class T>
void run_vectors(Kernel& kernel, const HeadBias<T>& bias, int64_t batch, int64_t head, int64_t query, int64_t vectors) {
    if constexpr (kVectors > 1) {
        if (vectors <= kVectors / 2) return run_vectors<kVectors / 2>(kernel, bias, batch, head, query, vectors);
    }
    kernel.template run<kVectors>(batch, head, query, bias);
}

template <class Kernel, class T>
void forward_on_vectors(const ForwardParams& params, int64_t begin, int64_t end) {
    const auto run = [&](Kernel& kernel, const HeadBias<T>& bias, int64_t batch, int64_t head, int64_t query) {
        const int64_t count = std::min(Kernel::kQueries, params.tokens - query);
        run_vectors<kBlockVectors>(kernel, bias, batch, head, query, padded(count, kLanes<T>) / kLanes<T>);
    };
    forward_range<Kernel, T>(params, begin, end, run);
}

inline int64_t backward_items(const BackwardParams& params) {
    return params.heads * params.batch * params.num_splits;
}

// Items of the backward are (head, sample, split of the keys), the last fastest.
template <class Products>
void backward_range(const BackwardParams& params, int64_t begin, int64_t end) {
    with_scratch([&](Scratch& scratch, bool counting) {
        HeadContext<typename Products::Number> context(params, false, scratch);
        Backward<Products> kernel(params, scratch);
        if (counting) return;
        context.prepare();
        for (int64_t item = begin; item < end; ++item) {
            const int64_t plane = item / params.num_splits, head = plane / params.batch, batch = plane % params.batch;
            context.load(batch, head);
            kernel.run(batch, head, item % params.num_splits, context.bias());
        }
    });
}

}  // namespace
}  // namespace beit_fast
