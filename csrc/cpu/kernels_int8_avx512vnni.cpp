// The int8 format on AVX-512 with VNNI: 16 sums of 4 products in one instruction (vpdpbusd); what is 16 bits wide is as
// on AVX2. With MBV2_SIMDE the intrinsics come from SIMDe, as in kernels_avx512.cpp.
#include "kernels.h"

#if (defined(__AVX512F__) && defined(__AVX512VNNI__)) || defined(MBV2_SIMDE)
#ifdef MBV2_SIMDE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#else
#include <immintrin.h>
#endif

#include "microkernels_int8.h"
#include "vectors_int8_avx2.h"

namespace mbv2::cpu {
namespace {

struct Int8Vnni : HalvesAvx2 {
    using Sum = __m512i;
    static constexpr int panel = 2;
    static constexpr int rows[3] = {14, 12, 8};
    static constexpr int quads = 1;
    static constexpr int lines_ahead = 0;

    static Sum nothing() { return _mm512_setzero_si512(); }
    static Sum whole(const float* p) { return _mm512_cvtps_epi32(_mm512_load_ps(p)); }
    static __m512 scaled(Sum sum, const float* multipliers) {
        return _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(multipliers));
    }
    static Half narrow(Sum sum, const float* multipliers) {
        return _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(scaled(sum, multipliers)));
    }
    static void store_floats(float* p, Sum sum, const float* multipliers) {
        _mm512_store_ps(p, scaled(sum, multipliers));
    }
    static Sum add_halves(Sum sum, Half x) { return _mm512_add_epi32(sum, _mm512_cvtepi16_epi32(x)); }
    static void add_floats(float* p, Sum sum) {
        _mm512_storeu_ps(p, _mm512_add_ps(_mm512_loadu_ps(p), _mm512_cvtepi32_ps(sum)));
    }

    template <int Quads, int Rows, int Vectors>
    static inline __attribute__((always_inline)) void multiply(Sum (&sums)[Rows][Vectors], const uint8_t* a,
                                                               const int8_t* b) {
        static_assert(Quads == 1);
        Sum weights[Vectors];
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) weights[v] = _mm512_load_si512(b + v * 64);
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
            int32_t inputs;
            __builtin_memcpy(&inputs, a + m * lanes, 4);
            const Sum value = _mm512_set1_epi32(inputs);
            MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
                sums[m][v] = _mm512_dpbusd_epi32(sums[m][v], value, weights[v]);
            }
        }
    }
};

// Sums of the stem, 16 channels of a pixel in floats.
struct StemAvx512 {
    using Type = __m512;
    static constexpr int lanes = 16;
    static constexpr int panel = 2;
    static constexpr int rows[3] = {14, 12, 8};

    static Type load_weights(const float* p) { return _mm512_load_ps(p); }
    static Type load(const float* p) { return _mm512_load_ps(p); }
    // What is below 0 or above 32767 is cut off by `store`.
    static Type relu6(Type x) { return x; }
    static void store(int16_t* p, Type x) {
        HalvesAvx2::store(p, HalvesAvx2::positive(_mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x))));
    }
    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        const Type value = _mm512_set1_ps(*x);
        for (int v = 0; v < N; ++v) sums[v] = _mm512_fmadd_ps(value, weights[v], sums[v]);
    }
};

constexpr Kernels<Int8> kKernels = int8::kernels_of<Int8Vnni, StemAvx512, HalvesAvx2>("avx512");

}  // namespace

const Kernels<Int8>* int8_avx512_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Int8>* mbv2::cpu::int8_avx512_kernels() { return nullptr; }
#endif
