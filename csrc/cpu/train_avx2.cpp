// Training on AVX2 and FMA: 8 lanes, 16 registers.
#include "train.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "products_avx2.h"
#include "train_table.h"

namespace mbv2::cpu::train {
namespace {

struct Avx2 {
    using Type = __m256;
    static constexpr int lanes = 8;
    static constexpr int rows[3] = {12, 6, 4};

    static Type zero() { return _mm256_setzero_ps(); }
    static Type set(float x) { return _mm256_set1_ps(x); }
    static Type broadcast(const float* p) { return _mm256_broadcast_ss(p); }
    static Type fma(Type a, Type b, Type c) { return _mm256_fmadd_ps(a, b, c); }
    static Type add(Type a, Type b) { return _mm256_add_ps(a, b); }
    static Type sub(Type a, Type b) { return _mm256_sub_ps(a, b); }
    static Type mul(Type a, Type b) { return _mm256_mul_ps(a, b); }
    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        avx2::add_products(sums, x, weights);
    }
    // The instruction returns its second operand if either is NaN.
    static Type relu6(Type x) { return _mm256_min_ps(_mm256_set1_ps(6.0f), _mm256_max_ps(zero(), x)); }
    static Type inside(Type x, Type z) {
        const Type above = _mm256_cmp_ps(z, zero(), _CMP_NLE_UQ), below = _mm256_cmp_ps(z, set(6.0f), _CMP_NGE_UQ);
        return _mm256_and_ps(x, _mm256_and_ps(above, below));
    }

    static Type load(const float* p) { return _mm256_loadu_ps(p); }
    static void store(float* p, Type x) { _mm256_storeu_ps(p, x); }
    static void stream(float* p, Type x) { _mm256_stream_ps(p, x); }
    static void stream(bf16* p, Type x) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), narrowed(x)); }
    static void fence() { _mm_sfence(); }
    static __m256i mask(int64_t n) {
        return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    }
    static Type load_part(const float* p, int64_t n) { return _mm256_maskload_ps(p, mask(n)); }
    static void store_part(float* p, Type x, int64_t n) { _mm256_maskstore_ps(p, mask(n), x); }

    static Type widened(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
    // To the nearest bfloat16, ties to even, in the upper halves; a NaN stays one.
    static __m256i rounded(Type x) {
        const __m256i bits = _mm256_castps_si256(x);
        const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        const __m256i up = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
        const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
        return _mm256_blendv_epi8(_mm256_and_si256(up, _mm256_set1_epi32(static_cast<int>(0xffff0000))),
                                  _mm256_set1_epi32(0x7fc00000), nan);
    }
    static __m128i narrowed(Type x) {
        const __m256i half = _mm256_srli_epi32(rounded(x), 16);
        return _mm_packus_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    }
    static Type load(const bf16* p) { return widened(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
    static void store(bf16* p, Type x) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrowed(x)); }
    static Type load_part(const bf16* p, int64_t n) {
        bf16 all[lanes] = {};
        for (int64_t i = 0; i < n; ++i) all[i] = p[i];
        return load(all);
    }
    static void store_part(bf16* p, Type x, int64_t n) {
        bf16 all[lanes];
        store(all, x);
        for (int64_t i = 0; i < n; ++i) p[i] = all[i];
    }
    template <class T>
    static Type round(Type x) {
        if constexpr (sizeof(T) == sizeof(float)) return x;
        return _mm256_castsi256_ps(rounded(x));
    }
};

constexpr Kernels kKernels = kernels_of<Avx2>("avx2");

}  // namespace

const Kernels* avx2_kernels() { return &kKernels; }

}  // namespace mbv2::cpu::train
#else
const mbv2::cpu::train::Kernels* mbv2::cpu::train::avx2_kernels() { return nullptr; }
#endif
