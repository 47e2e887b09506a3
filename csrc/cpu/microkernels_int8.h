// The 1x1 convolutions and the mean of the int8 format, written once over a vector type V; each instruction set
// includes this into its own translation unit, for the reason given in microkernels.h.
//
// Every operation is exact or rounds in one defined way, so all instruction sets give the same bits:
//   sum    = bias + sum of activation (0..255) * weight (-127..127), in 32 bits
//   narrow = saturate16(round_to_even(float(sum) * multiplier))
//   hidden = max(narrow, 0), where 32767 stands for 6
//   output = saturate8(saturate16(narrow + shortcut + offset) >> 6)
//   logit  = float(sum) * multiplier
// mbv2/quantize.py chooses the numbers so that sums stay in 32 bits, their products with the multiplier too, and the
// sum of four products that AVX2 takes in 16 bits there.
//
// V has: Sum, 16 32-bit integers; Half, 16 16-bit integers; panel and rows as in microkernels.h; lines_ahead; quads,
// how many groups of 4 inputs it multiplies at once; and the operations used below.
#pragma once

#include "microkernels.h"

namespace mbv2::cpu {
namespace {
namespace int8 {

constexpr int kLanes = 16;
// What each output has beside its weights: vectors of 16 floats, all whole numbers but the multipliers. The head has in
// place of a shortcut's multiplier what turns the sum of a picture's hidden values, divided by the pixels, into 8 bits.
enum Of { kBias = 0, kMultiplier = 1, kShortcut = 2, kOffset = 3, kMean = kShortcut };

inline const float* of_output(const float* outputs, int64_t vector, Of which) {
    return outputs + (vector * Int8::output_vectors + which) * kLanes;
}

// What becomes of 16 sums of one pixel: hidden channels, channels of a block's output, logits.
template <class V>
struct ToHidden {
    int16_t* out;
    int64_t plane;

    void store(int64_t pixel, int vector, const typename V::Sum& sum, const float* outputs) const {
        const typename V::Half half = V::narrow(sum, of_output(outputs, vector, kMultiplier));
        V::store(out + vector * plane + pixel * kLanes, V::positive(half));
    }
};

template <class V, class Shortcut>
struct ToActivation {
    uint8_t* out;
    int64_t plane;
    const Shortcut* shortcut;  // may be null; of activations, or from the stem of hidden channels
    int64_t shortcut_plane;

    void store(int64_t pixel, int vector, const typename V::Sum& sum, const float* outputs) const {
        typename V::Half half = V::narrow(sum, of_output(outputs, vector, kMultiplier));
        if (shortcut != nullptr) {
            const typename V::Half x = V::load_scaled(shortcut + vector * shortcut_plane + pixel * kLanes);
            half = V::add(half, V::multiply_high(x, V::halves(of_output(outputs, vector, kShortcut))));
        }
        half = V::add(half, V::halves(of_output(outputs, vector, kOffset)));
        V::store_bytes(out + vector * plane + pixel * kLanes, V::shift6(half));
    }
};

template <class V>
struct ToLogits {
    float* out;
    int64_t plane;

    void store(int64_t pixel, int vector, const typename V::Sum& sum, const float* outputs) const {
        V::store_floats(out + vector * plane + pixel * kLanes, sum, of_output(outputs, vector, kMultiplier));
    }
};

// Everything that the tiles of one panel share, and where the next tile begins.
struct Panel {
    const uint8_t* in;
    int64_t in_plane, inputs;
    const int8_t* weights;
    const float* outputs;
    int64_t pixel;
    const char* ahead;  // memory that will be read soon: lines of it are fetched with each plane
};

// `count` tiles of Rows pixels and Vectors vectors of outputs, one below the other.
template <class V, class Finish, int Rows, int Vectors>
void tiles(const Panel& panel, const Finish& finish, int64_t count) {
    constexpr int kQuad = Vectors * kLanes * 4;
    const uint8_t* from = panel.in;
    const char* ahead = panel.ahead;
    for (int64_t pixel = panel.pixel; count > 0; --count, pixel += Rows, from += Rows * kLanes) {
        typename V::Sum sums[Rows][Vectors];
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
            const typename V::Sum bias = V::whole(of_output(panel.outputs, v, kBias));
            MBV2_UNROLL for (int m = 0; m < Rows; ++m) sums[m][v] = bias;
        }
        const uint8_t* a = from;
        const int8_t* b = panel.weights;
        for (int64_t i = panel.inputs / kLanes; i > 0; --i, a += panel.in_plane) {
            MBV2_UNROLL for (int line = 0; line < V::lines_ahead; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
            ahead += 64 * V::lines_ahead;
            MBV2_UNROLL for (int q = 0; q < 4; q += V::quads, b += V::quads * kQuad) {
                V::template multiply<V::quads>(sums, a + 4 * q, b);
            }
        }
        int64_t left = ceil_div(panel.inputs % kLanes, 4);
        for (; left >= V::quads; left -= V::quads, a += 4 * V::quads, b += V::quads * kQuad) {
            V::template multiply<V::quads>(sums, a, b);
        }
        if (left > 0) V::template multiply<1>(sums, a, b);
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
            MBV2_UNROLL for (int v = 0; v < Vectors; ++v) finish.store(pixel + m, v, sums[m][v], panel.outputs);
        }
    }
}

template <class Finish>
using TilesFunction = void (*)(const Panel&, const Finish&, int64_t);

// Entry [rows - 1] for every number of rows that fits the registers.
template <class V, class Finish, int Vectors, int Rows, int... Less>
struct Tiles : Tiles<V, Finish, Vectors, Rows - 1, Rows, Less...> {};
template <class V, class Finish, int Vectors, int... Less>
struct Tiles<V, Finish, Vectors, 0, Less...> {
    static constexpr TilesFunction<Finish> entries[] = {tiles<V, Finish, Less, Vectors>...};
};

template <class V, class Finish, int Vectors>
void pointwise_panel(Panel panel, const Finish& finish, int64_t rows) {
    constexpr int kMost = V::rows[Vectors - 1];
    // Tiles of nearly equal height, as a lower one reads the same weights for less.
    const int64_t count = ceil_div(rows, kMost), height = rows / count, higher = rows % count;
    for (int64_t m = height + 1; m >= height; --m) {
        const int64_t here = m > height ? higher : count - higher;
        if (here == 0) continue;
        Tiles<V, Finish, Vectors, kMost>::entries[m - 1](panel, finish, here);
        panel.in += here * m * kLanes;
        panel.pixel += here * m;
        panel.ahead += here * 64 * V::lines_ahead * (panel.inputs / kLanes);
    }
}

template <class V, class Finish>
void pointwise(const Pointwise<int8_t>& conv, int64_t index, const uint8_t* in, int64_t in_plane, int64_t rows,
               const Finish& finish) {
    const int64_t vectors = conv.panels.size(index), first = conv.panels.first(index);
    const int64_t inputs = ceil_div(conv.inputs, Int8::group) * Int8::group;
    const int8_t* weights = conv.weights + first * kLanes * inputs;
    const Panel panel = {in,
                         in_plane,
                         conv.inputs,
                         weights,
                         of_output(conv.outputs, first, kBias),
                         0,
                         reinterpret_cast<const char*>(weights + vectors * kLanes * inputs)};
    // Panels of two may have one or three.
    if constexpr (V::panel > 1) {
        if (vectors > 2) return pointwise_panel<V, Finish, 3>(panel, finish, rows);
        if (vectors > 1) return pointwise_panel<V, Finish, 2>(panel, finish, rows);
    }
    pointwise_panel<V, Finish, 1>(panel, finish, rows);
}

template <class V>
void expand(const Pointwise<int8_t>& conv, int64_t panel, const uint8_t* in, int64_t in_plane, int64_t rows,
            int16_t* out, int64_t out_plane) {
    pointwise<V>(conv, panel, in, in_plane, rows, ToHidden<V>{out, out_plane});
}

template <class V, class Shortcut>
void project(const Pointwise<int8_t>& conv, int64_t panel, const uint8_t* in, int64_t in_plane, int64_t rows,
             uint8_t* out, int64_t out_plane, const Shortcut* shortcut, int64_t shortcut_plane) {
    const ToActivation<V, Shortcut> finish = {out, out_plane, shortcut, shortcut_plane};
    pointwise<V>(conv, panel, in, in_plane, rows, finish);
}

template <class V>
void classify(const Pointwise<int8_t>& conv, int64_t panel, const uint8_t* in, int64_t in_plane, int64_t rows,
              float* out, int64_t out_plane) {
    pointwise<V>(conv, panel, in, in_plane, rows, ToLogits<V>{out, out_plane});
}

template <class V>
int64_t multiply_adds(int64_t steps, const float* in, float* out) {
    constexpr int kRows = V::rows[V::panel - 1];
    typename V::Sum sums[kRows][V::panel];
    for (auto& row : sums) {
        for (auto& sum : row) sum = V::nothing();
    }
    const auto* bytes = reinterpret_cast<const uint8_t*>(in);
    for (int64_t s = 0; s < steps; ++s) {
        V::template multiply<V::quads>(sums, bytes, reinterpret_cast<const int8_t*>(bytes));
    }
    for (const auto& row : sums) {
        for (const auto& sum : row) V::store_floats(out, sum, in);
    }
    return steps * kRows * V::panel * kLanes * 4 * V::quads;
}

// The mean of hidden values in 8 bits. The sum may leave 24 bits, not 32, as a chunk has less than 2^16 pixels.
template <class V>
void mean(const Pointwise<int8_t>& conv, int64_t vector, const int16_t* in, int64_t pixels, uint8_t* out) {
    constexpr int64_t kChunk = 1 << 15;
    float sums[kLanes] = {};
    for (int64_t first = 0; first < pixels; first += kChunk) {
        typename V::Sum sum = V::nothing();
        const int64_t last = first + kChunk < pixels ? first + kChunk : pixels;
        for (int64_t i = first; i < last; ++i) sum = V::add_halves(sum, V::load(in + i * kLanes));
        V::add_floats(sums, sum);
    }
    const float* multipliers = of_output(conv.outputs, vector, kMean);
    for (int lane = 0; lane < kLanes; ++lane) {
        const float scaled = sums[lane] * (multipliers[lane] / static_cast<float>(pixels));
        // Adding and taking away 1.5 * 2^23 rounds to even.
        const float rounded = (scaled < 255.0f ? scaled : 255.0f) + 12582912.0f;
        out[lane] = static_cast<uint8_t>(rounded - 12582912.0f);
    }
}

// S sums the stem in floats and stores hidden channels; D convolves them in 16 bits.
template <class V, class S, class D>
constexpr Kernels<Int8> kernels_of(const char* name) {
    return {name,        kLanes,        V::panel,           expand<V>, project<V, uint8_t>, project<V, int16_t>,
            classify<V>, stem<S, Int8>, depthwise<D, Int8>, mean<V>,   multiply_adds<V>};
}

}  // namespace int8
}  // namespace
}  // namespace mbv2::cpu
