// Tasks of the 3x3 depthwise convolution: a ring of rows, normalised once, with a column of zeros at either side.
#pragma once

#include "train_rows.h"

namespace mbv2::cpu::train {
namespace {

// Outputs of a strip that lie in registers beside three weights and an input.
constexpr int kStrip = 7;
// Inputs of a strip in the backward pass: nine sums of the weight's gradient stay in registers over it.
constexpr int64_t kBackwardStrip = 16;

// Rows of a picture around the one being worked on, [4 slots][1 + width + 2][padded channels], and a row of zeros.
struct Ring {
    float* memory;
    int64_t row, width, height, stride;

    Ring(float* scratch, int64_t height_, int64_t width_, int64_t channels)
        : memory(scratch), row((width_ + 3) * padded(channels)), width(width_), height(height_), stride(padded(channels)) {
        for (int64_t slot = 0; slot < 4; ++slot) {
            for (int64_t c = 0; c < stride; ++c) memory[slot * row + c] = 0;
            for (int64_t c = (width + 1) * stride; c < row; ++c) memory[slot * row + c] = 0;
        }
        for (int64_t c = 0; c < row; ++c) memory[3 * row + c] = 0;
    }
    static int64_t floats(int64_t width, int64_t channels) { return 4 * (width + 3) * padded(channels); }
    // Where the picture's row y begins, before its column of zeros; rows outside the picture are zeros.
    float* at(int64_t y) const { return memory + (y < 0 || y >= height ? 3 : y % 3) * row; }
    float* pixels(int64_t y) const { return memory + y % 3 * row + stride; }
};

// `Count` neighbouring outputs, for all channels; sums of (y - pivot) and of its square are added to s and q. Folded:
// relu6(y + pivot) instead, and no sums.
template <class V, class T, int Stride, int Count, bool Folded>
void depthwise_strip(const float* const rows[3], int64_t stride, const float* weights, int64_t channels, T* out,
                     const float* pivot, float* s, float* q) {
    for (int64_t c = 0; c < channels; c += V::lanes) {
        typename V::Type acc[Count];
        MBV2_UNROLL for (int i = 0; i < Count; ++i) acc[i] = V::zero();
        for (int r = 0; r < 3; ++r) {
            const float* x = rows[r] + c;
            const float* w = weights + 3 * r * stride + c;
            const typename V::Type taps[3] = {V::load(w), V::load(w + stride), V::load(w + 2 * stride)};
            MBV2_UNROLL for (int j = 0; j < (Count - 1) * Stride + 3; ++j) {
                const typename V::Type value = V::load(x + j * stride);
                MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                    const int tap = j - i * Stride;
                    if (tap >= 0 && tap < 3) acc[i] = V::fma(value, taps[tap], acc[i]);
                }
            }
        }
        const typename V::Type middle = V::load(pivot + c);
        if constexpr (Folded) {
            MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                store_n<V>(out + i * channels + c, V::relu6(V::add(acc[i], middle)), channels - c);
            }
            continue;
        }
        typename V::Type sum = V::load(s + c), square = V::load(q + c);
        MBV2_UNROLL for (int i = 0; i < Count; ++i) {
            const typename V::Type value = V::template round<T>(acc[i]);
            store_n<V>(out + i * channels + c, value, channels - c);
            const typename V::Type centred = V::sub(value, middle);
            sum = V::add(sum, centred);
            square = V::fma(centred, centred, square);
        }
        V::store(s + c, sum);
        V::store(q + c, square);
    }
}

template <class T>
using Strip = void (*)(const float* const[3], int64_t, const float*, int64_t, T*, const float*, float*, float*);

// Entry [outputs - 1].
template <class V, class T, int Stride, bool Folded>
constexpr Strip<T> kStrips[kStrip] = {
    depthwise_strip<V, T, Stride, 1, Folded>, depthwise_strip<V, T, Stride, 2, Folded>,
    depthwise_strip<V, T, Stride, 3, Folded>, depthwise_strip<V, T, Stride, 4, Folded>,
    depthwise_strip<V, T, Stride, 5, Folded>, depthwise_strip<V, T, Stride, 6, Folded>,
    depthwise_strip<V, T, Stride, 7, Folded>};

template <class V, class T>
const Strip<T>* strips_of(const DepthwiseForward<T>& conv) {
    if (conv.bias != nullptr) return conv.stride == 1 ? kStrips<V, T, 1, true> : kStrips<V, T, 2, true>;
    return conv.stride == 1 ? kStrips<V, T, 1, false> : kStrips<V, T, 2, false>;
}

template <class V, class T>
void depthwise(const DepthwiseForward<T>& conv, int64_t n, int64_t first, int64_t last, float* moments,
               float* scratch) {
    const int64_t channels = conv.channels, wide = padded(channels), width = conv.out_width;
    const Ring ring(scratch, conv.height, conv.width, channels);
    float *s = scratch + Ring::floats(conv.width, channels), *q = s + wide;
    const bool statistics = conv.bias == nullptr;
    float *mean = moments + wide, *m2 = mean + wide;
    if (statistics) {
        for (int64_t c = 0; c < wide; ++c) s[c] = q[c] = mean[c] = m2[c] = 0;
    }
    const float* pivot = statistics ? mean : conv.bias;
    const Strip<T>* const strip = strips_of<V>(conv);
    const int64_t strips = ceil_div(width, kStrip), narrow = width / strips, wider = width % strips;
    int64_t made = first * conv.stride - 1 < 0 ? 0 : first * conv.stride - 1, merged = 0, seen = 0;
    for (int64_t y = first; y < last; ++y) {
        const int64_t until = y * conv.stride + 2 < conv.height ? y * conv.stride + 2 : conv.height;
        for (; made < until; ++made) {
            activate<V>(conv.x + (n * conv.height + made) * conv.width * channels, conv.bn, conv.width, channels,
                        ring.pixels(made), ring.stride);
        }
        const float* rows[3];
        for (int64_t r = 0; r < 3; ++r) rows[r] = ring.at(y * conv.stride + r - 1);
        T* out = conv.y + (n * conv.out_height + y) * width * channels;
        for (int64_t i = 0; i < strips; ++i) {
            const int64_t count = narrow + (i < wider);
            if (statistics && seen == 0) {
                // The first pixel becomes the pivot.
                strip[0](rows, ring.stride, conv.weights, channels, out, mean, s, q);
                for (int64_t c = 0; c < channels; ++c) {
                    mean[c] = s[c];
                    s[c] = q[c] = 0;
                }
            }
            strip[count - 1](rows, ring.stride, conv.weights, channels, out, pivot, s, q);
            for (int64_t r = 0; r < 3; ++r) rows[r] += count * conv.stride * ring.stride;
            out += count * channels;
            seen += count;
        }
        if (statistics && (seen - merged >= 64 || y + 1 == last)) {
            for (int64_t c = 0; c < channels; c += V::lanes) {
                merge<V>(V::load(mean + c), V::load(s + c), V::load(q + c), merged, seen - merged, mean + c, m2 + c);
                V::store(s + c, V::zero());
                V::store(q + c, V::zero());
            }
            merged = seen;
        }
    }
    for (int64_t c = 0; statistics && c < wide; ++c) moments[c] = static_cast<float>(seen);
}

// One vector of channels on its way through a strip of the backward pass: what stays in registers over the strip.
template <class V>
struct Gradient {
    typename V::Type weight[9], dz, centred;
    typename V::Type mean, scale, shift;

    Gradient(const float* bn, const float* dweight, const float* sums, int64_t c, int64_t wide) {
        MBV2_UNROLL for (int t = 0; t < 9; ++t) weight[t] = V::load(dweight + t * wide + c);
        dz = V::load(sums + c);
        centred = V::load(sums + wide + c);
        mean = bn != nullptr ? V::load(bn + kMean * wide + c) : V::zero();
        scale = bn != nullptr ? V::load(bn + kScale * wide + c) : V::zero();
        shift = bn != nullptr ? V::load(bn + kShift * wide + c) : V::zero();
    }
    void store(float* dweight, float* sums, int64_t c, int64_t wide) const {
        MBV2_UNROLL for (int t = 0; t < 9; ++t) V::store(dweight + t * wide + c, weight[t]);
        V::store(sums + c, dz);
        V::store(sums + wide + c, centred);
    }
};

// The taps (row * 3 + column) that lead from an input to outputs; input q and output p: q = p * stride + tap - 1.
template <class V, int... Taps>
struct From {
    // da = sum of weight * dy, and dweight += a * dy, over the taps; dy of tap t is at dy[Offset(t)].
    template <class Where>
    static inline __attribute__((always_inline)) typename V::Type gather(Gradient<V>& g, typename V::Type a,
                                                                         const float* weights, int64_t wide,
                                                                         const Where& where) {
        typename V::Type da = V::zero();
        const auto tap = [&](int t) __attribute__((always_inline)) {
            const typename V::Type dy = V::load(where(t));
            da = V::fma(dy, V::load(weights + t * wide), da);
            g.weight[t] = V::fma(a, dy, g.weight[t]);
        };
        (tap(Taps), ...);
        return da;
    }
};

// One input position: its activation from y1, its gradient through `Taps`, masked, summed, stored.
template <class V, class T, bool Normalised, class Taps, class Where>
inline __attribute__((always_inline)) void position(Gradient<V>& g, const T* y1, const float* weights, int64_t wide,
                                                    const Where& where, int64_t n, T* dz1) {
    const typename V::Type value = load_n<V>(y1, n);
    if constexpr (Normalised) {
        const typename V::Type z = V::fma(value, g.scale, g.shift);
        const typename V::Type da = Taps::gather(g, V::relu6(z), weights, wide, where);
        const typename V::Type dz = V::template round<T>(V::inside(da, z));
        store_n<V>(dz1, dz, n);
        g.dz = V::add(g.dz, dz);
        g.centred = V::fma(dz, V::sub(value, g.mean), g.centred);
    } else {
        store_n<V>(dz1, Taps::gather(g, value, weights, wide, where), n);
    }
}

// Inputs [x, x + count) of row y, stride 1. rows: dy2's rows y - 1, y, y + 1, at the column before x.
template <class V, class T, bool Normalised>
void strip_backward_1(const DepthwiseBackward<T>& conv, const float* const rows[3], const T* y1, T* dz1, int64_t count,
                      float* sums, float* dweight) {
    const int64_t channels = conv.channels, wide = padded(channels);
    for (int64_t c = 0; c < channels; c += V::lanes) {
        Gradient<V> g(conv.bn1, dweight, sums, c, wide);
        for (int64_t i = 0; i < count; ++i) {
            const float *above = rows[0] + i * wide + c, *here = rows[1] + i * wide + c, *below = rows[2] + i * wide + c;
            const auto where = [&](int t) {
                return (t / 3 == 0 ? below : t / 3 == 1 ? here : above) + (2 - t % 3) * wide;
            };
            position<V, T, Normalised, From<V, 0, 1, 2, 3, 4, 5, 6, 7, 8>>(g, y1 + i * channels + c, conv.weights + c,
                                                                           wide, where, channels - c,
                                                                           dz1 + i * channels + c);
        }
        g.store(dweight, sums, c, wide);
    }
}

// Inputs of columns [2 x, 2 x + count) and of two rows (or one, where the picture ends), stride 2: in each quad the
// four inputs are reached by 1, 2, 2 and 4 taps. rows: dy2's rows at the row pair and after it, at column x.
template <class V, class T, bool Normalised>
void strip_backward_2(const DepthwiseBackward<T>& conv, const float* const rows[2], const T* y1, T* dz1, int64_t count,
                      bool both, float* sums, float* dweight) {
    const int64_t channels = conv.channels, wide = padded(channels), line = conv.width * channels;
    for (int64_t c = 0; c < channels; c += V::lanes) {
        Gradient<V> g(conv.bn1, dweight, sums, c, wide);
        const float* w = conv.weights + c;
        const int64_t n = channels - c;
        for (int64_t i = 0; i < count; i += 2) {
            const float *here = rows[0] + i / 2 * wide + c, *next = rows[1] + i / 2 * wide + c;
            // Tap row 0 leads to the output row after the pair, 1 and 2 to the pair's own; columns likewise.
            const auto where = [&](int t) { return (t / 3 == 0 ? next : here) + (t % 3 == 0 ? wide : 0); };
            const T* from = y1 + i * channels + c;
            T* to = dz1 + i * channels + c;
            const bool pair = i + 1 < count;
            position<V, T, Normalised, From<V, 4>>(g, from, w, wide, where, n, to);
            if (pair) position<V, T, Normalised, From<V, 3, 5>>(g, from + channels, w, wide, where, n, to + channels);
            if (!both) continue;
            position<V, T, Normalised, From<V, 1, 7>>(g, from + line, w, wide, where, n, to + line);
            if (pair) {
                position<V, T, Normalised, From<V, 0, 2, 6, 8>>(g, from + line + channels, w, wide, where, n,
                                                                to + line + channels);
            }
        }
        g.store(dweight, sums, c, wide);
    }
}

template <class V, class T>
void depthwise_backward(const DepthwiseBackward<T>& conv, int64_t n, int64_t first, int64_t last, float* sums,
                        float* dweight, float* scratch) {
    const int64_t channels = conv.channels, wide = padded(channels);
    const Ring ring(scratch, conv.out_height, conv.out_width, channels);
    for (int64_t c = 0; c < 2 * wide; ++c) sums[c] = 0;
    for (int64_t c = 0; c < 9 * wide; ++c) dweight[c] = 0;
    int64_t made = conv.stride == 1 ? (first > 0 ? first - 1 : 0) : first / 2;
    const int64_t step = conv.stride;
    for (int64_t y = first; y < last; y += step) {
        const int64_t wanted = y / step + 2, until = wanted < conv.out_height ? wanted : conv.out_height;
        for (; made < until; ++made) {
            const int64_t at = (n * conv.out_height + made) * conv.out_width * channels;
            affine<V, T>(conv.dz2 + at, conv.y2 + at, conv.coef2, nullptr, conv.out_width, channels, 0, channels,
                         ring.pixels(made), ring.stride);
        }
        for (int64_t x = 0; x < conv.width; x += kBackwardStrip) {
            const int64_t count = conv.width - x < kBackwardStrip ? conv.width - x : kBackwardStrip;
            const int64_t at = ((n * conv.height + y) * conv.width + x) * channels;
            const T* y1 = conv.y1 + at;
            T* dz1 = conv.dz1 + at;
            if (step == 1) {
                const float* rows[3];
                for (int64_t r = 0; r < 3; ++r) rows[r] = ring.at(y + r - 1) + x * wide;
                const auto strip = conv.bn1 ? strip_backward_1<V, T, true> : strip_backward_1<V, T, false>;
                strip(conv, rows, y1, dz1, count, sums, dweight);
            } else {
                const float* rows[2];
                for (int64_t r = 0; r < 2; ++r) rows[r] = ring.at(y / 2 + r) + (x / 2 + 1) * wide;
                const auto strip = conv.bn1 ? strip_backward_2<V, T, true> : strip_backward_2<V, T, false>;
                strip(conv, rows, y1, dz1, count, y + 1 < last, sums, dweight);
            }
        }
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
