// The kernels, written once over a vector type V; each instruction set includes this into its own translation unit.
//
// Everything is in an unnamed namespace and nothing of the standard library is used: a shared inline function could
// be linked from the unit with the most demanding instructions and then run on a machine that lacks them.
//
// V has: lanes; Type; load, store (aligned), broadcast, fma(a, b, c) = a * b + c, add, scale, relu6 (NaN passes); and
// rows[n - 1]: how many rows of n accumulators fit the registers beside n weights and one broadcast.
#pragma once

#include "kernels.h"

#define MBV2_UNROLL _Pragma("GCC unroll 64")

namespace mbv2::cpu {
namespace {

// Where a tile finds its inputs: `outer` x `inner` runs of `length` values (the last of the inner runs `tail`).
struct Runs {
    const float* base;
    int64_t outer, outer_stride;
    int64_t inner, inner_stride;
    int64_t length, tail;
};

template <class V, int Rows, int Vectors>
struct Accumulators {
    typename V::Type value[Rows][Vectors];
};

// One input value of each row times one row of weights. Row and KStep are constants so that all addresses are
// one register and a displacement.
template <class V, int Rows, int Vectors, int RowStep>
inline __attribute__((always_inline)) void multiply(Accumulators<V, Rows, Vectors>& acc, const float* a,
                                                    const float* b) {
    typename V::Type weights[Vectors];
    MBV2_UNROLL for (int v = 0; v < Vectors; ++v) weights[v] = V::load(b + v * V::lanes);
    MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
        const typename V::Type x = V::broadcast(a + m * RowStep);
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) acc.value[m][v] = V::fma(x, weights[v], acc.value[m][v]);
    }
}

// Length is that of every run if it is known, else 0.
template <class V, int Rows, int Vectors, int RowStep, int KStep, int Length>
void tile(const Runs& runs, const float* b, const float* bias, bool relu6, float* out, int64_t out_plane,
          const float* residual, int64_t residual_plane) {
    Accumulators<V, Rows, Vectors> acc;
    MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
        const typename V::Type start = V::load(bias + v * V::lanes);
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) acc.value[m][v] = start;
    }
    constexpr int kWidth = Vectors * V::lanes;
    for (int64_t o = 0; o < runs.outer; ++o) {
        const float* run = runs.base + o * runs.outer_stride;
        for (int64_t i = 0; i < runs.inner; ++i, run += runs.inner_stride) {
            const float* a = run;
            if constexpr (Length > 0) {
                MBV2_UNROLL for (int k = 0; k < Length; ++k) {
                    // Neighbouring rows share inputs. Were that seen, they would be held in registers, and with this
                    // many sums there are none left.
                    if constexpr (Rows * Vectors > 16) asm("" : "+r"(a));
                    multiply<V, Rows, Vectors, RowStep>(acc, a + k * KStep, b + k * kWidth);
                }
                b += Length * kWidth;
            } else {
                constexpr int kUnroll = 4;
                const int64_t length = i + 1 < runs.inner ? runs.length : runs.tail;
                int64_t k = 0;
                for (; k + kUnroll <= length; k += kUnroll, a += kUnroll * KStep, b += kUnroll * kWidth) {
                    MBV2_UNROLL for (int u = 0; u < kUnroll; ++u) {
                        multiply<V, Rows, Vectors, RowStep>(acc, a + u * KStep, b + u * kWidth);
                    }
                }
                for (; k < length; ++k, a += KStep, b += kWidth) multiply<V, Rows, Vectors, RowStep>(acc, a, b);
            }
        }
    }
    if (relu6) {
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
            MBV2_UNROLL for (int v = 0; v < Vectors; ++v) acc.value[m][v] = V::relu6(acc.value[m][v]);
        }
    }
    if (residual != nullptr) {
        MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
            MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
                const float* x = residual + v * residual_plane + m * V::lanes;
                acc.value[m][v] = V::add(acc.value[m][v], V::load(x));
            }
        }
    }
    MBV2_UNROLL for (int m = 0; m < Rows; ++m) {
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) V::store(out + v * out_plane + m * V::lanes, acc.value[m][v]);
    }
}

using TileFunction = void (*)(const Runs&, const float*, const float*, bool, float*, int64_t, const float*, int64_t);

template <class V, int Rows, int Vectors>
constexpr TileFunction kPointwiseTile = tile<V, Rows, Vectors, V::lanes, 1, 0>;

// Entry [rows - 1] for every number of rows that fits the registers.
template <class V, int Vectors, int... Less>
struct PointwiseTiles;
template <class V, int Vectors, int Rows, int... Less>
struct PointwiseTiles<V, Vectors, Rows, Less...> : PointwiseTiles<V, Vectors, Rows - 1, Rows, Less...> {};
template <class V, int Vectors, int... Less>
struct PointwiseTiles<V, Vectors, 0, Less...> {
    static constexpr TileFunction entries[] = {kPointwiseTile<V, Less, Vectors>...};
};

template <class V, int Vectors>
void pointwise_panel(const Runs& runs, const float* weights, const float* bias, bool relu6, int64_t rows, float* out,
                     int64_t out_plane, const float* residual, int64_t residual_plane) {
    constexpr int kMost = V::rows[Vectors - 1];
    // Tiles of nearly equal height: a last tile of one row would run at the latency of its additions.
    const int64_t count = ceil_div(rows, kMost), height = rows / count, higher = rows % count;
    Runs here = runs;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t m = height + (i < higher);
        PointwiseTiles<V, Vectors, kMost>::entries[m - 1](here, weights, bias, relu6, out, out_plane, residual,
                                                          residual_plane);
        here.base += m * V::lanes;
        out += m * V::lanes;
        if (residual != nullptr) residual += m * V::lanes;
    }
}

template <class V>
void pointwise(const Pointwise& conv, int64_t panel, const float* in, int64_t in_plane, int64_t rows, float* out,
               int64_t out_plane, const float* residual, int64_t residual_plane) {
    const int64_t inner = ceil_div(conv.inputs, V::lanes);
    const Runs runs = {in, 1, 0, inner, in_plane, V::lanes, conv.inputs - (inner - 1) * V::lanes};
    const float* weights = conv.weights + panel * 2 * V::lanes * conv.inputs;
    const float* bias = conv.bias + panel * 2 * V::lanes;
    switch (panel_vectors(conv.vectors, panel)) {
        case 1:
            return pointwise_panel<V, 1>(runs, weights, bias, conv.relu6, rows, out, out_plane, residual,
                                         residual_plane);
        case 2:
            return pointwise_panel<V, 2>(runs, weights, bias, conv.relu6, rows, out, out_plane, residual,
                                         residual_plane);
        default:
            return pointwise_panel<V, 3>(runs, weights, bias, conv.relu6, rows, out, out_plane, residual,
                                         residual_plane);
    }
}

// Pixels [first, last) whose three columns all lie inside the picture, straight from the picture's memory.
template <class V, int Vectors, int ColumnStride>
void stem_interior(const Runs& runs, const float* weights, const float* bias, int64_t first, int64_t last, float* out,
                   int64_t out_plane) {
    constexpr int kMost = V::rows[Vectors - 1], kStep = 2 * ColumnStride;
    const auto run = [&](TileFunction function, int64_t x) {
        Runs here = runs;
        here.base += (2 * x - 1) * ColumnStride;
        function(here, weights, bias, true, out + x * V::lanes, out_plane, nullptr, 0);
    };
    int64_t x = first;
    if (last - first >= kMost) {
        for (; x + kMost <= last; x += kMost) run(tile<V, kMost, Vectors, kStep, ColumnStride, 3>, x);
        // The last tile overlaps the one before it and writes the same values again.
        if (x < last) run(tile<V, kMost, Vectors, kStep, ColumnStride, 3>, last - kMost);
        return;
    }
    for (; x + 3 <= last; x += 3) run(tile<V, 3, Vectors, kStep, ColumnStride, 3>, x);
    for (; x < last; ++x) run(tile<V, 1, Vectors, kStep, ColumnStride, 3>, x);
}

template <class V, int Vectors>
void stem_panel(const Stem& stem, int64_t panel, int64_t row, float* out, int64_t out_plane) {
    const int64_t y = 2 * row - 1, top = y < 0 ? 1 : 0, bottom = y + 3 > stem.height ? stem.height - y : 3;
    const float* weights = stem.weights + (panel * 2 * 27 + top * 9 * Vectors) * V::lanes;
    const float* bias = stem.bias + panel * 2 * V::lanes;
    const float* rows = stem.image + (y + top) * stem.row_stride;
    const int64_t out_width = ceil_div(stem.width, 2), last = stem.width / 2;
    const Runs runs = {rows, bottom - top, stem.row_stride, 3, stem.channel_stride, 3, 3};
    if (last > 1) {
        const auto interior = stem.column_stride == 1 ? stem_interior<V, Vectors, 1> : stem_interior<V, Vectors, 3>;
        interior(runs, weights, bias, 1, last, out, out_plane);
    }
    // The first pixel, and with an odd width the last, from a copy with zeros beside the picture.
    for (int64_t x = 0; x < out_width; x += (last > 1 && x == 0) ? last : 1) {
        float patch[27];
        int64_t size = 0;
        for (int64_t r = 0; r < bottom - top; ++r) {
            for (int64_t c = 0; c < 3; ++c) {
                for (int64_t column = 2 * x - 1; column < 2 * x + 2; ++column) {
                    const bool inside = column >= 0 && column < stem.width;
                    const float* at = rows + r * stem.row_stride + c * stem.channel_stride;
                    patch[size++] = inside ? at[column * stem.column_stride] : 0.0f;
                }
            }
        }
        const Runs copy = {patch, 1, 0, 1, 0, size, size};
        kPointwiseTile<V, 1, Vectors>(copy, weights, bias, true, out + x * V::lanes, out_plane, nullptr, 0);
    }
}

template <class V>
void stem(const Stem& stem, int64_t panel, int64_t row, float* out, int64_t out_plane) {
    switch (panel_vectors(stem.vectors, panel)) {
        case 1:
            return stem_panel<V, 1>(stem, panel, row, out, out_plane);
        case 2:
            return stem_panel<V, 2>(stem, panel, row, out, out_plane);
        default:
            return stem_panel<V, 3>(stem, panel, row, out, out_plane);
    }
}

// Most outputs of one depthwise tile: rows of 7, 14, 28, 56 and 112 pixels divide into it.
constexpr int kDepthwiseTile = 7;

// `Count` neighbouring outputs; Left and Right say that the first and last lack their outer column.
template <class V, int Stride, int Count, bool Left, bool Right>
void depthwise_tile(const float* const rows[3], int64_t offset, const float* weights, float* out) {
    typename V::Type acc[Count];
    const typename V::Type bias = V::load(weights + 9 * V::lanes);
    MBV2_UNROLL for (int i = 0; i < Count; ++i) acc[i] = bias;
    for (int r = 0; r < 3; ++r) {
        if (rows[r] == nullptr) continue;
        const float* x = rows[r] + offset;
        const float* w = weights + 3 * r * V::lanes;
        const typename V::Type taps[3] = {V::load(w), V::load(w + V::lanes), V::load(w + 2 * V::lanes)};
        constexpr int kColumns = (Count - 1) * Stride + 3;
        MBV2_UNROLL for (int j = Left ? 1 : 0; j < (Right ? kColumns - 1 : kColumns); ++j) {
            const typename V::Type value = V::load(x + (j - 1) * V::lanes);
            MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                const int tap = j - i * Stride;
                if (tap >= 0 && tap < 3) acc[i] = V::fma(value, taps[tap], acc[i]);
            }
        }
    }
    MBV2_UNROLL for (int i = 0; i < Count; ++i) V::store(out + i * V::lanes, V::relu6(acc[i]));
}

using DepthwiseFunction = void (*)(const float* const[3], int64_t, const float*, float*);

// Entry [count - 1][left][right].
template <class V, int Stride>
struct DepthwiseTiles {
    template <int Count>
    struct At {
        static constexpr DepthwiseFunction entries[2][2] = {
            {depthwise_tile<V, Stride, Count, false, false>, depthwise_tile<V, Stride, Count, false, true>},
            {depthwise_tile<V, Stride, Count, true, false>, depthwise_tile<V, Stride, Count, true, true>}};
    };
    using Entries = const DepthwiseFunction (*)[2];
    static constexpr Entries entries[kDepthwiseTile] = {At<1>::entries, At<2>::entries, At<3>::entries, At<4>::entries,
                                                        At<5>::entries, At<6>::entries, At<7>::entries};
};

template <class V, int Stride>
void depthwise_row(const Depthwise& conv, const float* const rows[3], const float* weights, float* out) {
    const bool ragged = (conv.out_width - 1) * Stride + 1 == conv.width;
    const int64_t count = ceil_div(conv.out_width, kDepthwiseTile);
    const int64_t width = conv.out_width / count, wider = conv.out_width % count;
    int64_t x = 0;
    for (int64_t i = 0; i < count; ++i) {
        const int64_t n = width + (i < wider);
        const auto function = DepthwiseTiles<V, Stride>::entries[n - 1][i == 0][i + 1 == count && ragged];
        function(rows, x * Stride * V::lanes, weights, out + x * V::lanes);
        x += n;
    }
}

template <class V>
void depthwise(const Depthwise& conv, int64_t vector, const float* const rows[3], float* out) {
    const float* weights = conv.weights + vector * 10 * V::lanes;
    conv.stride == 1 ? depthwise_row<V, 1>(conv, rows, weights, out) : depthwise_row<V, 2>(conv, rows, weights, out);
}

template <class V>
void mean(const float* in, int64_t pixels, float* out) {
    typename V::Type sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
    int64_t i = 0;
    for (; i + 4 <= pixels; i += 4) {
        MBV2_UNROLL for (int j = 0; j < 4; ++j) sums[j] = V::add(sums[j], V::load(in + (i + j) * V::lanes));
    }
    for (; i < pixels; ++i) sums[0] = V::add(sums[0], V::load(in + i * V::lanes));
    const typename V::Type sum = V::add(V::add(sums[0], sums[1]), V::add(sums[2], sums[3]));
    V::store(out, V::scale(sum, 1.0f / static_cast<float>(pixels)));
}

template <class V>
void multiply_adds(int64_t steps, const float* in, float* out) {
    const typename V::Type a = V::load(in), b = V::load(in + V::lanes);
    typename V::Type sums[kPeakSums];
    MBV2_UNROLL for (int i = 0; i < kPeakSums; ++i) sums[i] = V::broadcast(in + i % V::lanes);
    for (int64_t s = 0; s < steps; ++s) {
        MBV2_UNROLL for (int i = 0; i < kPeakSums; ++i) sums[i] = V::fma(sums[i], a, b);
    }
    MBV2_UNROLL for (int i = 1; i < kPeakSums; ++i) sums[0] = V::add(sums[0], sums[i]);
    V::store(out, sums[0]);
}

template <class V>
constexpr Kernels kernels_of(const char* name) {
    return {name, V::lanes, pointwise<V>, stem<V>, depthwise<V>, mean<V>, multiply_adds<V>};
}

}  // namespace
}  // namespace mbv2::cpu
