// AVX2 and FMA: 8 lanes, 16 registers.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "microkernels.h"

namespace mbv2::cpu {
namespace {

struct Avx2 {
    using Type = __m256;
    static constexpr int lanes = 8;
    static constexpr int rows[3] = {12, 6, 4};

    static Type zero() { return _mm256_setzero_ps(); }
    static Type load(const float* p) { return _mm256_load_ps(p); }
    static void store(float* p, Type x) { _mm256_store_ps(p, x); }
    static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    // As an instruction that names its sum: with 15 of 16 registers in use, GCC otherwise moves sums about and spills.
    static Type fma(Type a, Type b, Type c) {
        asm("vfmadd231ps %2, %1, %0" : "+x"(c) : "x"(a), "x"(b));
        return c;
    }
    static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
    static Type scale(Type a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
    // The instruction returns its second operand if either is NaN.
    static Type relu6(Type x) { return _mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(zero(), x)); }
};

constexpr Kernels kKernels = kernels_of<Avx2>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels* mbv2::cpu::avx2_kernels() { return nullptr; }
#endif
