// The int8 format on AVX2: 8-bit products in pairs (vpmaddubsw), two pairs added in 16 bits, then in 32.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "microkernels_int8.h"
#include "vectors_int8_avx2.h"

namespace mbv2::cpu {
namespace {

struct Int8Avx2 : HalvesAvx2 {
    struct Sum {
        __m256i low, high;
    };
    static constexpr int panel = 1;
    static constexpr int rows[1] = {3};
    static constexpr int quads = 2;
    static constexpr int lines_ahead = 1;

    static __m256i load(const int8_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    using HalvesAvx2::load;

    static Sum nothing() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
    static Sum whole(const float* p) {
        return {_mm256_cvtps_epi32(_mm256_load_ps(p)), _mm256_cvtps_epi32(_mm256_load_ps(p + 8))};
    }
    static __m256 scaled(__m256i sum, const float* multipliers) {
        return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_load_ps(multipliers));
    }
    static Half narrow(const Sum& sum, const float* multipliers) {
        return join(_mm256_cvtps_epi32(scaled(sum.low, multipliers)),
                    _mm256_cvtps_epi32(scaled(sum.high, multipliers + 8)));
    }
    static void store_floats(float* p, const Sum& sum, const float* multipliers) {
        _mm256_store_ps(p, scaled(sum.low, multipliers));
        _mm256_store_ps(p + 8, scaled(sum.high, multipliers + 8));
    }
    static Sum add_halves(const Sum& sum, Half x) {
        const __m256i low = _mm256_cvtepi16_epi32(_mm256_castsi256_si128(x));
        const __m256i high = _mm256_cvtepi16_epi32(_mm256_extracti128_si256(x, 1));
        return {_mm256_add_epi32(sum.low, low), _mm256_add_epi32(sum.high, high)};
    }
    static void add_floats(float* p, const Sum& sum) {
        _mm256_storeu_ps(p, _mm256_add_ps(_mm256_loadu_ps(p), _mm256_cvtepi32_ps(sum.low)));
        _mm256_storeu_ps(p + 8, _mm256_add_ps(_mm256_loadu_ps(p + 8), _mm256_cvtepi32_ps(sum.high)));
    }

    // Instructions that name their registers and keep their order, as in kernels_avx2.cpp.
    template <int Quads, int Rows>
    static inline __attribute__((always_inline)) void multiply(Sum (&sums)[Rows][1], const uint8_t* a,
                                                               const int8_t* b) {
        __m256i ones = _mm256_set1_epi16(1);
        asm("" : "+x"(ones));
        const __m256i w0 = load(b), w1 = load(b + 32);
        if constexpr (Quads == 2) {
            const __m256i w2 = load(b + 64), w3 = load(b + 96);
            MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
                const auto* x = reinterpret_cast<const int32_t*>(a + m * lanes);
                __m256i p, q, r, s;
                asm volatile(
                    "vpbroadcastd %[x], %[q]\n\t"
                    "vpmaddubsw %[w0], %[q], %[p]\n\t"
                    "vpmaddubsw %[w1], %[q], %[q]\n\t"
                    "vpbroadcastd %[y], %[s]\n\t"
                    "vpmaddubsw %[w2], %[s], %[r]\n\t"
                    "vpaddw %[r], %[p], %[p]\n\t"
                    "vpmaddubsw %[w3], %[s], %[s]\n\t"
                    "vpaddw %[s], %[q], %[q]\n\t"
                    "vpmaddwd %[ones], %[p], %[p]\n\t"
                    "vpmaddwd %[ones], %[q], %[q]\n\t"
                    "vpaddd %[p], %[low], %[low]\n\t"
                    "vpaddd %[q], %[high], %[high]"
                    : [low] "+x"(sums[m][0].low), [high] "+x"(sums[m][0].high), [p] "=&x"(p), [q] "=&x"(q),
                      [r] "=&x"(r), [s] "=&x"(s)
                    : [x] "m"(x[0]), [y] "m"(x[1]), [w0] "x"(w0), [w1] "x"(w1), [w2] "x"(w2), [w3] "x"(w3),
                      [ones] "x"(ones));
            }
        } else {
            MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
                const __m256i x = _mm256_set1_epi32(*reinterpret_cast<const int32_t*>(a + m * lanes));
                const auto products = [&](__m256i w) { return _mm256_madd_epi16(_mm256_maddubs_epi16(x, w), ones); };
                sums[m][0].low = _mm256_add_epi32(sums[m][0].low, products(w0));
                sums[m][0].high = _mm256_add_epi32(sums[m][0].high, products(w1));
            }
        }
    }
};

// Sums of the stem, 16 channels of a pixel in floats.
struct StemAvx2 {
    struct Type {
        __m256 low, high;
    };
    static constexpr int lanes = 16;
    static constexpr int panel = 1;
    static constexpr int rows[1] = {4};

    static Type load_weights(const float* p) { return {_mm256_load_ps(p), _mm256_load_ps(p + 8)}; }
    static Type load(const float* p) { return load_weights(p); }
    // What is below 0 or above 32767 is cut off by `store`.
    static Type relu6(const Type& x) { return x; }
    static void store(int16_t* p, const Type& x) {
        const __m256i half = HalvesAvx2::join(_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high));
        HalvesAvx2::store(p, HalvesAvx2::positive(half));
    }
    static void add_products(Type (&sums)[1], const float* x, const Type (&weights)[1]) {
        __m256 value;
        asm volatile(
            "vbroadcastss %[x], %[value]\n\t"
            "vfmadd231ps %[w0], %[value], %[s0]\n\t"
            "vfmadd231ps %[w1], %[value], %[s1]"
            : [s0] "+x"(sums[0].low), [s1] "+x"(sums[0].high), [value] "=&x"(value)
            : [x] "m"(*x), [w0] "x"(weights[0].low), [w1] "x"(weights[0].high));
    }
};

constexpr Kernels<Int8> kKernels = int8::kernels_of<Int8Avx2, StemAvx2, HalvesAvx2>("avx2");

}  // namespace

const Kernels<Int8>* int8_avx2_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Int8>* mbv2::cpu::int8_avx2_kernels() { return nullptr; }
#endif
