#include "emulator.h"

#include <ucontext.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

namespace emulation {

Index thread_index;
Index block_index;
int num_sms;

namespace {

constexpr int kThreads = 128;
constexpr int kStackBytes = 1 << 17;

struct Range {
    const char* begin;
    const char* end;
};

struct Copy {
    void* shared;
    const void* global;
    bool valid;
};

struct Thread {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(kStackBytes);
    std::vector<std::vector<Copy>> groups;  // pending copies; the last group is open
    bool finished;
    int exchanges;
};

struct Barrier {
    int arrived = 0;
    int generation = 0;
};

struct Block {
    std::array<Thread, kThreads> threads;
    std::array<int, kThreads> order;  // order in which threads run
    ucontext_t scheduler;
    Barrier all;
    std::array<Barrier, kThreads / 32> warps;
    alignas(16) char exchanged[kThreads / 32][2][32 * 64];
    void (*body)();
    bool progress;
};

Block block;
std::vector<Range> readable;
Range output;
std::vector<bool> written;  // bytes of the output
bool copies_end_early;
std::string first_error;

void report_error(const std::string& text) {
    if (!first_error.empty()) return;
    first_error = "block " + std::to_string(block_index.x) + ", thread " + std::to_string(thread_index.x) + ": " + text;
}

void check_alignment(const void* address, int64_t bytes) {
    if (reinterpret_cast<uintptr_t>(address) % static_cast<uintptr_t>(bytes) == 0) return;
    report_error("an access to " + std::to_string(bytes) + " bytes at an address that is not a multiple of them");
}

Thread& current() { return block.threads[thread_index.x]; }

void yield() { swapcontext(&current().context, &block.scheduler); }

void wait_at(Barrier& barrier, int threads) {
    const int generation = barrier.generation;
    block.progress = true;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        return;
    }
    while (barrier.generation == generation) yield();
    block.progress = true;
}

void run_thread() {
    block.body();
    if (current().groups.size() != 1 || !current().groups[0].empty()) report_error("copies are pending at the end");
    current().finished = true;
    block.progress = true;
    yield();
}

void start(Thread& thread) {
    thread.finished = false;
    thread.exchanges = 0;
    thread.groups.assign(1, {});
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack.data();
    thread.context.uc_stack.ss_size = thread.stack.size();
    thread.context.uc_link = &block.scheduler;
    makecontext(&thread.context, run_thread, 0);
}

void finish(const std::vector<Copy>& group) {
    for (const Copy& copy : group) {
        if (copy.valid && may_read(copy.global, 16)) {
            std::memcpy(copy.shared, copy.global, 16);
        } else {
            std::memset(copy.shared, 0, 16);
        }
    }
}

// Returns whether all threads finished.
bool run_block(void (*body)()) {
    block.body = body;
    block.all = {};
    block.warps = {};
    for (Thread& thread : block.threads) start(thread);
    do {
        block.progress = false;
        for (int index : block.order) {
            thread_index.x = static_cast<unsigned>(index);
            if (!current().finished) swapcontext(&block.scheduler, &current().context);
        }
    } while (block.progress);
    return std::all_of(block.threads.begin(), block.threads.end(),
                       [](const Thread& thread) { return thread.finished; });
}

}  // namespace

void synchronize_block() { wait_at(block.all, kThreads); }

void synchronize_warp() { wait_at(block.warps[thread_index.x / 32], 32); }

void copy_async(void* shared, const void* global, bool valid) {
    const Copy copy{shared, global, valid};
    if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) report_error("a copy to an address not aligned to 16 bytes");
    if (copies_end_early) {
        finish({copy});
    } else {
        current().groups.back().push_back(copy);
    }
}

void commit_copies() { current().groups.emplace_back(); }

void wait_for_copies(int pending) {
    auto& groups = current().groups;
    while (static_cast<int>(groups.size()) - 1 > pending) {
        finish(groups.front());
        groups.erase(groups.begin());
    }
}

bool may_read(const void* address, int64_t bytes) {
    const char* begin = static_cast<const char*>(address);
    const bool allowed = std::any_of(readable.begin(), readable.end(), [&](const Range& range) {
        return range.begin <= begin && begin + bytes <= range.end;
    });
    if (!allowed) report_error("a read of " + std::to_string(bytes) + " bytes outside of all tensors");
    check_alignment(address, bytes);
    return allowed;
}

bool may_write(const void* address, int64_t bytes) {
    const int64_t place = static_cast<const char*>(address) - output.begin;
    if (place < 0 || place + bytes > output.end - output.begin) {
        report_error("a write of " + std::to_string(bytes) + " bytes outside of the result");
        return false;
    }
    check_alignment(address, bytes);
    for (int64_t i = place; i < place + bytes; ++i) {
        if (written[static_cast<size_t>(i)]) report_error("byte " + std::to_string(i) + " is written twice");
        written[static_cast<size_t>(i)] = true;
    }
    return true;
}

void* exchange_buffer(const void* own, int bytes) {
    const unsigned warp = thread_index.x / 32;
    char* buffer = block.exchanged[warp][current().exchanges++ % 2];
    std::memcpy(buffer + lane() * bytes, own, static_cast<size_t>(bytes));
    synchronize_warp();
    return buffer;
}

void allow_reads(const void* address, int64_t bytes) {
    const char* begin = static_cast<const char*>(address);
    readable.push_back({begin, begin + bytes});
}

void expect_writes(void* address, int64_t bytes) {
    output.begin = static_cast<const char*>(address);
    output.end = output.begin + bytes;
    written.assign(static_cast<size_t>(bytes), false);
}

void run_blocks(int64_t blocks, void (*body)()) {
    for (int64_t index = 0; index < blocks; ++index) {
        block_index.x = static_cast<unsigned>(index);
        if (!run_block(body)) return report_error("threads wait at a barrier that others never reach");
    }
    const auto missing = std::find(written.begin(), written.end(), false);
    if (missing != written.end()) report_error("byte " + std::to_string(missing - written.begin()) + " is not written");
}

}  // namespace emulation

// Call before the operator: `seed` chooses the order of the threads, and the kernel may read these pixels.
BEIT_FAST_EXPORT void prepare(int num_sms, bool copies_end_early, unsigned seed, const void* pixels,
                              int64_t bytes) {
    emulation::num_sms = num_sms;
    emulation::copies_end_early = copies_end_early;
    emulation::first_error.clear();
    std::iota(emulation::block.order.begin(), emulation::block.order.end(), 0);
    std::shuffle(emulation::block.order.begin(), emulation::block.order.end(), std::mt19937(seed));
    emulation::readable.clear();
    emulation::allow_reads(pixels, bytes);
}

// Call after the operator: the first error of the kernel, or an empty text.
BEIT_FAST_EXPORT const char* first_error() { return emulation::first_error.c_str(); }
