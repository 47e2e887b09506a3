// 1x1 convolutions of the formats with float sums, as tiles of sums in registers; see microkernels.h.
#pragma once

#include "kernels.h"

#ifndef MBV2_UNROLL
#define MBV2_UNROLL _Pragma("GCC unroll 64")
#endif

namespace mbv2::cpu {
namespace {

template <class V, int Rows, int Vectors>
struct Accumulators {
    typename V::Type value[Rows][Vectors];
};

// One group of inputs of each row times one row of weights. Row and RowStep are constants so that all addresses are
// one register and a displacement.
template <class V, int Rows, int Vectors, int RowStep, int Group, class Activation, class Weight>
inline __attribute__((always_inline)) void multiply(Accumulators<V, Rows, Vectors>& acc, const Activation* a,
                                                    const Weight* b) {
    decltype(V::load_weights(b)) weights[Vectors];
    MBV2_UNROLL for (int v = 0; v < Vectors; ++v) weights[v] = V::load_weights(b + v * V::lanes * Group);
    MBV2_UNROLL for (int m = 0; m < Rows; ++m) V::add_products(acc.value[m], a + m * RowStep, weights);
}

// `outputs` has OutputVectors numbers of each output, the bias first.
template <int OutputVectors = 1, class V, int Rows, int Vectors>
inline __attribute__((always_inline)) void start(Accumulators<V, Rows, Vectors>& acc, const float* outputs) {
    MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
        const typename V::Type value = V::load(outputs + v * OutputVectors * V::lanes);
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) acc.value[m][v] = value;
    }
}

template <class V, int Rows, int Vectors>
inline __attribute__((always_inline)) void clamp(Accumulators<V, Rows, Vectors>& acc) {
    MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) acc.value[m][v] = V::relu6(acc.value[m][v]);
    }
}

template <class V, int Rows, int Vectors, class Out>
inline __attribute__((always_inline)) void store(const Accumulators<V, Rows, Vectors>& acc, Out* out,
                                                 int64_t out_plane) {
    MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) V::store(out + v * out_plane + m * V::lanes, acc.value[m][v]);
    }
}

// Where a tile of a 1x1 convolution finds its inputs: `full` planes of as many values as a vector has lanes, and one
// more plane of `tail` values.
template <class Activation>
struct Planes {
    const Activation* base;
    int64_t full, stride, tail;
};

// Sums over the inputs of a 1x1 convolution. `ahead` is memory that will be read soon: one line of it is fetched with
// each plane.
template <class V, class F, int Rows, int Vectors>
inline __attribute__((always_inline)) void sum(Accumulators<V, Rows, Vectors>& acc,
                                               const Planes<typename F::Activation>& in,
                                               const typename F::Activation* a, const typename F::Weight* b,
                                               const char* ahead) {
    constexpr int kWidth = Vectors * V::lanes * F::group, kGroups = V::lanes / F::group;
    constexpr int kUnroll = V::unroll < kGroups ? V::unroll : kGroups;
    for (int64_t i = in.full; i > 0; --i, a += in.stride, ahead += 64 * V::lines_ahead) {
        MBV2_UNROLL for (int line = 0; line < V::lines_ahead; ++line) __builtin_prefetch(ahead + 64 * line, 0, 2);
        for (int k = 0; k < kGroups; k += kUnroll, b += kUnroll * kWidth) {
            MBV2_UNROLL for (int u = 0; u < kUnroll; ++u)
                multiply<V, Rows, Vectors, V::lanes, F::group>(acc, a + (k + u) * F::group, b + u * kWidth);
        }
    }
    int64_t k = 0;
    for (; k + F::group <= in.tail; k += F::group, a += F::group, b += kWidth) {
        multiply<V, Rows, Vectors, V::lanes, F::group>(acc, a, b);
    }
    if constexpr (F::group > 1) {
        if (k == in.tail) return;
        // Part of a group: what lies beyond the last input may be NaN, and not even zero times that is zero.
        typename F::Activation last[Rows * F::group] = {};
        for (int m = 0; m < Rows; ++m) {
            for (int64_t i = k; i < in.tail; ++i) last[m * F::group + i - k] = a[m * V::lanes + i - k];
        }
        multiply<V, Rows, Vectors, F::group, F::group>(acc, last, b);
    }
}

// Everything that the tiles of one panel of a 1x1 convolution share, and where the next tile begins.
template <class F, class Out, class Residual>
struct Panel {
    Planes<typename F::Activation> in;
    const typename F::Weight* weights;
    const float* bias;
    bool relu6;
    Out* out;
    int64_t out_plane;
    const Residual* residual;  // may be null
    int64_t residual_plane;
    const char* ahead;
};

// `count` tiles of a 1x1 convolution, one below the other.
template <class V, class F, class Out, class Residual, int Rows, int Vectors>
void tiles(const Panel<F, Out, Residual>& panel, int64_t count) {
    const typename F::Activation* a = panel.in.base;
    const Residual* residual = panel.residual;
    const char* ahead = panel.ahead;
    Out* out = panel.out;
    for (; count > 0; --count, a += Rows * V::lanes, out += Rows * V::lanes) {
        Accumulators<V, Rows, Vectors> acc;
        start(acc, panel.bias);
        sum<V, F>(acc, panel.in, a, panel.weights, ahead);
        ahead += 64 * V::lines_ahead * panel.in.full;
        if (panel.relu6) clamp(acc);
        if (residual != nullptr) {
            MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
                MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
                    const Residual* x = residual + v * panel.residual_plane + m * V::lanes;
                    acc.value[m][v] = V::add(acc.value[m][v], V::load(x));
                }
            }
            residual += Rows * V::lanes;
        }
        store(acc, out, panel.out_plane);
    }
}

template <class F, class Out, class Residual>
using TilesFunction = void (*)(const Panel<F, Out, Residual>&, int64_t);

// Entry [rows - 1] for every number of rows that fits the registers.
template <class V, class F, class Out, class Residual, int Vectors, int Rows, int... Less>
struct PointwiseTiles : PointwiseTiles<V, F, Out, Residual, Vectors, Rows - 1, Rows, Less...> {};
template <class V, class F, class Out, class Residual, int Vectors, int... Less>
struct PointwiseTiles<V, F, Out, Residual, Vectors, 0, Less...> {
    static constexpr TilesFunction<F, Out, Residual> entries[] = {tiles<V, F, Out, Residual, Less, Vectors>...};
};

template <class V, class F, int Vectors, class Out, class Residual>
void pointwise_panel(Panel<F, Out, Residual> panel, int64_t rows) {
    constexpr int kMost = V::rows[Vectors - 1];
    // Tiles of nearly equal height: a last tile of one row would run at the latency of its additions.
    const int64_t count = ceil_div(rows, kMost), height = rows / count, higher = rows % count;
    for (int64_t m = height + 1; m >= height; --m) {
        const int64_t here = m > height ? higher : count - higher;
        if (here == 0) continue;
        PointwiseTiles<V, F, Out, Residual, Vectors, kMost>::entries[m - 1](panel, here);
        panel.in.base += here * m * V::lanes;
        panel.out += here * m * V::lanes;
        if (panel.residual != nullptr) panel.residual += here * m * V::lanes;
        panel.ahead += here * 64 * V::lines_ahead * panel.in.full;
    }
}

template <class V, class F, class Out, class Residual>
void pointwise(const Pointwise<typename F::Weight>& conv, int64_t panel, bool relu6, const typename F::Activation* in,
               int64_t in_plane, int64_t rows, Out* out, int64_t out_plane, const Residual* residual,
               int64_t residual_plane) {
    const int64_t vectors = conv.panels.size(panel), first = conv.panels.first(panel) * V::lanes;
    const int64_t inputs = ceil_div(conv.inputs, F::group) * F::group;
    const typename F::Weight* weights = conv.weights + first * inputs;
    const Panel<F, Out, Residual> all = {{in, conv.inputs / V::lanes, in_plane, conv.inputs % V::lanes},
                                         weights,
                                         conv.outputs + first,
                                         relu6,
                                         out,
                                         out_plane,
                                         residual,
                                         residual_plane,
                                         reinterpret_cast<const char*>(weights + vectors * V::lanes * inputs)};
    switch (vectors) {
        case 1:
            return pointwise_panel<V, F, 1>(all, rows);
        case 2:
            return pointwise_panel<V, F, 2>(all, rows);
        default:
            return pointwise_panel<V, F, 3>(all, rows);
    }
}

template <class V, class F>
void expand(const Pointwise<typename F::Weight>& conv, int64_t panel, const typename F::Activation* in,
            int64_t in_plane, int64_t rows, typename F::Hidden* out, int64_t out_plane) {
    pointwise<V, F, typename F::Hidden, typename F::Hidden>(conv, panel, true, in, in_plane, rows, out, out_plane,
                                                            nullptr, 0);
}

template <class V, class F, class Residual>
void project(const Pointwise<typename F::Weight>& conv, int64_t panel, const typename F::Activation* in,
             int64_t in_plane, int64_t rows, typename F::Activation* out, int64_t out_plane, const Residual* residual,
             int64_t residual_plane) {
    pointwise<V, F>(conv, panel, false, in, in_plane, rows, out, out_plane, residual, residual_plane);
}

template <class V, class F>
void classify(const Pointwise<typename F::Weight>& conv, int64_t panel, const typename F::Activation* in,
              int64_t in_plane, int64_t rows, float* out, int64_t out_plane) {
    pointwise<V, F, float, float>(conv, panel, false, in, in_plane, rows, out, out_plane, nullptr, 0);
}

}  // namespace
}  // namespace mbv2::cpu
