// What one instruction set offers the network: a table of kernels, filled by kernels_<isa>.cpp from microkernels.h.
//
// Activations are planes of `lanes` channels: [ceil(C / lanes)][pixels][lanes]. The lanes beyond C hold values that
// nobody reads as channels, so no kernel needs a mask. Weights of 1x1 convolutions are panels of 1 to 3 vectors of
// outputs: [input][vectors * lanes].
#pragma once

#include <cstddef>
#include <cstdint>

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

struct Pointwise {
    const float* weights;
    const float* bias;
    int64_t inputs;
    Panels panels;  // of ceil(outputs / lanes) vectors
    bool relu6;
};

struct Stem {
    const float* weights;  // as of a 1x1 convolution with 27 inputs, in the order row, channel, column
    const float* bias;
    Panels panels;
    const float* image;
    int64_t channel_stride, row_stride, column_stride;  // of the picture, in floats; column_stride is 1 or 3
    int64_t height, width;
};

struct Depthwise {
    const float* weights;  // [vectors][9 taps, then bias][lanes]
    int64_t stride;
    int64_t height, width, out_width;
    int64_t ring;  // rows held of the input: row r lies in place r % ring
};

struct Kernels {
    const char* name;
    int lanes;
    int panel;  // vectors of outputs in most panels

    // Rows [0, rows) of one panel: out = clamp(in * weights + bias) + residual; residual may be null.
    void (*pointwise)(const Pointwise&, int64_t panel, const float* in, int64_t in_plane, int64_t rows, float* out,
                      int64_t out_plane, const float* residual, int64_t residual_plane);

    // Row `row` of one panel of relu6(conv3x3(image) + bias), stride 2.
    void (*stem)(const Stem&, int64_t panel, int64_t row, float* out, int64_t out_plane);

    // Output rows [first, last) of one vector of channels; `in` is where row 0's place is, row `first` goes to `out`.
    void (*depthwise)(const Depthwise&, int64_t vector, const float* in, int64_t first, int64_t last, float* out);

    // Mean over `pixels` of one plane.
    void (*mean)(const float* in, int64_t pixels, float* out);

    // Nothing but `steps` * kPeakSums vector multiply-adds, for benchmarks; in and out are 2 vectors and 1.
    void (*multiply_adds)(int64_t steps, const float* in, float* out);
};

constexpr int kPeakSums = 12;

// Null where the compiler or the architecture has no such instructions.
const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

}  // namespace mbv2::cpu
