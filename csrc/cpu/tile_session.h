// The tiles of AMX as every operator here uses them: eight of 16 rows of 64 bytes. Internal linkage: only code for AMX
// includes it.
#pragma once

#include <cstdint>

namespace beit_fast {
namespace {

struct alignas(64) TileConfiguration {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Sets up the tiles of this thread, and gives them back: a thread with live tiles is slow to switch.
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

}  // namespace
}  // namespace beit_fast
