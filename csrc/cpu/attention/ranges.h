// Ranges of items: what a thread holds while it works on them, and the loops over them.
#pragma once

#include <cstdlib>
#include <new>

#include "cpu/attention/backward.h"
#include "cpu/attention/forward_vector.h"

namespace beit_fast {
namespace {

// Memory of this thread, kept for its next call unless it is large.
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

// Runs `work(scratch)` with the memory that it takes while `scratch` only counts.
template <class Work>
void with_scratch(Work work) {
    static thread_local ThreadMemory memory;
    Scratch counter(nullptr);
    work(counter, true);
    Scratch scratch(memory.reserve(counter.used()));
    work(scratch, false);
    memory.trim();
}

// The bias and the mask of the head that is being worked on.
template <class T>
class HeadContext {
public:
    // With `by_columns` the order of the keys follows the band where there is one.
    HeadContext(const AttentionProblem& problem, bool by_columns, Scratch& scratch)
        : problem_(problem),
          by_columns_(by_columns && problem.has_bias()),
          geometry_(problem),
          band_(scratch.take<T>(geometry_.size)),
          column_(scratch.take<T>(problem.has_bias() ? column_scratch(geometry_) : 0)),
          offsets_(scratch.take<int64_t>(problem.has_bias() ? problem.tokens : 0)),
          key_tokens_(scratch.take<int64_t>(by_columns_ ? problem.tokens : 0)),
          allowed_(scratch.take<uint8_t>(problem.key_mask.data != nullptr ? problem.tokens : 0)) {}

    void prepare() {
        bias_.keys = {problem_.tokens, by_columns_ ? key_tokens_ : nullptr};
        if (!problem_.has_bias()) return;
        for (int64_t key = 0; key < problem_.tokens; ++key) {
            const bool moves = by_columns_ && key < geometry_.patches;
            const int64_t inner = moves ? geometry_.patch_by_column(key) : key;
            offsets_[key] = geometry_.offset(inner);
            if (by_columns_) key_tokens_[key] = token_of(inner, problem_.tokens);
        }
        bias_.band = band_;
        bias_.offsets = offsets_;
    }

    void load(int64_t batch, int64_t head) {
        if (problem_.has_bias() && head != head_) {
            bias_.cls_to_patch = fill_band(band_, column_, problem_, geometry_, head);
        }
        const MaskView& mask = problem_.key_mask;
        if (mask.data != nullptr && batch != batch_) {
            for (int64_t key = 0; key < problem_.tokens; ++key) {
                allowed_[key] = mask.data[batch * mask.batch_stride + bias_.keys(key) * mask.token_stride];
            }
            bias_.allowed = allowed_;
        }
        head_ = head;
        batch_ = batch;
    }

    const HeadBias<T>& bias() const { return bias_; }

private:
    const AttentionProblem& problem_;
    const bool by_columns_;
    const BandGeometry geometry_;
    T *band_, *column_;
    int64_t *offsets_, *key_tokens_;
    uint8_t* allowed_;
    HeadBias<T> bias_;
    int64_t head_ = -1, batch_ = -1;
};

template <class Kernel>
int64_t query_blocks(const ForwardProblem& problem) {
    return padded(problem.tokens, Kernel::kQueries) / Kernel::kQueries;
}

// Items of the forward are (head, sample, block of queries), the last fastest.
template <class Kernel, class T, class Run>
void forward_range(const ForwardProblem& problem, int64_t begin, int64_t end, Run run) {
    with_scratch([&](Scratch& scratch, bool counting) {
        HeadContext<T> context(problem, true, scratch);
        Kernel kernel(problem, scratch);
        if (counting) return;
        context.prepare();
        const int64_t blocks = query_blocks<Kernel>(problem);
        for (int64_t item = begin; item < end;) {
            const int64_t plane = item / blocks, head = plane / problem.batch, batch = plane % problem.batch;
            const int64_t last = std::min(end, (plane + 1) * blocks);
            const int64_t first_query = item % blocks * Kernel::kQueries;
            const int64_t last_query = std::min(problem.tokens, first_query + (last - item) * Kernel::kQueries);
            context.load(batch, head);
            kernel.load_head(batch, head, context.bias().keys, first_query, last_query);
            for (int64_t query = first_query; query < last_query; query += Kernel::kQueries) {
                run(kernel, context.bias(), batch, head, query);
                if (last < end) {  // the head that follows, a share of it in each turn
                    const int64_t next = plane + 1, share = query + Kernel::kQueries;
                    prefetch_tokens(problem, next % problem.batch, next / problem.batch, query,
                                    std::min(problem.tokens, share));
                }
            }
            item = last;
        }
    });
}

// With the fewest vectors that hold `vectors`, halving from kVectors on.
template <int kVectors, class Kernel, class T>
void run_vectors(Kernel& kernel, const HeadBias<T>& bias, int64_t batch, int64_t head, int64_t query, int64_t vectors) {
    if constexpr (kVectors > 1) {
        if (vectors <= kVectors / 2) return run_vectors<kVectors / 2>(kernel, bias, batch, head, query, vectors);
    }
    kernel.template run<kVectors>(batch, head, query, bias);
}

template <class Kernel, class T>
void forward_on_vectors(const ForwardProblem& problem, int64_t begin, int64_t end) {
    const auto run = [&](Kernel& kernel, const HeadBias<T>& bias, int64_t batch, int64_t head, int64_t query) {
        const int64_t count = std::min(Kernel::kQueries, problem.tokens - query);
        run_vectors<kBlockVectors>(kernel, bias, batch, head, query, padded(count, kLanes<T>) / kLanes<T>);
    };
    forward_range<Kernel, T>(problem, begin, end, run);
}

inline int64_t backward_items(const BackwardProblem& problem) {
    return problem.heads * problem.batch * problem.key_parts;
}

// Items of the backward are (head, sample, part of the keys), the last fastest.
template <class Products>
void backward_range(const BackwardProblem& problem, int64_t begin, int64_t end) {
    with_scratch([&](Scratch& scratch, bool counting) {
        HeadContext<typename Products::Number> context(problem, false, scratch);
        Backward<Products> kernel(problem, scratch);
        if (counting) return;
        context.prepare();
        for (int64_t item = begin; item < end; ++item) {
            const int64_t plane = item / problem.key_parts, head = plane / problem.batch, batch = plane % problem.batch;
            context.load(batch, head);
            kernel.run(batch, head, item % problem.key_parts, context.bias());
        }
    });
}

}  // namespace
}  // namespace beit_fast
