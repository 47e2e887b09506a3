// The number formats that the network runs in. Everything that cuts the work (network_*.h) is written once over them.
//
// A format names what memory holds: Activation, what blocks hand on and 1x1 convolutions read; Hidden, what the stem
// and the expansions write for the depthwise convolutions, and the head for the mean; Weight, of 1x1 convolutions, with
// those of `group` inputs side by side; Tap, of depthwise convolutions. The stem's weights, the picture and the logits
// are float in every format. Each output channel has `output_vectors` numbers: the bias, and what else turns its sum
// into an output.
#pragma once

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

}  // namespace mbv2::cpu
