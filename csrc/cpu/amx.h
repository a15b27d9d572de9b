// Tiles of AMX: eight registers of 16 rows of 64 bytes. C[16][16] fp32 += A[16][32 bf16] * B[16 pairs][16 columns].
#pragma once

#include <cstdint>

namespace beit_fast {
namespace {

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Configures the tiles of this thread, and releases them: a thread with live tiles is slow to switch.
class TileSession {
public:
    TileSession() {
        const TileConfiguration configuration;
        asm volatile("ldtilecfg %0" ::"m"(configuration));
    }
    ~TileSession() { asm volatile("tilerelease" ::: "memory"); }
    TileSession(const TileSession&) = delete;
    TileSession& operator=(const TileSession&) = delete;
};

constexpr int64_t kTileRows = 16, kTileWords = 256, kStepDepth = 32;  // depth: bf16 numbers that one product contracts

template <int kTile>
inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}

// Rows are `tiles` rows of 64 bytes apart.
template <int kTile>
inline void tile_load(const void* from, long tiles = 1) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(64 * tiles), "i"(kTile) : "memory");
}

template <int kTile>
inline void tile_store(void* to, long tiles = 1) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(64 * tiles), "i"(kTile) : "memory");
}

template <int kC, int kA, int kB>
inline void tile_multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace beit_fast
