// The vectors of AVX-512F: 16 lanes, 32 registers; with AVX512_BF16 also of bfloat16. With MBV2_SIMDE the intrinsics
// come from SIMDe, so that tests can run the kernels on machines without the instructions.
#pragma once

#ifdef MBV2_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "formats.h"

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

#if defined(__AVX512BF16__) || defined(MBV2_SIMDE)
    using Pairs = __m512bh;

#ifdef MBV2_SIMDE
    // It has no such conversions. Calls, as so many loops in every tile would take minutes to compile.
    static __attribute__((noinline)) Type load(const Bf16* p) {
        alignas(64) float values[lanes];
        for (int i = 0; i < lanes; ++i) values[i] = __builtin_bit_cast(float, static_cast<uint32_t>(p[i]) << 16);
        return load(values);
    }
    static __attribute__((noinline)) void store(Bf16* p, Type x) {
        alignas(64) float values[lanes];
        store(values, x);
        for (int i = 0; i < lanes; ++i) p[i] = rounded(values[i]);
    }
    static __attribute__((noinline)) Type fma(Pairs a, Pairs b, Type c) { return _mm512_dpbf16_ps(c, a, b); }
#else
    static Type load(const Bf16* p) {
        const __m256i halves = _mm256_load_si256(reinterpret_cast<const __m256i*>(p));
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    static void store(Bf16* p, Type x) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
    }
    static Type fma(Pairs a, Pairs b, Type c) { return _mm512_dpbf16_ps(c, a, b); }
#endif
    static Pairs load_weights(const Bf16* p) { return (Pairs)_mm512_load_si512(p); }
    static Pairs broadcast(const Bf16* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return (Pairs)_mm512_set1_epi32(pair);
    }
#endif

    template <int N, class Input, class Weights>
    static void add_products(Type (&sums)[N], const Input* x, const Weights (&weights)[N]) {
        const Weights value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
};

}  // namespace
}  // namespace mbv2::cpu
