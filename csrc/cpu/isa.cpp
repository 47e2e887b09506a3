#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mbv2::cpu {
namespace {

struct Isa {
    const char* name;
    const Kernels* (*kernels)();
    bool (*supported)();
};

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx2() { return false; }
#endif

constexpr Isa kIsas[] = {{"avx512", avx512_kernels, has_avx512},
                         {"avx2", avx2_kernels, has_avx2},
                         {"portable", portable_kernels, [] { return true; }}};

std::string usable() {
    std::string names;
    for (const Isa& isa : kIsas) {
        if (isa.kernels() != nullptr && isa.supported()) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    }
    return names;
}

}  // namespace

const Kernels& kernels(const char* name) {
    bool known = false;
    for (const Isa& isa : kIsas) {
        if (*name != '\0' && std::strcmp(name, isa.name) != 0) continue;
        known = true;
        if (isa.kernels() != nullptr && isa.supported()) return *isa.kernels();
    }
    throw std::runtime_error(
        "MBV2_CPU_ISA=" + std::string(name) +
        (known ? ": this machine or build has no such instructions" : ": no such instruction set") + "; here are " +
        usable());
}

const Kernels& kernels() {
    const char* name = std::getenv("MBV2_CPU_ISA");
    return kernels(name == nullptr ? "" : name);
}

}  // namespace mbv2::cpu
