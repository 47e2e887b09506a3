#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

namespace mbv2::cpu {
namespace {

template <class F>
struct Isa {
    const char* name;
    const Kernels<F>* (*kernels)();
    bool (*supported)();
};

#if defined(__x86_64__) || defined(__i386__)
bool has_avx512() { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq"); }
bool has_avx512_vnni() {
    return has_avx512() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512vnni");
}
bool has_avx512bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#else
bool has_avx512() { return false; }
bool has_avx512_vnni() { return false; }
bool has_avx512bf16() { return false; }
bool has_avx2() { return false; }
#endif
bool always() { return true; }

// The instruction sets of a format, best first; those beyond `by_default` must be asked for by name.
template <class F>
struct Isas;

template <>
struct Isas<Float32> {
    static constexpr Isa<Float32> entries[] = {{"avx512", avx512_kernels, has_avx512},
                                               {"avx2", avx2_kernels, has_avx2},
                                               {"portable", portable_kernels, always}};
    static constexpr size_t by_default = 3;
    static constexpr const char* needs = "any";
};

template <>
struct Isas<Int8> {
    static constexpr Isa<Int8> entries[] = {{"avx512", int8_avx512_kernels, has_avx512_vnni},
                                            {"avx2", int8_avx2_kernels, has_avx2},
                                            {"portable", int8_portable_kernels, always}};
    static constexpr size_t by_default = 3;
    static constexpr const char* needs = "AVX512_VNNI";
};

template <>
struct Isas<Bfloat16> {
    static constexpr Isa<Bfloat16> entries[] = {{"avx512", bf16_avx512_kernels, has_avx512bf16},
                                                {"portable", bf16_portable_kernels, always}};
    static constexpr size_t by_default = 1;
    static constexpr const char* needs = "AVX512_BF16";
};

constexpr const char* kNames[] = {"avx512", "avx2", "portable"};

template <class F>
bool usable(const Isa<F>& isa) {
    return isa.kernels() != nullptr && isa.supported();
}

template <class F>
std::string usable_names() {
    std::string names;
    for (const Isa<F>& isa : Isas<F>::entries) {
        if (usable(isa)) names += (names.empty() ? "" : ", ") + std::string(isa.name);
    }
    return names;
}

template <class F>
std::string refusal(const char* name) {
    const std::string format = F::name;
    if (*name == '\0') {
        return "this machine or build has no instructions for " + format + " networks (" + Isas<F>::needs +
               "): float32 is the fast format here; MBV2_CPU_ISA=portable runs " + format + " all the same, slowly";
    }
    bool known = false;
    for (const char* other : kNames) known = known || std::strcmp(name, other) == 0;
    return "MBV2_CPU_ISA=" + std::string(name) +
           (known ? ": this machine or build has no such instructions for " + format : ": no such instruction set") +
           "; here are " + usable_names<F>();
}

}  // namespace

template <class F>
const Kernels<F>& kernels(const char* name) {
    size_t rank = 0;
    for (const Isa<F>& isa : Isas<F>::entries) {
        const bool wanted = *name == '\0' ? rank < Isas<F>::by_default : std::strcmp(name, isa.name) == 0;
        if (wanted && usable(isa)) return *isa.kernels();
        ++rank;
    }
    throw std::runtime_error(refusal<F>(name));
}

template <class F>
const Kernels<F>& kernels() {
    const char* name = std::getenv("MBV2_CPU_ISA");
    return kernels<F>(name == nullptr ? "" : name);
}

template const Kernels<Float32>& kernels(const char*);
template const Kernels<Float32>& kernels();
template const Kernels<Int8>& kernels(const char*);
template const Kernels<Int8>& kernels();
template const Kernels<Bfloat16>& kernels(const char*);
template const Kernels<Bfloat16>& kernels();

}  // namespace mbv2::cpu
