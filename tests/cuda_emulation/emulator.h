#pragma once

#include <cstdint>
#include <cstring>

#define BEIT_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// Emulates a block of 128 threads as coroutines on one CPU core. A thread runs until it reaches a barrier, so that a
// missing barrier gives wrong results. Copies end as late or as early as possible. Every access to global memory is
// checked.
namespace emulation {

struct Index {
    unsigned x;
};
extern Index thread_index;
extern Index block_index;
extern int num_sms;

inline int lane() { return static_cast<int>(thread_index.x % 32); }

void allow_reads(const void* address, int64_t bytes);
void expect_writes(void* address, int64_t bytes);  // each byte once
void run_blocks(int64_t blocks, void (*body)());

void synchronize_block();
void synchronize_warp();

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// Returns whether `bytes` at `address` may be read; otherwise reports an error.
bool may_read(const void* address, int64_t bytes);

template <class T>
T load(const void* address) {
    T value{};
    if (may_read(address, sizeof(T))) std::memcpy(&value, address, sizeof(T));
    return value;
}

// Returns whether `address` is in the output; reports an error if it is not, or if a byte is written twice.
bool may_write(const void* address, int64_t bytes);

template <class T>
void store(void* address, const T& value) {
    if (may_write(address, sizeof(T))) std::memcpy(address, &value, sizeof(T));
}

// Returns the buffer of this warp with `bytes` of every lane in order, after all lanes have arrived. Two buffers
// alternate, so that all lanes have read one before it is written again.
void* exchange_buffer(const void* own, int bytes);

template <class T>
const T* exchange(const T& own) {
    return static_cast<const T*>(exchange_buffer(&own, sizeof(T)));
}

}  // namespace emulation
