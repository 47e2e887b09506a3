// The number formats that the network runs in. Everything that cuts the work (network_*.h) is written once over them.
//
// A format names what memory holds: Activation, what blocks hand on and 1x1 convolutions read; Hidden, what the stem
// and the expansions write for the depthwise convolutions, and the head for the mean; Weight, of 1x1 convolutions, with
// those of `group` inputs side by side; Tap, of depthwise convolutions. The stem's weights, the picture and the logits
// are float in every format. Each output channel has `output_vectors` numbers: the bias, and what else turns its sum
// into an output.
#pragma once

#include <cstdint>

namespace mbv2::cpu {

struct Float32 {
    using Activation = float;
    using Hidden = float;
    using Weight = float;
    using Tap = float;
    static constexpr const char* name = "float32";
    static constexpr int group = 1;
    static constexpr int output_vectors = 1;

    static Weight weight(float value) { return value; }
    static Tap tap(float value) { return value; }
};

// 8-bit activations and weights of 1x1 convolutions, 16-bit fixed point between them: see microkernels_int8.h. The
// numbers arrive as floats that mbv2/quantize.py has rounded.
struct Int8 {
    using Activation = uint8_t;
    using Hidden = int16_t;
    using Weight = int8_t;
    using Tap = int16_t;
    static constexpr const char* name = "int8";
    static constexpr int group = 4;
    static constexpr int output_vectors = 4;

    static Weight weight(float value) { return static_cast<Weight>(value); }
    static Tap tap(float value) { return static_cast<Tap>(value); }
};

enum class Bf16 : uint16_t {};

// The nearest bfloat16, ties to even; NaN stays NaN. Inlined so that no translation unit is linked to another's.
inline __attribute__((always_inline)) Bf16 rounded(float value) {
    const auto bits = __builtin_bit_cast(uint32_t, value);
    if (value != value) return static_cast<Bf16>(bits >> 16 | 0x40);
    return static_cast<Bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// Products of bfloat16 are exact in float32, and sums are float32. A pair of inputs is added to a sum one after the
// other, the second first, as the instruction (vdpbf16ps) does it. Hidden channels stay float32 up to the depthwise
// convolution, which costs nothing beside it and spares a rounding.
struct Bfloat16 {
    using Activation = Bf16;
    using Hidden = float;
    using Weight = Bf16;
    using Tap = float;
    static constexpr const char* name = "bfloat16";
    static constexpr int group = 2;
    static constexpr int output_vectors = 1;

    static Weight weight(float value) { return rounded(value); }
    static Tap tap(float value) { return value; }
};

}  // namespace mbv2::cpu
