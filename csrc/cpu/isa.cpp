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

bool saves(uint64_t states) { return (saved_states() & states) == states; }

// Linux grants a process the use of tiles on request.
bool request_tiles() {
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

// One function for each instruction set of csrc/build.py: whether this machine supports it.
[[maybe_unused]] bool supports_portable() { return true; }

[[maybe_unused]] bool supports_avx2() {
    const Registers one = cpuid(1, 0);
    return saves(0x6) && has(one.c, 12) && has(one.c, 28) && has(one.c, 29) && has(cpuid(7, 0).b, 5);
}

[[maybe_unused]] bool supports_avx512() {
    const Registers seven = cpuid(7, 0);
    return supports_avx2() && saves(0xe6) && has(seven.b, 16) && has(seven.b, 17) && has(seven.b, 30) &&
           has(seven.b, 31);
}

[[maybe_unused]] bool supports_avx512_bf16() { return supports_avx512() && has(cpuid(7, 1).a, 5); }

[[maybe_unused]] bool supports_amx() {
    const Registers seven = cpuid(7, 0);
    return supports_avx512_bf16() && has(seven.c, 1) && has(seven.d, 22) && has(seven.d, 24) && saves(0x60000) &&
           request_tiles();
}

#else

bool supports_portable() { return true; }

#endif

struct Entry {
    Isa isa;
    const char* name;
    bool (*supported)();
};

#define BEIT_FAST_ENTRY(isa) {Isa::isa, #isa, supports_##isa},
constexpr Entry kCompiled[] = {BEIT_FAST_FOR_EACH_ISA(BEIT_FAST_ENTRY)};
#undef BEIT_FAST_ENTRY

std::string names_of(const std::vector<Isa>& isas) {
    std::string names;
    for (const Isa isa : isas) {
        if (!names.empty()) names += ',';
        names += isa_name(isa);
    }
    return names;
}

// "'portable', 'avx2' or 'avx512'", as join_choices in Python.
std::string choices_of(const std::vector<Isa>& isas) {
    std::string text;
    for (size_t index = 0; index < isas.size(); ++index) {
        if (index > 0) text += index + 1 == isas.size() ? " or " : ", ";
        text += "'" + std::string(isa_name(isas[index])) + "'";
    }
    return text;
}

Isa choose() {
    const char* asked = std::getenv("BEIT_FAST_CPU_ISA");
    if (asked == nullptr || *asked == '\0') return available_isas().back();
    for (const Isa isa : available_isas()) {
        if (std::string(isa_name(isa)) == asked) return isa;
    }
    throw std::invalid_argument("BEIT_FAST_CPU_ISA='" + std::string(asked) +
                                "' is not supported (expected " + choices_of(available_isas()) + ", or unset)");
}

}  // namespace

const char* isa_name(Isa isa) { return kCompiled[static_cast<size_t>(isa)].name; }

const std::vector<Isa>& available_isas() {
    static const std::vector<Isa> isas = [] {
        std::vector<Isa> found;
        for (const Entry& entry : kCompiled) {
            if (entry.supported()) found.push_back(entry.isa);
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

// For `beit-fast info`: the instruction set in use, empty if BEIT_FAST_CPU_ISA names one that is not available.
extern "C" __attribute__((visibility("default"))) const char* beit_fast_cpu_isa() {
    try {
        return beit_fast::isa_name(beit_fast::current_isa());
    } catch (const std::invalid_argument&) {
        return "";
    }
}

// Why BEIT_FAST_CPU_ISA cannot be honored; empty if it can.
extern "C" __attribute__((visibility("default"))) const char* beit_fast_cpu_isa_error() {
    static const std::string error = [] {
        try {
            beit_fast::current_isa();
            return std::string();
        } catch (const std::invalid_argument& invalid) {
            return std::string(invalid.what());
        }
    }();
    return error.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* beit_fast_cpu_isas() {
    static const std::string names = beit_fast::names_of(beit_fast::available_isas());
    return names.c_str();
}
