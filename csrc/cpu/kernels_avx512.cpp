// AVX-512F: 16 lanes, 32 registers. With MBV2_SIMDE the intrinsics come from SIMDe, so that tests can run these kernels
// on machines without the instructions.
#include "kernels.h"

#if defined(__AVX512F__) || defined(MBV2_SIMDE)
#ifdef MBV2_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "microkernels.h"

namespace mbv2::cpu {
namespace {

struct Avx512 {
    using Type = __m512;
    static constexpr int lanes = 16;
    static constexpr int panel = 2;
    static constexpr int rows[3] = {14, 14, 9};
    static constexpr int unroll = 4;
    static constexpr int lines_ahead = 0;

    static Type zero() { return _mm512_setzero_ps(); }
    static Type load(const float* p) { return _mm512_load_ps(p); }
    static Type load_weights(const float* p) { return load(p); }
    static void store(float* p, Type x) { _mm512_store_ps(p, x); }
    static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
    static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
    static Type scale(Type a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
    // The instruction returns its second operand if either is NaN.
    static Type relu6(Type x) { return _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(zero(), x)); }

    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        const Type value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
};

constexpr Kernels<Float32> kKernels = kernels_of<Avx512, Float32>("avx512");

}  // namespace

const Kernels<Float32>* avx512_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Float32>* mbv2::cpu::avx512_kernels() { return nullptr; }
#endif
