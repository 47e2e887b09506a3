// Multiply-adds of AVX2's tiles, of inference and of training.
#pragma once

#include <immintrin.h>

namespace mbv2::cpu::avx2 {
namespace {

// sums[v] += *x * weights[v]. Instructions that name their registers and keep their order: with 15 of 16 in use, GCC
// otherwise moves sums about, holds broadcasts that it sees twice, and spills.
inline void add_products(__m256 (&sums)[1], const float* x, const __m256 (&weights)[1]) {
    __m256 value;
    asm volatile(
        "vbroadcastss %[x], %[value]\n\t"
        "vfmadd231ps %[w0], %[value], %[s0]"
        : [s0] "+x"(sums[0]), [value] "=&x"(value)
        : [x] "m"(*x), [w0] "x"(weights[0]));
}
inline void add_products(__m256 (&sums)[2], const float* x, const __m256 (&weights)[2]) {
    __m256 value;
    asm volatile(
        "vbroadcastss %[x], %[value]\n\t"
        "vfmadd231ps %[w0], %[value], %[s0]\n\t"
        "vfmadd231ps %[w1], %[value], %[s1]"
        : [s0] "+x"(sums[0]), [s1] "+x"(sums[1]), [value] "=&x"(value)
        : [x] "m"(*x), [w0] "x"(weights[0]), [w1] "x"(weights[1]));
}
inline void add_products(__m256 (&sums)[3], const float* x, const __m256 (&weights)[3]) {
    __m256 value;
    asm volatile(
        "vbroadcastss %[x], %[value]\n\t"
        "vfmadd231ps %[w0], %[value], %[s0]\n\t"
        "vfmadd231ps %[w1], %[value], %[s1]\n\t"
        "vfmadd231ps %[w2], %[value], %[s2]"
        : [s0] "+x"(sums[0]), [s1] "+x"(sums[1]), [s2] "+x"(sums[2]), [value] "=&x"(value)
        : [x] "m"(*x), [w0] "x"(weights[0]), [w1] "x"(weights[1]), [w2] "x"(weights[2]));
}

}  // namespace
}  // namespace mbv2::cpu::avx2
