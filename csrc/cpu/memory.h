// Aligned memory, and prefetching.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <new>

namespace beit_fast {
namespace {

// Uninitialized numbers, aligned to a cache line.
template <typename Number>
class AlignedArray {
public:
    explicit AlignedArray(int64_t count)
        : numbers_(static_cast<Number*>(::operator new(count * sizeof(Number), alignment))) {}
    ~AlignedArray() { ::operator delete(numbers_, alignment); }
    AlignedArray(const AlignedArray&) = delete;
    AlignedArray& operator=(const AlignedArray&) = delete;

    Number* data() const { return numbers_; }

private:
    static constexpr std::align_val_t alignment{64};
    Number* numbers_;
};

// Prefetches memory into L2, a share of it at each of `steps` steps.
class Prefetch {
public:
    Prefetch(const void* memory, int64_t bytes, int64_t steps)
        : line_(static_cast<const char*>(memory)),
          end_(memory == nullptr ? line_ : line_ + bytes),
          step_bytes_((bytes / 64 / steps + 1) * 64) {}

    void advance() {
        const char* stop = std::min(end_, line_ + step_bytes_);
        for (; line_ < stop; line_ += 64) __builtin_prefetch(line_, 0, 2);
    }

private:
    const char* line_;
    const char* end_;
    int64_t step_bytes_;
};

}  // namespace
}  // namespace beit_fast
