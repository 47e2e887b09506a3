// Tasks of the 3x3 depthwise convolution: a ring of rows, normalised once, with a column of zeros at either side.
#pragma once

#include "train_rows.h"

namespace mbv2::cpu::train {
namespace {

// Outputs of a strip that lie in registers beside three weights and an input.
constexpr int kStrip = 7;
// Inputs of a strip in the backward pass: nine sums of the weight's gradient stay in registers over it.
constexpr int64_t kBackwardStrip = 16;

// Rows of a picture around the one being worked on, [3 slots and a row of zeros][vectors][1 + width + 2][lanes]: the
// columns of a vector of channels lie side by side, so that a strip's addresses are one register and constants.
template <class V>
struct Ring {
    float* memory;
    int64_t height, plane, row;

    Ring(float* scratch, int64_t height_, int64_t width, int64_t channels)
        : memory(scratch), height(height_), plane((width + 3) * V::lanes), row(ceil_div(channels, V::lanes) * plane) {
        for (int64_t at = 0; at < 3 * row; at += plane) {
            for (int64_t i = 0; i < V::lanes; ++i) memory[at + i] = 0;
            for (int64_t i = (width + 1) * V::lanes; i < plane; ++i) memory[at + i] = 0;
        }
        for (int64_t i = 3 * row; i < 4 * row; ++i) memory[i] = 0;
    }
    // Where the picture's row y begins, before its column of zeros; rows outside the picture are zeros.
    float* at(int64_t y) const { return memory + (y < 0 || y >= height ? 3 : y % 3) * row; }
    float* pixels(int64_t y) const { return memory + y % 3 * row + V::lanes; }
};

// What the strips fetch meanwhile: memory of the next strip, and the row that enters the ring next.
struct Coming {
    Ahead strip, row;

    void fetch() {
        strip.fetch();
        row.fetch();
    }
};

// `Count` neighbouring outputs, for all channels; sums of (y - pivot) and of its square are added to s and q. Folded:
// relu6(y + pivot) instead, and no sums.
template <class V, class T, int Stride, int Count, bool Folded>
void depthwise_strip(const float* const rows[3], int64_t plane, const float* weights, int64_t channels, T* out,
                     const float* pivot, float* s, float* q, Coming& coming) {
    const float *above = rows[0], *here = rows[1], *below = rows[2];
    for (int64_t c = 0; c < channels; c += V::lanes, above += plane, here += plane, below += plane) {
        typename V::Type acc[Count];
        MBV2_UNROLL for (int i = 0; i < Count; ++i) acc[i] = V::zero();
        coming.fetch();
        const auto add_row = [&](const float* x, const float* w) __attribute__((always_inline)) {
            const typename V::Type taps[3] = {V::load(w), V::load(w + V::lanes), V::load(w + 2 * V::lanes)};
            MBV2_UNROLL for (int j = 0; j < (Count - 1) * Stride + 3; ++j) {
                const typename V::Type value = V::load(x + j * V::lanes);
                MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                    const int tap = j - i * Stride;
                    if (tap >= 0 && tap < 3) acc[i] = V::fma(value, taps[tap], acc[i]);
                }
            }
        };
        add_row(above, weights);
        add_row(here, weights + 3 * V::lanes);
        add_row(below, weights + 6 * V::lanes);
        weights += 9 * V::lanes;
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
using Strip = void (*)(const float* const[3], int64_t, const float*, int64_t, T*, const float*, float*, float*,
                       Coming&);

// `count` values, whole cache lines, past the caches.
template <class V, class T>
void stream_out(const T* from, int64_t count, T* to) {
    for (int64_t i = 0; i < count; i += V::lanes) V::stream(to + i, V::load(from + i));
}

template <class T>
bool whole_lines(const T* to, int64_t channels) {
    return channels * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(to) % 64 == 0;
}

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
    const Ring<V> ring(scratch, conv.height, conv.width, channels);
    float *s = scratch + 4 * ring.row, *q = s + wide;
    const bool statistics = conv.bias == nullptr;
    float *mean = moments + wide, *m2 = mean + wide;
    if (statistics) {
        for (int64_t c = 0; c < wide; ++c) s[c] = q[c] = mean[c] = m2[c] = 0;
    }
    const float* pivot = statistics ? mean : conv.bias;
    const Strip<T>* const strip = strips_of<V>(conv);
    // A strip's outputs are complete lines only when its last channel is done.
    const bool stream = conv.stream && whole_lines(conv.y, channels);
    T* const held = reinterpret_cast<T*>(q + wide);
    const int64_t strips = ceil_div(width, kStrip), narrow = width / strips, wider = width % strips;
    int64_t made = first * conv.stride - 1 < 0 ? 0 : first * conv.stride - 1, merged = 0, seen = 0;
    for (int64_t y = first; y < last; ++y) {
        const int64_t until = y * conv.stride + 2 < conv.height ? y * conv.stride + 2 : conv.height;
        for (; made < until; ++made) {
            activate<V>(conv.x + (n * conv.height + made) * conv.width * channels, conv.bn, conv.width, channels,
                        ring.pixels(made), V::lanes, ring.plane);
        }
        Coming none, coming;
        const int64_t more = least(conv.stride, conv.height - made), row = conv.width * channels;
        coming.row = {conv.x + (n * conv.height + made) * row, more * row, strips * ceil_div(channels, V::lanes)};
        const float* rows[3];
        for (int64_t r = 0; r < 3; ++r) rows[r] = ring.at(y * conv.stride + r - 1);
        T* out = conv.y + (n * conv.out_height + y) * width * channels;
        for (int64_t i = 0; i < strips; ++i) {
            const int64_t count = narrow + (i < wider);
            if (!stream) coming.strip = {out + count * channels, 1, count * channels, 0, ceil_div(channels, V::lanes)};
            if (statistics && seen == 0) {
                // The first pixel becomes the pivot.
                strip[0](rows, ring.plane, conv.weights, channels, out, mean, s, q, none);
                for (int64_t c = 0; c < channels; ++c) {
                    mean[c] = s[c];
                    s[c] = q[c] = 0;
                }
            }
            strip[count - 1](rows, ring.plane, conv.weights, channels, stream ? held : out, pivot, s, q, coming);
            if (stream) stream_out<V>(held, count * channels, out);
            for (int64_t r = 0; r < 3; ++r) rows[r] += count * conv.stride * V::lanes;
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
    if (stream) V::fence();
    for (int64_t c = 0; statistics && c < wide; ++c) moments[c] = static_cast<float>(seen);
}

// A vector of channels of one row in the backward pass: parameters, and the part's sums, which are added to.
template <class V, class T>
struct Lane {
    int64_t channels, n;  // n: of the channels, those from this vector on
    const float *weights, *mean, *scale, *shift;
    float *dweight, *dz_sum, *centred_sum;

    Lane(const DepthwiseBackward<T>& conv, int64_t c, float* sums, float* dweight_)
        : channels(conv.channels), n(conv.channels - c), weights(conv.weights + 9 * c), dweight(dweight_ + 9 * c) {
        const int64_t wide = padded(channels);
        mean = conv.bn1 + kMean * wide + c;
        scale = conv.bn1 + kScale * wide + c;
        shift = conv.bn1 + kShift * wide + c;
        dz_sum = sums + c;
        centred_sum = sums + wide + c;
    }
};

// `Count` neighbouring inputs, stride 1: each value of dy2 is loaded once and goes into all their gradients and into
// the weight's. rows: dy2's rows y - 1, y, y + 1, from the column before the first input.
template <class V, class T, bool Normalised, int Count>
inline __attribute__((always_inline)) void inputs_backward_1(const Lane<V, T>& lane, const float* above,
                                                             const float* here, const float* below, const T* y1,
                                                             T* dz1) {
    const auto normalised = [&](int i) __attribute__((always_inline)) {
        return V::fma(load_n<V>(y1 + i * lane.channels, lane.n), V::load(lane.scale), V::load(lane.shift));
    };
    typename V::Type a[Count], da[Count];
    MBV2_UNROLL for (int i = 0; i < Count; ++i) {
        a[i] = Normalised ? V::relu6(normalised(i)) : load_n<V>(y1 + i * lane.channels, lane.n);
        da[i] = V::zero();
    }
    const auto add_row = [&](const float* dy2, int r) __attribute__((always_inline)) {
        const float* w = lane.weights + 3 * r * V::lanes;
        float* sum = lane.dweight + 3 * r * V::lanes;
        const typename V::Type taps[3] = {V::load(w), V::load(w + V::lanes), V::load(w + 2 * V::lanes)};
        typename V::Type into[3] = {V::load(sum), V::load(sum + V::lanes), V::load(sum + 2 * V::lanes)};
        MBV2_UNROLL for (int j = 0; j < Count + 2; ++j) {
            const typename V::Type dy = V::load(dy2 + j * V::lanes);
            MBV2_UNROLL for (int i = 0; i < Count; ++i) {
                const int tap = 2 + i - j;
                if (tap < 0 || tap > 2) continue;
                da[i] = V::fma(dy, taps[tap], da[i]);
                into[tap] = V::fma(a[i], dy, into[tap]);
            }
        }
        MBV2_UNROLL for (int t = 0; t < 3; ++t) V::store(sum + t * V::lanes, into[t]);
    };
    // Kernel row 0 leads to the output row below.
    add_row(below, 0);
    add_row(here, 1);
    add_row(above, 2);
    if constexpr (!Normalised) {
        MBV2_UNROLL for (int i = 0; i < Count; ++i) store_n<V>(dz1 + i * lane.channels, da[i], lane.n);
        return;
    }
    const typename V::Type mean = V::load(lane.mean);
    typename V::Type total = V::load(lane.dz_sum), centred = V::load(lane.centred_sum);
    MBV2_UNROLL for (int i = 0; i < Count; ++i) {
        const typename V::Type value = load_n<V>(y1 + i * lane.channels, lane.n);
        const typename V::Type dz = V::template round<T>(V::inside(da[i], normalised(i)));
        store_n<V>(dz1 + i * lane.channels, dz, lane.n);
        total = V::add(total, dz);
        centred = V::fma(dz, V::sub(value, mean), centred);
    }
    V::store(lane.dz_sum, total);
    V::store(lane.centred_sum, centred);
}

// Inputs [x, x + count) of row y, stride 1. rows: dy2's rows y - 1, y, y + 1, at the column before x.
template <class V, class T, bool Normalised>
void strip_backward_1(const DepthwiseBackward<T>& conv, const float* const rows[3], int64_t plane, const T* y1, T* dz1,
                      int64_t count, float* sums, float* dweight, Coming& coming) {
    const int64_t channels = conv.channels;
    for (int64_t c = 0; c < channels; c += V::lanes) {
        const Lane<V, T> lane(conv, c, sums, dweight);
        coming.fetch();
        const int64_t at = c / V::lanes * plane;
        const float *above = rows[0] + at, *here = rows[1] + at, *below = rows[2] + at;
        const T* from = y1 + c;
        T* to = dz1 + c;
        int64_t left = count;
        const auto go = [&]<int Count>() __attribute__((always_inline)) {
            inputs_backward_1<V, T, Normalised, Count>(lane, above, here, below, from, to);
            above += Count * V::lanes;
            here += Count * V::lanes;
            below += Count * V::lanes;
            from += Count * channels;
            to += Count * channels;
            left -= Count;
        };
        while (left >= 4) go.template operator()<4>();
        if (left >= 2) go.template operator()<2>();
        if (left == 1) go.template operator()<1>();
    }
}

// One input position, stride 2, reached by the taps (kernel row * 3 + column) `Taps`; dy2 of tap t is at where(t).
// The weight's gradient of all nine taps is in `into`.
template <class V, class T, bool Normalised, int... Taps, class Where>
inline __attribute__((always_inline)) void input_backward_2(const Lane<V, T>& lane, typename V::Type (&into)[9],
                                                            typename V::Type& total, typename V::Type& centred,
                                                            const T* y1, const Where& where, T* dz1) {
    const typename V::Type value = load_n<V>(y1, lane.n);
    const typename V::Type z = Normalised ? V::fma(value, V::load(lane.scale), V::load(lane.shift)) : value;
    const typename V::Type a = Normalised ? V::relu6(z) : value;
    typename V::Type da = V::zero();
    const auto tap = [&](int t) __attribute__((always_inline)) {
        const typename V::Type dy = V::load(where(t));
        da = V::fma(dy, V::load(lane.weights + t * V::lanes), da);
        into[t] = V::fma(a, dy, into[t]);
    };
    (tap(Taps), ...);
    if constexpr (Normalised) {
        da = V::template round<T>(V::inside(da, z));
        total = V::add(total, da);
        centred = V::fma(da, V::sub(value, V::load(lane.mean)), centred);
    }
    store_n<V>(dz1, da, lane.n);
}

// Inputs of columns [2 x, 2 x + count) and of two rows (or one, where the picture ends), stride 2: in each quad the
// four inputs are reached by 1, 2, 2 and 4 taps. rows: dy2's rows at the row pair and after it, at column x. The
// second row of dz1 is `to_line` after the first.
template <class V, class T, bool Normalised>
void strip_backward_2(const DepthwiseBackward<T>& conv, const float* const rows[2], int64_t plane, const T* y1, T* dz1,
                      int64_t to_line, int64_t count, bool both, float* sums, float* dweight, Coming& coming) {
    const int64_t channels = conv.channels, line = conv.width * channels;
    for (int64_t c = 0; c < channels; c += V::lanes) {
        const Lane<V, T> lane(conv, c, sums, dweight);
        coming.fetch();
        typename V::Type into[9], total = V::load(lane.dz_sum), centred = V::load(lane.centred_sum);
        MBV2_UNROLL for (int t = 0; t < 9; ++t) into[t] = V::load(lane.dweight + t * V::lanes);
        const float *here = rows[0] + c / V::lanes * plane, *next = rows[1] + c / V::lanes * plane;
        for (int64_t i = 0; i < count; i += 2, here += V::lanes, next += V::lanes) {
            // Kernel row 0 leads to the output row after the pair, 1 and 2 to the pair's own; columns likewise.
            const auto where = [&](int t) __attribute__((always_inline)) {
                return (t / 3 == 0 ? next : here) + (t % 3 == 0 ? V::lanes : 0);
            };
            const T* from = y1 + i * channels + c;
            T* to = dz1 + i * channels + c;
            const bool pair = i + 1 < count;
            input_backward_2<V, T, Normalised, 4>(lane, into, total, centred, from, where, to);
            if (pair) {
                input_backward_2<V, T, Normalised, 3, 5>(lane, into, total, centred, from + channels, where,
                                                         to + channels);
            }
            if (!both) continue;
            input_backward_2<V, T, Normalised, 1, 7>(lane, into, total, centred, from + line, where, to + to_line);
            if (pair) {
                input_backward_2<V, T, Normalised, 0, 2, 6, 8>(lane, into, total, centred, from + line + channels,
                                                               where, to + to_line + channels);
            }
        }
        MBV2_UNROLL for (int t = 0; t < 9; ++t) V::store(lane.dweight + t * V::lanes, into[t]);
        V::store(lane.dz_sum, total);
        V::store(lane.centred_sum, centred);
    }
}

template <class V, class T>
void depthwise_backward(const DepthwiseBackward<T>& conv, int64_t n, int64_t first, int64_t last, float* sums,
                        float* dweight, float* scratch) {
    const int64_t channels = conv.channels, wide = padded(channels);
    const Ring<V> ring(scratch, conv.out_height, conv.out_width, channels);
    for (int64_t c = 0; c < 2 * wide; ++c) sums[c] = 0;
    for (int64_t c = 0; c < 9 * wide; ++c) dweight[c] = 0;
    int64_t made = conv.stride == 1 ? (first > 0 ? first - 1 : 0) : first / 2;
    const int64_t step = conv.stride, line = conv.width * channels;
    const bool stream = conv.stream && whole_lines(conv.dz1, channels);
    T* const held = reinterpret_cast<T*>(scratch + 4 * ring.row);
    for (int64_t y = first; y < last; y += step) {
        const int64_t wanted = y / step + 2, until = wanted < conv.out_height ? wanted : conv.out_height;
        for (; made < until; ++made) {
            const int64_t at = (n * conv.out_height + made) * conv.out_width * channels;
            affine<V, T>(conv.dz2 + at, conv.y2 + at, conv.coef2, nullptr, conv.out_width, channels, 0, channels,
                         ring.pixels(made), V::lanes, ring.plane);
        }
        Coming coming;
        const int64_t row = conv.out_width * channels, entering = (n * conv.out_height + made) * row;
        coming.row = {conv.dz2 + entering,
                      conv.y2 + entering,
                      made < conv.out_height ? 1 : 0,
                      row,
                      row,
                      ceil_div(conv.width, kBackwardStrip) * ceil_div(channels, V::lanes)};
        for (int64_t x = 0; x < conv.width; x += kBackwardStrip) {
            const int64_t count = conv.width - x < kBackwardStrip ? conv.width - x : kBackwardStrip;
            const int64_t at = ((n * conv.height + y) * conv.width + x) * channels;
            const T* y1 = conv.y1 + at;
            T *dz1 = conv.dz1 + at, *to = stream ? held : dz1;
            const bool both = step == 2 && y + 1 < last;
            const int64_t to_line = (stream ? kBackwardStrip : conv.width) * channels;
            // The next strip, at the end of a line that of the next: no hardware follows columns of channels.
            const T* next = x + count < conv.width ? y1 + count * channels : y1 - x * channels + step * line;
            coming.strip = {next,         stream ? nullptr : conv.dz1 + (next - conv.y1),
                            both ? 2 : 1, count * channels,
                            line,         ceil_div(channels, V::lanes)};
            if (step == 1) {
                const float* rows[3];
                for (int64_t r = 0; r < 3; ++r) rows[r] = ring.at(y + r - 1) + x * V::lanes;
                const auto strip = conv.bn1 ? strip_backward_1<V, T, true> : strip_backward_1<V, T, false>;
                strip(conv, rows, ring.plane, y1, to, count, sums, dweight, coming);
            } else {
                const float* rows[2];
                for (int64_t r = 0; r < 2; ++r) rows[r] = ring.at(y / 2 + r) + (x / 2 + 1) * V::lanes;
                const auto strip = conv.bn1 ? strip_backward_2<V, T, true> : strip_backward_2<V, T, false>;
                strip(conv, rows, ring.plane, y1, to, to_line, count, both, sums, dweight, coming);
            }
            if (!stream) continue;
            stream_out<V>(held, count * channels, dz1);
            if (both) stream_out<V>(held + to_line, count * channels, dz1 + conv.width * channels);
        }
    }
    if (stream) V::fence();
}

}  // namespace
}  // namespace mbv2::cpu::train
