// Training on AVX-512F: 16 lanes, 32 registers.
#include "train.h"

#ifdef __AVX512F__
#include <immintrin.h>

#include "train_table.h"

namespace mbv2::cpu::train {
namespace {

struct Avx512 {
    using Type = __m512;
    static constexpr int lanes = 16;
    static constexpr int rows[3] = {14, 14, 9};

    static Type zero() { return _mm512_setzero_ps(); }
    static Type set(float x) { return _mm512_set1_ps(x); }
    static Type broadcast(const float* p) { return _mm512_set1_ps(*p); }
    static Type fma(Type a, Type b, Type c) { return _mm512_fmadd_ps(a, b, c); }
    static Type add(Type a, Type b) { return _mm512_add_ps(a, b); }
    static Type sub(Type a, Type b) { return _mm512_sub_ps(a, b); }
    static Type mul(Type a, Type b) { return _mm512_mul_ps(a, b); }
    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        const Type value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
    // The instruction returns its second operand if either is NaN.
    static Type relu6(Type x) { return _mm512_min_ps(_mm512_set1_ps(6.0f), _mm512_max_ps(zero(), x)); }
    static Type inside(Type x, Type z) {
        const __mmask16 above = _mm512_cmp_ps_mask(z, zero(), _CMP_NLE_UQ);
        return _mm512_maskz_mov_ps(_mm512_mask_cmp_ps_mask(above, z, set(6.0f), _CMP_NGE_UQ), x);
    }

    static Type load(const float* p) { return _mm512_loadu_ps(p); }
    static void store(float* p, Type x) { _mm512_storeu_ps(p, x); }
    static void stream(float* p, Type x) { _mm512_stream_ps(p, x); }
    static void stream(bf16* p, Type x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrowed(x)); }
    static void fence() { _mm_sfence(); }
    static __mmask16 mask(int64_t n) { return static_cast<__mmask16>((1u << n) - 1u); }
    static Type load_part(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(mask(n), p); }
    static void store_part(float* p, Type x, int64_t n) { _mm512_mask_storeu_ps(p, mask(n), x); }

    static Type widened(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
    // To the nearest bfloat16, ties to even, in the upper halves; a NaN stays one.
    static __m512i rounded(Type x) {
        const __m512i bits = _mm512_castps_si512(x);
        const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
        const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
        const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
        return _mm512_mask_mov_epi32(_mm512_and_si512(up, _mm512_set1_epi32(static_cast<int>(0xffff0000))), nan,
                                     _mm512_set1_epi32(0x7fc00000));
    }
    static __m256i narrowed(Type x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded(x), 16)); }
    static Type load(const bf16* p) { return widened(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
    static void store(bf16* p, Type x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrowed(x)); }
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
        return _mm512_castsi512_ps(rounded(x));
    }
};

constexpr Kernels kKernels = kernels_of<Avx512>("avx512");

}  // namespace

const Kernels* avx512_kernels() { return &kKernels; }

}  // namespace mbv2::cpu::train
#else
const mbv2::cpu::train::Kernels* mbv2::cpu::train::avx512_kernels() { return nullptr; }
#endif
