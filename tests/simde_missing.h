// Intrinsics of the int8 kernels that SIMDe 0.7 lacks, and as calls those whose emulation in line compiles for minutes;
// included before the kernels by test_cpu_int8.py.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>

static __attribute__((noinline)) __m512i test_whole_numbers(__m512 x) {
    alignas(64) float floats[16];
    alignas(64) int32_t whole[16];
    _mm512_store_ps(floats, x);
    for (int i = 0; i < 16; ++i) whole[i] = static_cast<int32_t>(__builtin_nearbyintf(floats[i]));
    return _mm512_load_si512(whole);
}

static __attribute__((noinline)) __m512 test_floats(__m512i x) {
    alignas(64) float floats[16];
    alignas(64) int32_t whole[16];
    _mm512_store_si512(whole, x);
    for (int i = 0; i < 16; ++i) floats[i] = static_cast<float>(whole[i]);
    return _mm512_load_ps(floats);
}

static __attribute__((noinline)) __m512i test_widened(__m256i x) {
    alignas(32) int16_t narrow[16];
    alignas(64) int32_t whole[16];
    _mm256_store_si256(reinterpret_cast<__m256i*>(narrow), x);
    for (int i = 0; i < 16; ++i) whole[i] = narrow[i];
    return _mm512_load_si512(whole);
}

static __attribute__((noinline)) __m512i test_products(__m512i sum, __m512i a, __m512i b) {
    return simde_mm512_dpbusd_epi32(sum, a, b);
}

static __attribute__((noinline)) __m512 test_multiply_add(__m512 a, __m512 b, __m512 c) {
    return simde_mm512_fmadd_ps(a, b, c);
}

#undef _mm512_dpbusd_epi32
#undef _mm512_fmadd_ps
#define _mm512_dpbusd_epi32(sum, a, b) test_products(sum, a, b)
#define _mm512_fmadd_ps(a, b, c) test_multiply_add(a, b, c)
#undef _mm512_cvtps_epi32
#undef _mm512_cvtepi32_ps
#undef _mm512_cvtepi16_epi32
#define _mm512_cvtps_epi32(x) test_whole_numbers(x)
#define _mm512_cvtepi32_ps(x) test_floats(x)
#define _mm512_cvtepi16_epi32(x) test_widened(x)
