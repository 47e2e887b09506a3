// The int8 format on any machine: loops over 16 channels that compilers vectorise.
//
// Loops over tiles stay loops, and the operations inside them calls: in line and unrolled they compile for minutes.
#define MBV2_UNROLL
#include "microkernels_int8.h"

namespace mbv2::cpu {
namespace {

#define MBV2_CALL __attribute__((noinline))

struct Halves {
    int16_t at[16];
};
struct Whole {
    int32_t at[16];
};
struct Floats {
    float at[16];
};

inline int32_t bounded(int32_t x, int32_t least, int32_t most) { return x < least ? least : x > most ? most : x; }
inline int16_t saturated(int32_t x) { return static_cast<int16_t>(bounded(x, -32768, 32767)); }

// Half to even, in 16 bits. Adding and taking away 1.5 * 2^23 rounds what is within them.
inline int16_t rounded(float x) {
    x = x < -32768.0f ? -32768.0f : x > 32767.0f ? 32767.0f : x;
    return static_cast<int16_t>((x + 12582912.0f) - 12582912.0f);
}

struct HalvesPortable {
    using Half = Halves;
    using Type = Half;
    static constexpr int lanes = 16;

    static Half load(const int16_t* p) { return *reinterpret_cast<const Half*>(p); }
    static Half load(const float* p) { return halves(p); }
    static void store(int16_t* p, const Half& x) { *reinterpret_cast<Half*>(p) = x; }
    static MBV2_CALL Half positive(Half x) {
        for (int16_t& value : x.at) value = value > 0 ? value : 0;
        return x;
    }
    static MBV2_CALL Half add(Half a, const Half& b) {
        for (int i = 0; i < lanes; ++i) a.at[i] = saturated(a.at[i] + b.at[i]);
        return a;
    }
    static MBV2_CALL Half multiply_high(Half a, const Half& b) {
        // No factor is -32768, whose square alone would leave 16 bits.
        for (int i = 0; i < lanes; ++i) a.at[i] = static_cast<int16_t>((a.at[i] * b.at[i] + 16384) >> 15);
        return a;
    }
    static MBV2_CALL Half fma(const Half& a, const Half& b, Half c) {
        for (int i = 0; i < lanes; ++i) c.at[i] = saturated(c.at[i] + ((a.at[i] * b.at[i] + 16384) >> 15));
        return c;
    }
    static MBV2_CALL Half shift6(Half x) {
        for (int16_t& value : x.at) value = static_cast<int16_t>(value >> 6);
        return x;
    }
    static MBV2_CALL Half halves(const float* p) {
        Half x;
        for (int i = 0; i < lanes; ++i) x.at[i] = rounded(p[i]);
        return x;
    }
    static MBV2_CALL Half load_scaled(const uint8_t* p) {
        Half x;
        for (int i = 0; i < lanes; ++i) x.at[i] = static_cast<int16_t>(p[i] << 7);
        return x;
    }
    static Half load_scaled(const int16_t* p) { return load(p); }
    static MBV2_CALL void store_bytes(uint8_t* p, const Half& x) {
        for (int i = 0; i < lanes; ++i) p[i] = static_cast<uint8_t>(bounded(x.at[i], 0, 255));
    }
    template <int Count>
    static void store_depthwise(uint8_t* p, const Half (&sums)[Count], const float* outputs) {
        const Half multiplier = halves(outputs + lanes);
        for (int i = 0; i < Count; ++i) store_bytes(p + i * lanes, multiply_high(sums[i], multiplier));
    }
};

struct Int8Portable : HalvesPortable {
    using Sum = Whole;
    static constexpr int panel = 1;
    static constexpr int rows[1] = {1};
    static constexpr int quads = 1;
    static constexpr int lines_ahead = 0;

    static Sum nothing() { return Sum{}; }
    static MBV2_CALL Sum whole(const float* p) {
        Sum sum;
        for (int i = 0; i < lanes; ++i) sum.at[i] = static_cast<int32_t>(p[i]);
        return sum;
    }
    static MBV2_CALL Half narrow(const Sum& sum, const float* multipliers) {
        Half x;
        for (int i = 0; i < lanes; ++i) x.at[i] = rounded(static_cast<float>(sum.at[i]) * multipliers[i]);
        return x;
    }
    static MBV2_CALL void store_floats(float* p, const Sum& sum, const float* multipliers) {
        for (int i = 0; i < lanes; ++i) p[i] = static_cast<float>(sum.at[i]) * multipliers[i];
    }
    static MBV2_CALL Sum add_halves(Sum sum, const Half& x) {
        for (int i = 0; i < lanes; ++i) sum.at[i] += x.at[i];
        return sum;
    }
    static MBV2_CALL void add_floats(float* p, const Sum& sum) {
        for (int i = 0; i < lanes; ++i) p[i] += static_cast<float>(sum.at[i]);
    }

    template <int Quads>
    static MBV2_CALL void multiply(Sum (&sums)[1][1], const uint8_t* a, const int8_t* b) {
        static_assert(Quads == 1);
        for (int o = 0; o < lanes; ++o) {
            int32_t sum = 0;
            for (int k = 0; k < 4; ++k) sum += a[k] * b[4 * o + k];
            sums[0][0].at[o] += sum;
        }
    }
};

// Sums of the stem, 16 channels of a pixel in floats.
struct StemPortable {
    using Type = Floats;
    static constexpr int lanes = 16;
    static constexpr int panel = 1;
    static constexpr int rows[1] = {3};

    static Type load_weights(const float* p) { return *reinterpret_cast<const Type*>(p); }
    static Type load(const float* p) { return load_weights(p); }
    // What is below 0 or above 32767 is cut off by `store`.
    static const Type& relu6(const Type& x) { return x; }
    static MBV2_CALL void store(int16_t* p, const Type& x) {
        HalvesPortable::store(p, HalvesPortable::positive(HalvesPortable::halves(x.at)));
    }
    static MBV2_CALL void add_products(Type (&sums)[1], const float* x, const Type (&weights)[1]) {
        for (int i = 0; i < lanes; ++i) sums[0].at[i] += *x * weights[0].at[i];
    }
};

constexpr Kernels<Int8> kKernels = int8::kernels_of<Int8Portable, StemPortable, HalvesPortable>("portable");

}  // namespace

const Kernels<Int8>* int8_portable_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
