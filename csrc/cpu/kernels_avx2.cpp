// AVX2 and FMA: 8 lanes, 16 registers.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "microkernels.h"
#include "products_avx2.h"

namespace mbv2::cpu {
namespace {

struct Avx2 {
    using Type = __m256;
    static constexpr int lanes = 8;
    static constexpr int panel = 3;
    // Four rows though more would fit: measured on Zen 3, 6 x 2 loses 30 cycles a tile that 4 x 2 and 4 x 3 do not.
    static constexpr int rows[3] = {8, 4, 4};
    static constexpr int unroll = 8;
    static constexpr int lines_ahead = 1;

    static Type zero() { return _mm256_setzero_ps(); }
    static Type load(const float* p) { return _mm256_load_ps(p); }
    static Type load_weights(const float* p) { return load(p); }
    static void store(float* p, Type x) { _mm256_store_ps(p, x); }
    static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
    static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
    static Type scale(Type a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
    // The instruction returns its second operand if either is NaN.
    static Type relu6(Type x) { return _mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(zero(), x)); }

    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        avx2::add_products(sums, x, weights);
    }
};

constexpr Kernels<Float32> kKernels = kernels_of<Avx2, Float32>("avx2");

}  // namespace

const Kernels<Float32>* avx2_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Float32>* mbv2::cpu::avx2_kernels() { return nullptr; }
#endif
