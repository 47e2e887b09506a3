// The kernels of the formats with float sums, written once over a vector type V; each instruction set includes this
// into its own translation unit.
//
// Everything is in an unnamed namespace and nothing of the standard library is used: a shared inline function could
// be linked from the unit with the most demanding instructions and then run on a machine that lacks them.
//
// V has: lanes; panel, the vectors of outputs in most panels; Type; load, store (aligned, of what the format holds),
// load_weights, add_products (one group of inputs times their weights), broadcast, fma(a, b, c) = a * b + c, add,
// scale, relu6 (NaN passes); rows[n - 1]: how many rows of n accumulators fit the registers beside n weights and one
// broadcast; unroll: how many groups of inputs a loop takes at once; and lines_ahead, the lines of weights fetched with
// each plane.
#pragma once

#include "microkernels_pointwise.h"

namespace mbv2::cpu {
namespace {

// Where a tile of the stem finds its inputs: 3 columns of 3 channels of up to 3 rows of the picture.
struct Patch {
    const float* base;
    int64_t rows, row_stride, channel_stride;
};

// Sums over the inputs of the stem.
template <class V, int Rows, int Vectors, int ColumnStride>
inline __attribute__((always_inline)) void sum_stem(Accumulators<V, Rows, Vectors>& acc, const Patch& in,
                                                    const float* b) {
    constexpr int kWidth = Vectors * V::lanes;
    for (int64_t r = 0; r < in.rows; ++r) {
        const float* a = in.base + r * in.row_stride;
        for (int c = 0; c < 3; ++c, a += in.channel_stride, b += 3 * kWidth) {
            MBV2_UNROLL for (int k = 0; k < 3; ++k) {
                // Neighbouring pixels share inputs. Were that seen, they would be held in registers, and with this
                // many sums there are none left.
                const float* column = a + k * ColumnStride;
                if constexpr (Rows * Vectors > 16) asm("" : "+r"(column));
                multiply<V, Rows, Vectors, 2 * ColumnStride, 1>(acc, column, b + k * kWidth);
            }
        }
    }
}

// Where the stem's outputs go: `pixel` and `plane` are the distances of neighbouring pixels and vectors.
template <class F>
struct StemOut {
    typename F::Hidden* at;
    int64_t pixel, plane;
};

// One tile of the stem.
template <class V, class F, int Rows, int Vectors, int ColumnStride>
void stem_tile(const Patch& in, const float* b, const float* outputs, const StemOut<F>& out) {
    Accumulators<V, Rows, Vectors> acc;
    start<F::output_vectors>(acc, outputs);
    sum_stem<V, Rows, Vectors, ColumnStride>(acc, in, b);
    clamp(acc);
    MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) V::store(out.at + m * out.pixel + v * out.plane, acc.value[m][v]);
    }
}

// Pixels [first, last) whose three columns all lie inside the picture, straight from the picture's memory.
template <class V, class F, int Vectors, int ColumnStride>
void stem_interior(const Patch& rows, const float* weights, const float* outputs, int64_t first, int64_t last,
                   const StemOut<F>& out) {
    constexpr int kMost = V::rows[Vectors - 1];
    using Function = void (*)(const Patch&, const float*, const float*, const StemOut<F>&);
    const auto run = [&](Function function, int64_t x) {
        Patch here = rows;
        here.base += (2 * x - 1) * ColumnStride;
        function(here, weights, outputs, {out.at + x * out.pixel, out.pixel, out.plane});
    };
    int64_t x = first;
    if (last - first >= kMost) {
        for (; x + kMost <= last; x += kMost) run(stem_tile<V, F, kMost, Vectors, ColumnStride>, x);
        // The last tile overlaps the one before it and writes the same values again.
        if (x < last) run(stem_tile<V, F, kMost, Vectors, ColumnStride>, last - kMost);
        return;
    }
    for (; x + 3 <= last; x += 3) run(stem_tile<V, F, 3, Vectors, ColumnStride>, x);
    for (; x < last; ++x) run(stem_tile<V, F, 1, Vectors, ColumnStride>, x);
}

template <class V, class F, int Vectors>
void stem_panel(const Stem& stem, int64_t panel, int64_t row, const StemOut<F>& out) {
    const int64_t y = 2 * row - 1, top = y < 0 ? 1 : 0, bottom = y + 3 > stem.height ? stem.height - y : 3;
    const int64_t vector = stem.conv.panels.first(panel);
    const float* weights = stem.conv.weights + (vector * 27 + top * 9 * Vectors) * V::lanes;
    const float* outputs = stem.conv.outputs + vector * F::output_vectors * V::lanes;
    const Patch rows = {stem.image + (y + top) * stem.row_stride, bottom - top, stem.row_stride, stem.channel_stride};
    const int64_t out_width = ceil_div(stem.width, 2), last = stem.width / 2;
    if (last > 1) {
        const auto interior =
            stem.column_stride == 1 ? stem_interior<V, F, Vectors, 1> : stem_interior<V, F, Vectors, 3>;
        interior(rows, weights, outputs, 1, last, out);
    }
    // The first pixel, and with an odd width the last, from a copy with zeros beside the picture.
    for (int64_t x = 0; x < out_width; x += (last > 1 && x == 0) ? last : 1) {
        float copy[27];
        int64_t size = 0;
        for (int64_t r = 0; r < rows.rows; ++r) {
            for (int64_t c = 0; c < 3; ++c) {
                for (int64_t column = 2 * x - 1; column < 2 * x + 2; ++column) {
                    const bool inside = column >= 0 && column < stem.width;
                    const float* at = rows.base + r * stem.row_stride + c * stem.channel_stride;
                    copy[size++] = inside ? at[column * stem.column_stride] : 0.0f;
                }
            }
        }
        stem_tile<V, F, 1, Vectors, 1>({copy, rows.rows, 9, 3}, weights, outputs,
                                       {out.at + x * out.pixel, out.pixel, out.plane});
    }
}

template <class V, class F>
void stem(const Stem& stem, int64_t panel, int64_t row, typename F::Hidden* out, int64_t out_pixel, int64_t out_plane) {
    const int64_t vectors = stem.conv.panels.size(panel);
    const StemOut<F> to = {out, out_pixel, out_plane};
    // Panels of two may have one or three.
    if constexpr (V::panel > 1) {
        if (vectors > 2) return stem_panel<V, F, 3>(stem, panel, row, to);
        if (vectors > 1) return stem_panel<V, F, 2>(stem, panel, row, to);
    }
    stem_panel<V, F, 1>(stem, panel, row, to);
}

// Most outputs in a row of one depthwise tile: rows of 7, 14, 28, 56 and 112 pixels divide evenly.
constexpr int kDepthwiseTile = 8;

// A column of tiles of `Count` neighbouring outputs; Left and Right say that the first and last lack their outer
// column. `x` is the first input column.
template <class V, class F, int Stride, int Count, bool Left, bool Right>
void depthwise_tiles(const Depthwise<typename F::Tap>& conv, int64_t vector, const typename F::Hidden* in, int64_t x,
                     int64_t first, int64_t last, typename F::Activation* out) {
    const typename F::Tap* weights = conv.weights.taps + vector * 9 * V::lanes;
    const float* of_outputs = conv.weights.outputs + vector * F::output_vectors * V::lanes;
    const int64_t row_size = conv.width * V::lanes;
    in += x * V::lanes;
    // The place of the row above; counted on, as the remainder of a division is slow.
    int64_t place = (first * Stride + conv.ring - 1) % conv.ring;
    for (int64_t y = first; y < last; ++y, out += conv.out_width * V::lanes) {
        typename V::Type acc[Count];
        const typename V::Type bias = V::load(of_outputs);
        MBV2_UNROLL for (int i = 0; i < Count; ++i) acc[i] = bias;
        MBV2_UNROLL for (int r = 0; r < 3; ++r) {
            const int64_t row = y * Stride + r - 1, here = place + r < conv.ring ? place + r : place + r - conv.ring;
            if (row < 0 || row >= conv.height) continue;
            const typename F::Hidden* at = in + here * row_size;
            const typename F::Tap* w = weights + 3 * r * V::lanes;
            const typename V::Type taps[3] = {V::load(w), V::load(w + V::lanes), V::load(w + 2 * V::lanes)};
            constexpr int kColumns = (Count - 1) * Stride + 3;
            MBV2_UNROLL for (int j = Left ? 1 : 0; j < (Right ? kColumns - 1 : kColumns); ++j) {
                const typename V::Type value = V::load(at + (j - 1) * V::lanes);
                MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                    const int tap = j - i * Stride;
                    if (tap >= 0 && tap < 3) acc[i] = V::fma(value, taps[tap], acc[i]);
                }
            }
        }
        if constexpr (F::output_vectors == 1) {
            MBV2_UNROLL for (int i = 0; i < Count; ++i) V::store(out + i * V::lanes, V::relu6(acc[i]));
        } else {
            V::store_depthwise(out, acc, of_outputs);
        }
        place += Stride;
        if (place >= conv.ring) place -= conv.ring;
    }
}

template <class F>
using DepthwiseFunction = void (*)(const Depthwise<typename F::Tap>&, int64_t, const typename F::Hidden*, int64_t,
                                   int64_t, int64_t, typename F::Activation*);

// Entry [count - 1][left][right].
template <class V, class F, int Stride>
struct DepthwiseTiles {
    template <int Count>
    struct At {
        static constexpr DepthwiseFunction<F> entries[2][2] = {
            {depthwise_tiles<V, F, Stride, Count, false, false>, depthwise_tiles<V, F, Stride, Count, false, true>},
            {depthwise_tiles<V, F, Stride, Count, true, false>, depthwise_tiles<V, F, Stride, Count, true, true>}};
    };
    using Entries = const DepthwiseFunction<F> (*)[2];
    static constexpr Entries entries[kDepthwiseTile] = {At<1>::entries, At<2>::entries, At<3>::entries, At<4>::entries,
                                                        At<5>::entries, At<6>::entries, At<7>::entries, At<8>::entries};
};

template <class V, class F, int Stride>
void depthwise_plane(const Depthwise<typename F::Tap>& conv, int64_t vector, const typename F::Hidden* in,
                     int64_t first, int64_t last, typename F::Activation* out) {
    const bool ragged = (conv.out_width - 1) * Stride + 1 == conv.width;
    const int64_t count = ceil_div(conv.out_width, kDepthwiseTile);
    const int64_t width = conv.out_width / count, wider = conv.out_width % count;
    int64_t x = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = width + (i < wider);
        const auto function = DepthwiseTiles<V, F, Stride>::entries[n - 1][i == 0][i + 1 == count && ragged];
        function(conv, vector, in, x * Stride, first, last, out + x * V::lanes);
        x += n;
    }
}

template <class V, class F>
void depthwise(const Depthwise<typename F::Tap>& conv, int64_t vector, const typename F::Hidden* in, int64_t first,
               int64_t last, typename F::Activation* out) {
    const auto plane = conv.stride == 1 ? depthwise_plane<V, F, 1> : depthwise_plane<V, F, 2>;
    plane(conv, vector, in, first, last, out);
}

template <class V, class F>
void mean(const Pointwise<typename F::Weight>&, int64_t, const float* in, int64_t pixels, typename F::Activation* out) {
    typename V::Type sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 4 <= pixels; i += 4) {
        MBV2_UNROLL for (int j = 0; j < 4; ++j) sums[j] = V::add(sums[j], V::load(in + (i + j) * V::lanes));
    }
    for (; i < pixels; ++i) sums[0] = V::add(sums[0], V::load(in + i * V::lanes));
    const typename V::Type sum = V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]));
    V::store(out, V::scale(sum, 1.0f / static_cast<float>(pixels)));
}

// As many sums as hide the latency of an addition.
constexpr int kPeakSums = 12;

template <class V, class F>
int64_t multiply_adds(int64_t steps, const float* in, float* out) {
    const auto a = V::load_weights(reinterpret_cast<const typename F::Weight*>(in));
    const auto b = V::load_weights(reinterpret_cast<const typename F::Weight*>(in + V::lanes));
    typename V::Type sums[kPeakSums];
    MBV2_UNROLL for (int i = 0; i < kPeakSums; ++i) sums[i] = V::broadcast(in + i % V::lanes);
    for (int64_t s = 0; s < steps; ++s) {
        MBV2_UNROLL for (int i = 0; i < kPeakSums; ++i) sums[i] = V::fma(a, b, sums[i]);
    }
    MBV2_UNROLL for (int i = 1; i < kPeakSums; ++i) sums[0] = V::add(sums[0], sums[i]);
    V::store(out, sums[0]);
    return steps * kPeakSums * V::lanes * F::group;
}

template <class V, class F>
constexpr Kernels<F> kernels_of(const char* name) {
    using Activation = typename F::Activation;
    return {name,
            V::lanes,
            V::panel,
            expand<V, F>,
            project<V, F, Activation>,
            project<V, F, typename F::Hidden>,
            classify<V, F>,
            stem<V, F>,
            depthwise<V, F>,
            mean<V, F>,
            multiply_adds<V, F>};
}

}  // namespace
}  // namespace mbv2::cpu
