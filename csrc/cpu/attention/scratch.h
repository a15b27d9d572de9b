// Working memory of a thread: aligned pieces of one block. A first pass counts the bytes, a second one returns pieces.
#pragma once

#include <cstddef>
#include <cstdint>

namespace beit_fast {

class Scratch {
public:
    explicit Scratch(char* memory) : memory_(memory) {}

    // `count` numbers of T, aligned to 64 bytes; null while counting.
    template <class T>
    T* take(int64_t count) {
        char* piece = memory_ == nullptr ? nullptr : memory_ + used_;
        used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
        return reinterpret_cast<T*>(piece);
    }

    int64_t used() const { return used_; }

private:
    char* memory_;
    int64_t used_ = 0;
};

}  // namespace beit_fast
