// What the int8 format's AVX2 and AVX-512 paths share: 16 channels in 16 bits.
#pragma once

#include "microkernels.h"

namespace mbv2::cpu {
namespace {

struct HalvesAvx2 {
    using Half = __m256i;
    using Type = Half;
    static constexpr int lanes = 16;

    static Half load(const int16_t* p) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(p)); }
    static Half load(const float* p) { return halves(p); }
    static void store(int16_t* p, Half x) { _mm256_store_si256(reinterpret_cast<__m256i*>(p), x); }
    static Half positive(Half x) { return _mm256_max_epi16(x, _mm256_setzero_si256()); }
    static Half add(Half a, Half b) { return _mm256_adds_epi16(a, b); }
    static Half multiply_high(Half a, Half b) { return _mm256_mulhrs_epi16(a, b); }
    static Half shift6(Half x) { return _mm256_srai_epi16(x, 6); }

    static Half fma(Half a, Half b, Half c) { return add(c, multiply_high(a, b)); }

    // Two vectors of 8 32-bit integers, saturated.
    static Half join(__m256i low, __m256i high) {
        return _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
    }
    static Half halves(const float* p) {
        return join(_mm256_cvtps_epi32(_mm256_load_ps(p)), _mm256_cvtps_epi32(_mm256_load_ps(p + 8)));
    }
    // A shortcut, so scaled that `multiply_high` keeps its precision.
    static Half load_scaled(const uint8_t* p) {
        const __m128i bytes = _mm_load_si128(reinterpret_cast<const __m128i*>(p));
        return _mm256_slli_epi16(_mm256_cvtepu8_epi16(bytes), 7);
    }
    static Half load_scaled(const int16_t* p) { return load(p); }

    static void store_bytes(uint8_t* p, Half x) {
        const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
        _mm_store_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    static void store_bytes(uint8_t* p, Half first, Half second) {
        const __m256i bytes = _mm256_permute4x64_epi64(_mm256_packus_epi16(first, second), 0xd8);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bytes);
    }

    // 8 bits of each of Count neighbouring pixels.
    template <int Count>
    static void store_depthwise(uint8_t* p, const Half (&sums)[Count], const float* outputs) {
        const Half multiplier = halves(outputs + lanes);
        MBV2_UNROLL for (int i = 0; i + 1 < Count; i += 2) {
            store_bytes(p + i * lanes, multiply_high(sums[i], multiplier), multiply_high(sums[i + 1], multiplier));
        }
        if (Count % 2) store_bytes(p + (Count - 1) * lanes, multiply_high(sums[Count - 1], multiplier));
    }
};

}  // namespace
}  // namespace mbv2::cpu
