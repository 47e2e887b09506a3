// What one instruction set offers the network in one number format: a table of kernels, filled by kernels_*.cpp.
//
// Activations are planes of `lanes` channels: [ceil(C / lanes)][pixels][lanes]. The lanes beyond C hold values that
// nobody reads as channels, so no kernel needs a mask. Weights of 1x1 convolutions are panels of 1 to 3 vectors (of
// `lanes` channels) of outputs: [ceil(inputs / group)][vectors * lanes][group], the weights of inputs that there are
// not being zero. What each output has beside them is [vectors][output_vectors][lanes] floats.
#pragma once

#include <cstddef>
#include <cstdint>

#include "formats.h"

namespace mbv2::cpu {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How vectors of outputs are cut into panels: as many of the width that the instruction set likes as possible.
struct Panels {
    int64_t vectors = 0, count = 0;

    Panels() = default;
    Panels(int64_t vectors, int width)
        : vectors(vectors), count(width == 2 ? (vectors < 2 ? 1 : vectors / 2) : ceil_div(vectors, width)) {}

    int64_t size(int64_t panel) const { return vectors / count + (panel < vectors % count); }
    int64_t first(int64_t panel) const {
        const int64_t wider = vectors % count;
        return panel * (vectors / count) + (panel < wider ? panel : wider);
    }
};

// A 1x1 convolution; with Weight float also the stem, of 27 inputs in the order row, channel, column.
template <class Weight>
struct Pointwise {
    const Weight* weights;
    const float* outputs;  // the bias and what else there is of each output
    int64_t inputs;
    Panels panels;  // of ceil(outputs / lanes) vectors
};

struct Stem {
    Pointwise<float> conv;
    const float* image;
    int64_t channel_stride, row_stride, column_stride;  // of the picture, in floats; column_stride is 1 or 3
    int64_t height, width;
};

template <class Tap>
struct DepthwiseWeights {
    const Tap* taps;  // [vectors][9][lanes]
    const float* outputs;
};

template <class Tap>
struct Depthwise {
    DepthwiseWeights<Tap> weights;
    int64_t stride;
    int64_t height, width, out_width;
    int64_t ring;  // rows held of the input: row r lies in place r % ring
};

template <class F>
struct Kernels {
    using Activation = typename F::Activation;
    using Hidden = typename F::Hidden;
    using Conv = Pointwise<typename F::Weight>;

    const char* name;
    int lanes;
    int panel;  // vectors of outputs in most panels

    // Rows [0, rows) of one panel: out = relu6(in * weights + bias). For expansions and the head.
    void (*expand)(const Conv&, int64_t panel, const Activation* in, int64_t in_plane, int64_t rows, Hidden* out,
                   int64_t out_plane);

    // The same without relu6, plus the shortcut; residual may be null.
    void (*project)(const Conv&, int64_t panel, const Activation* in, int64_t in_plane, int64_t rows, Activation* out,
                    int64_t out_plane, const Activation* residual, int64_t residual_plane);

    // The same with a shortcut from hidden channels: the stem's, of a first block with a shortcut.
    void (*project_on_hidden)(const Conv&, int64_t panel, const Activation* in, int64_t in_plane, int64_t rows,
                              Activation* out, int64_t out_plane, const Hidden* residual, int64_t residual_plane);

    // The same to logits.
    void (*classify)(const Conv&, int64_t panel, const Activation* in, int64_t in_plane, int64_t rows, float* out,
                     int64_t out_plane);

    // Row `row` of one panel of relu6(conv3x3(image) + bias), stride 2. Pixels are `out_pixel` apart, `lanes` in
    // planes.
    void (*stem)(const Stem&, int64_t panel, int64_t row, Hidden* out, int64_t out_pixel, int64_t out_plane);

    // Output rows [first, last) of one vector of channels of relu6(depthwise3x3(in) + bias); `in` is where row 0's
    // place is, row `first` goes to `out`.
    void (*depthwise)(const Depthwise<typename F::Tap>&, int64_t vector, const Hidden* in, int64_t first, int64_t last,
                      Activation* out);

    // Mean over `pixels` of one plane of the head's outputs.
    void (*mean)(const Conv& head, int64_t vector, const Hidden* in, int64_t pixels, Activation* out);

    // Nothing but the instructions that 1x1 convolutions are made of, for benchmarks: `steps` rounds, on `in` of 256
    // bytes; writes 64 to `out`. Returns how many multiply-adds they were.
    int64_t (*multiply_adds)(int64_t steps, const float* in, float* out);
};

// Null where the compiler or the architecture has no such instructions.
const Kernels<Float32>* avx512_kernels();
const Kernels<Float32>* avx2_kernels();
const Kernels<Float32>* portable_kernels();
const Kernels<Int8>* int8_avx512_kernels();
const Kernels<Int8>* int8_avx2_kernels();
const Kernels<Int8>* int8_portable_kernels();
const Kernels<Bfloat16>* bf16_avx512_kernels();
const Kernels<Bfloat16>* bf16_portable_kernels();

}  // namespace mbv2::cpu
