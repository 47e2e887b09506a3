// What one instruction set offers training: a table of tasks, filled by train_<isa>.cpp from the train_*.h templates.
//
// Activations are dense rows of C channels (NHWC memory) of type T; arithmetic is float. A task works on a range of
// rows or of picture rows and leaves its own part of statistics and of weight gradients, so that how the work is cut,
// and with it every bit of the result, depends on the shape alone. Vectors of channels (bn, coef, moments, sums) are
// padded to `padded(C)` floats; rows of bn, coef and so on are as in kernels/layout.py.
//
// Weights of 1x1 convolutions are panels of 2 vectors (the last one 3 if their number is odd, 1 if it is the only
// one) along one of their sides: [panel][length of the other side][vectors * lanes], as `pack` writes them. Gradients
// of weights have the same layout.
#pragma once

#include <cstddef>
#include <cstdint>

#include "kernels.h"

namespace mbv2::cpu::train {

struct bf16 {
    uint16_t bits;
};

// Most rows of a tile: what one pass of the matrix kernels shares a panel of weights over.
constexpr int64_t kRows = 96;
// Tiles of `rows` rows are of nearly equal height: a last one of a few rows would pay for all the weights.
inline int64_t tile_rows(int64_t rows) { return ceil_div(rows, ceil_div(rows, kRows)); }
// Widest panel, 3 vectors of 16 lanes.
constexpr int64_t kPanel = 48;

inline int64_t panels(int64_t vectors) { return vectors == 1 ? 1 : vectors / 2; }
inline int64_t panel_vectors(int64_t vectors, int64_t panel) {
    return panel + 1 < panels(vectors) ? 2 : vectors - 2 * panel;
}

// Channels of a hidden tensor that `pointwise_backward` holds at once.
constexpr int64_t kChunk = 192;

constexpr int64_t padded(int64_t channels) { return (channels + 15) / 16 * 16; }
// Floats from one row of a tile to the next: an odd number of cache lines, so that columns spread over the cache.
constexpr int64_t tile_stride(int64_t columns) { return ((columns + 15) / 16 | 1) * 16; }

inline int64_t panel_floats(int64_t vectors, int64_t lanes, int64_t length) { return vectors * lanes * length; }

// A picture's 3x3 patches as rows of 9 * channels values (row, column, channel), padding 1.
template <class T>
struct Patches {
    const T* image;
    int64_t channels, height, width, stride, out_height, out_width;
};

// y = a * weights, where a is x, or relu6(bn(x)), or patches of a picture; and y's moments.
template <class T>
struct Forward {
    const T* x;
    const float* bn;            // null: x as it is
    const Patches<T>* patches;  // null: x has rows of `inputs` values
    const float* weights;       // panels of outputs, length inputs
    int64_t inputs, outputs;
    T* y;
    bool stream;  // y is larger than the caches
};

// dz2 = mask(dy3 * weights), its sums, and dweight = dy3^T * relu6(bn2(y2)), with dy3 = A * grad + B * y3 + C.
template <class T>
struct ProjectBackward {
    const T *grad, *y3;
    const float* coef3;
    const float* weights;  // panels of hidden channels, length outputs; null: no dz2, no sums
    const T* y2;
    const float* bn2;
    T* dz2;
    int64_t hidden, outputs;
    bool stream;  // dz2 is larger than the caches
};

// dx = dy * weights + residual, dweight = dy^T * x, with dy = A * dz + B * y + C (dz masked where bn is given).
template <class T>
struct PointwiseBackward {
    const T *dz, *y;
    const float *coef, *bn;
    const float* weights;       // panels of inputs, length outputs; null: no dx
    const T* x;                 // null: no dweight
    const Patches<T>* patches;  // x as patches of a picture, if not null
    const T* residual;
    T* dx;
    int64_t inputs, outputs;
};

// A 1x1 weight where it lies, [outputs][inputs] with dense rows, `stride` apart, and where its gradient goes, likewise;
// null: not wanted.
template <class T>
struct InPlace {
    const T* weight;
    T* gradient;
    int64_t stride;
};

// y = depthwise 3x3 of relu6(bn(x)), or of x as it is, padding 1; and y's moments, or with a bias relu6(y + bias).
template <class T>
struct DepthwiseForward {
    const T* x;
    const float* bn;
    const float* weights;  // [vectors][9][lanes]
    T* y;
    const float* bias;  // not null: relu6(conv + bias) for inference, no moments
    int64_t channels, height, width, stride, out_height, out_width;
    bool stream;  // y is larger than the caches
};

// From dz2, with dy2 = A * dz2 + B * y2 + C: dz1 = mask(conv^T(dy2)), its sums, dweight. bn1 null: no mask, no sums.
template <class T>
struct DepthwiseBackward {
    const T *dz2, *y2;
    const float* coef2;
    const T* y1;
    const float* bn1;
    const float* weights;  // [vectors][9][lanes]
    T* dz1;
    int64_t channels, height, width, stride, out_height, out_width;
    bool stream;  // dz1 is larger than the caches
};

// Inference: out = clamp(a * weights + bias) + residual, or of a depthwise convolution.
template <class T>
struct Folded {
    const T* x;
    const Patches<T>* patches;
    const float *weights, *bias;  // panels of outputs, length inputs; bias padded
    int64_t inputs, outputs;
    bool relu6;
    const T* residual;
    T* y;
};

template <class T>
struct Tasks {
    // Rows [first, last). moments: [3][padded(outputs)].
    void (*forward)(const Forward<T>&, int64_t first, int64_t last, float* moments, float* scratch);
    // Rows [first, last), panels [panel, panel_end) of hidden channels. sums [2][padded(hidden)] is written for these
    // channels, dweight (null: not wanted) for these panels.
    void (*project_backward)(const ProjectBackward<T>&, int64_t first, int64_t last, int64_t panel, int64_t panel_end,
                             float* sums, float* dweight, float* scratch);
    // Rows [first, last), outputs [begin, end); dx only where these are all. dweight: panels of inputs.
    void (*pointwise_backward)(const PointwiseBackward<T>&, int64_t first, int64_t last, int64_t begin, int64_t end,
                               float* dweight, float* scratch);
    // Rows [first, last) of the output of picture n.
    void (*depthwise)(const DepthwiseForward<T>&, int64_t n, int64_t first, int64_t last, float* moments,
                      float* scratch);
    // Rows [first, last) of the input of picture n, first even. sums [2][padded(C)], dweight [vectors][9][lanes].
    void (*depthwise_backward)(const DepthwiseBackward<T>&, int64_t n, int64_t first, int64_t last, float* sums,
                               float* dweight, float* scratch);
    void (*folded)(const Folded<T>&, int64_t first, int64_t last, float* scratch);
    // All of few rows, with weights where they lie (train_few_rows.h): panels [begin, end) of outputs, hidden channels,
    // inputs. moments and sums are written for these, but not the counts.
    void (*forward_few)(const Forward<T>&, const InPlace<T>&, int64_t rows, int64_t begin, int64_t end, float* moments,
                        float* scratch);
    void (*project_backward_few)(const ProjectBackward<T>&, const InPlace<T>&, int64_t rows, int64_t begin, int64_t end,
                                 float* sums, float* scratch);
    void (*expand_backward_few)(const PointwiseBackward<T>&, const InPlace<T>&, int64_t rows, int64_t begin,
                                int64_t end, float* scratch);

    // Elementwise on rows [first, last) of C channels.
    void (*bn_apply)(const T* y, const float* bn, const T* residual, bool relu6, int64_t channels, int64_t first,
                     int64_t last, T* out);
    void (*bn_sums)(const T* grad, const T* y, const float* bn, bool relu6, int64_t channels, int64_t first,
                    int64_t last, float* sums);
    // Pictures of `pixels` rows; pooled and grad are [pictures, C].
    void (*pool)(const T* y, const float* bn, int64_t channels, int64_t pixels, int64_t first, int64_t last, T* pooled);
    void (*pool_backward)(const T* grad, const T* y, const float* bn, int64_t channels, int64_t pixels, int64_t first,
                          int64_t last, T* dz, float* sums);
};

struct Kernels {
    const char* name;
    int lanes;
    Tasks<float> single;
    Tasks<bf16> half;
    // to[i] += from[i], from aligned as `to` is.
    void (*add)(const float* from, int64_t count, float* to);
};

template <class T>
const Tasks<T>& tasks(const Kernels& kernels);
template <>
inline const Tasks<float>& tasks<float>(const Kernels& kernels) {
    return kernels.single;
}
template <>
inline const Tasks<bf16>& tasks<bf16>(const Kernels& kernels) {
    return kernels.half;
}

// Floats of scratch memory that a task needs, aligned to 64 bytes.
constexpr int64_t forward_scratch(int64_t inputs) { return kRows * (tile_stride(inputs) + kPanel); }
constexpr int64_t project_backward_scratch(int64_t outputs) { return kRows * (tile_stride(outputs) + 2 * kPanel); }
constexpr int64_t pointwise_backward_scratch(int64_t inputs) {
    return kRows * (tile_stride(kChunk) + 2 * (padded(inputs) + kPanel));
}
// The last: a panel's rows of a weight in bfloat16, as floats.
constexpr int64_t forward_few_scratch(int64_t rows, int64_t inputs) {
    return (rows + kPanel) * (tile_stride(inputs) + kPanel) + inputs * kPanel;
}
constexpr int64_t backward_few_scratch(int64_t rows, int64_t outputs) {
    return rows * (tile_stride(outputs) + 2 * kPanel) + outputs * kPanel;
}
constexpr int64_t depthwise_scratch(int64_t channels, int64_t width) {
    // The ring, sums of two kinds, and a strip of 2 x 16 results on their way out.
    return (4 * (width + 3) + 2 + 32) * padded(channels);
}

const Kernels* avx512_kernels();
const Kernels* avx2_kernels();
const Kernels* portable_kernels();

// The kernels of the instruction set `name`, one of those that cpu::kernels(name) knows.
const Kernels& kernels(const char* name);

}  // namespace mbv2::cpu::train
