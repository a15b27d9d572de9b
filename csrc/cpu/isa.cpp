#include "cpu/isa.h"

#include <cstdint>
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace beit_fast {
namespace {

#if defined(__x86_64__)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf) {
    Registers r;
    __get_cpuid_count(leaf, subleaf, &r.a, &r.b, &r.c, &r.d);
    return r;
}

bool has(unsigned word, int bit) { return (word >> bit & 1u) != 0; }

// The register states that the operating system saves.
uint64_t saved_states() {
    if (!has(cpuid(1, 0).c, 27)) return 0;
    unsigned low, high;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return static_cast<uint64_t>(high) << 32 | low;
}

// Linux gives a process tiles when it asks.
bool may_use_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

bool runs(Isa isa) {
    const Registers one = cpuid(1, 0), seven = cpuid(7, 0), more = cpuid(7, 1);
    const uint64_t states = saved_states();
    switch (isa) {
        case Isa::portable: return true;
        case Isa::avx2:
            return (states & 0x6) == 0x6 && has(one.c, 12) && has(one.c, 28) && has(one.c, 29) && has(seven.b, 5);
        case Isa::avx512:
            return runs(Isa::avx2) && (states & 0xe6) == 0xe6 && has(seven.b, 16) && has(seven.b, 17) &&
                   has(seven.b, 30) && has(seven.b, 31);
        case Isa::avx512_bf16: return runs(Isa::avx512) && has(more.a, 5);
        case Isa::amx:
            return runs(Isa::avx512_bf16) && has(seven.c, 1) && has(seven.d, 22) && has(seven.d, 24) &&
                   (states & 0x60000) == 0x60000 && may_use_tiles();
    }
    return false;
}

#else

bool runs(Isa isa) { return isa == Isa::portable; }

#endif

constexpr Isa kCompiled[] = {
#if defined(BEIT_FAST_HAS_PORTABLE)
    Isa::portable,
#endif
#if defined(BEIT_FAST_HAS_AVX2)
    Isa::avx2,
#endif
#if defined(BEIT_FAST_HAS_AVX512)
    Isa::avx512,
#endif
#if defined(BEIT_FAST_HAS_AVX512_BF16)
    Isa::avx512_bf16,
#endif
#if defined(BEIT_FAST_HAS_AMX)
    Isa::amx,
#endif
};

std::string names_of(const std::vector<Isa>& isas) {
    std::string names;
    for (const Isa isa : isas) {
        if (!names.empty()) names += ',';
        names += isa_name(isa);
    }
    return names;
}

Isa choose() {
    const char* asked = std::getenv("BEIT_FAST_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return available_isas().back();
    for (const Isa isa : available_isas()) {
        if (std::string(isa_name(isa)) == asked) return isa;
    }
    throw std::invalid_argument("BEIT_FAST_CPU_ISA is '" + std::string(asked) + "'; this machine and build run " +
                                names_of(available_isas()));
}

}  // namespace

const char* isa_name(Isa isa) {
    switch (isa) {
        case Isa::portable: return "portable";
        case Isa::avx2: return "avx2";
        case Isa::avx512: return "avx512";
        case Isa::avx512_bf16: return "avx512_bf16";
        case Isa::amx: return "amx";
    }
    return "unknown";
}

const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> isas = [] {
        std::vector<Isa> found;
        for (const Isa isa : kCompiled) {
            if (runs(isa)) found.push_back(isa);
        }
        return found;
    }();
    return isas;
}

Isa current_isa() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace beit_fast

// For `beit-fast info`: the instruction set in use, empty where BEIT_FAST_CPU_ISA names one that is not available.
extern "C" __attribute__((visibility("default"))) const char* beit_fast_cpu_isa() {
    try {
        return beit_fast::isa_name(beit_fast::current_isa());
    } catch (const std::invalid_argument&) {
        return "";
    }
}

extern "C" __attribute__((visibility("default"))) const char* beit_fast_cpu_isas() {
    static const std::string names = beit_fast::names_of(beit_fast::available_isas());
    return names.c_str();
}
