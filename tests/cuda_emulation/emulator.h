#pragma once

#include <cstdint>
#include <cstring>

#define BEIT_FAST_EXPORT extern "C" __attribute__((visibility("default")))

// A block of 128 threads as coroutines on one processor. A thread runs until it meets the others, so that a missing
// barrier shows; copies end as late, or as early, as they may; and every access to global memory is checked.
namespace emulation {

struct Index {
    unsigned x;
};
extern Index thread_index;
extern Index block_index;
extern int num_sms;

inline int lane() { return static_cast<int>(thread_index.x % 32); }

void allow_reads(const void* address, int64_t bytes);
void expect_writes(void* address, int64_t bytes);  // of each byte, once
void run_blocks(int64_t blocks, void (*body)());

void synchronize_block();
void synchronize_warp();

void copy_async(void* shared, const void* global, bool valid);
void commit_copies();
void wait_for_copies(int pending);

// Whether so many bytes may be read there; if not, that is told at the end.
bool may_read(const void* address, int64_t bytes);

template <class T>
T load(const void* address) {
    T value{};
    if (may_read(address, sizeof(T))) std::memcpy(&value, address, sizeof(T));
    return value;
}

// Whether so many bytes are to be written there, and were not before; if not, that is told at the end.
bool may_write(const void* address, int64_t bytes);

template <class T>
void store(void* address, const T& value) {
    if (may_write(address, sizeof(T))) std::memcpy(address, &value, sizeof(T));
}

// The buffer of this warp in which `bytes` of every lane stand in a row, once all have come here. It is written again
// at the exchange after the next, which no lane reaches before all have read.
void* exchange_buffer(const void* own, int bytes);

template <class T>
const T* exchange(const T& own) {
    return static_cast<const T*>(exchange_buffer(&own, sizeof(T)));
}

}  // namespace emulation
