// Rows of channels on their way in and out of the matrix kernels: normalised, patched, masked, with statistics.
#pragma once

#include "train_gemm.h"

namespace mbv2::cpu::train {
namespace {

enum Row { kMean = 0, kScale = 3, kShift = 4 };

template <class V, class T>
inline typename V::Type load_n(const T* p, int64_t n) {
    return n >= V::lanes ? V::load(p) : V::load_part(p, n);
}
template <class V, class T>
inline void store_n(T* p, typename V::Type x, int64_t n) {
    n >= V::lanes ? V::store(p, x) : V::store_part(p, x, n);
}

// relu6(bn(x)), or x as it is where bn is null, of `rows` rows -> tile; the tile's rows are `stride` apart, the vectors
// of a row `next`.
template <class V, class T>
void activate(const T* x, const float* bn, int64_t rows, int64_t channels, float* tile, int64_t stride,
              int64_t next = V::lanes) {
    const int64_t wide = padded(channels);
    for (int64_t r = 0; r < rows; ++r, x += channels, tile += stride) {
        float* to = tile;
        for (int64_t c = 0; c < channels; c += V::lanes, to += next) {
            typename V::Type value = load_n<V>(x + c, channels - c);
            if (bn != nullptr) {
                value = V::relu6(V::fma(value, V::load(bn + kScale * wide + c), V::load(bn + kShift * wide + c)));
            }
            V::store(to, value);
        }
    }
}

// A * dz + B * y + C of channels [begin, end) -> tile; dz masked by ReLU6 of bn(y) where bn is given.
template <class V, class T>
void affine(const T* dz, const T* y, const float* coef, const float* bn, int64_t rows, int64_t channels, int64_t begin,
            int64_t end, float* tile, int64_t stride, int64_t next = V::lanes) {
    const int64_t wide = padded(channels);
    const float *a = coef, *b = coef + wide, *c = coef + 2 * wide;
    for (int64_t r = 0; r < rows; ++r, dz += channels, y += channels, tile += stride) {
        float* to = tile;
        for (int64_t i = begin; i < end; i += V::lanes, to += next) {
            const typename V::Type value = load_n<V>(y + i, channels - i);
            typename V::Type grad = load_n<V>(dz + i, channels - i);
            if (bn != nullptr) {
                const float *scale = bn + kScale * wide + i, *shift = bn + kShift * wide + i;
                grad = V::inside(grad, V::fma(value, V::load(scale), V::load(shift)));
            }
            V::store(to, V::fma(V::load(a + i), grad, V::fma(V::load(b + i), value, V::load(c + i))));
        }
    }
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    return __builtin_bit_cast(float, bits);
}

// Patches [first, first + rows) of a batch of pictures -> tile.
template <class T>
void gather(const Patches<T>& p, int64_t first, int64_t rows, float* tile, int64_t stride) {
    const int64_t run = 3 * p.channels;
    int64_t x = first % p.out_width, y = first / p.out_width % p.out_height, n = first / (p.out_width * p.out_height);
    for (int64_t r = 0; r < rows; ++r, tile += stride) {
        const int64_t column = x * p.stride - 1;
        const T* at = p.image + ((n * p.height + y * p.stride - 1) * p.width + column) * p.channels;
        for (int64_t i = 0; i < 3; ++i, at += p.width * p.channels) {
            const int64_t row = y * p.stride + i - 1;
            float* to = tile + i * run;
            const bool above = row < 0 || row >= p.height;
            if constexpr (sizeof(T) == sizeof(float)) {
                // Pictures of three colours, but at their edges: a constant size is a few moves.
                if (run == 9 && !above && column >= 0 && column + 3 <= p.width) {
                    __builtin_memcpy(to, at, 9 * sizeof(float));
                    continue;
                }
            }
            const int64_t from = above || column >= 0 ? 0 : p.channels;
            const int64_t inside = (p.width - column) * p.channels, until = above ? 0 : inside < run ? inside : run;
            int64_t c = 0;
            for (; c < from; ++c) to[c] = 0;
            for (; c < until; ++c) to[c] = to_float(at[c]);
            for (; c < run; ++c) to[c] = 0;
        }
        if (++x < p.out_width) continue;
        x = 0;
        if (++y < p.out_height) continue;
        y = 0;
        ++n;
    }
}

// A tile's rows as panels [panel][rows][vectors * lanes], zeros beyond the columns.
template <class V>
void to_panels(const float* tile, int64_t stride, int64_t rows, int64_t columns, float* panels) {
    const int64_t vectors = ceil_div(columns, V::lanes);
    for (int64_t p = 0; p < train::panels(vectors); ++p) {
        const int64_t count = panel_vectors(vectors, p);
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t v = 0; v < count; ++v, panels += V::lanes) {
                const int64_t column = (2 * p + v) * V::lanes;
                V::store(panels, load_n<V>(tile + r * stride + column, columns - column));
            }
        }
    }
}

// Adds a run of `rows` values of which (value - pivot) sums to s, its square to q, to (before, mean, m2), where pivot
// is mean, or anything near it if `before` is 0: Chan's formula.
template <class V>
inline void merge(typename V::Type pivot, typename V::Type s, typename V::Type q, int64_t before, int64_t rows,
                  float* mean, float* m2) {
    const float n = static_cast<float>(rows), total = static_cast<float>(before + rows);
    const typename V::Type delta = V::mul(s, V::set(1.0f / n));
    const typename V::Type own = V::sub(q, V::mul(delta, s));
    V::store(mean, V::fma(delta, V::set(n / total), pivot));
    const typename V::Type more = V::mul(V::mul(delta, delta), V::set(static_cast<float>(before) * n / total));
    V::store(m2, before > 0 ? V::add(V::load(m2), V::add(own, more)) : own);
}

// One vector of a product's panel on its way to y, and its sums of (y - pivot) and of its square.
template <class V, class T>
struct Column {
    const float* from;
    T* to;
    int64_t n;
    float *mean, *m2;
    typename V::Type pivot, s, q;

    Column(const float* panel, T* y, int64_t left, float* moments, int64_t wide, int64_t before)
        : from(panel), to(y), n(left), mean(moments + wide), m2(mean + wide), s(V::zero()), q(V::zero()) {
        pivot = before > 0 ? V::load(mean) : V::template round<T>(V::load(from));
    }
    template <bool Stream>
    inline __attribute__((always_inline)) void take(int64_t offset, int64_t at) {
        const typename V::Type value = V::template round<T>(V::load(from + offset));
        if constexpr (Stream) {
            V::stream(to + at, value);
        } else {
            store_n<V>(to + at, value, n);
        }
        const typename V::Type centred = V::sub(value, pivot);
        s = V::add(s, centred);
        q = V::fma(centred, centred, q);
    }
};

template <class V, class T, bool Stream, int Vectors>
void emit_columns(const float* panel, int64_t width, int64_t rows, int64_t channels, int64_t left, T* y, float* moments,
                  int64_t wide, int64_t before) {
    if constexpr (Vectors == 1) {
        Column<V, T> one(panel, y, left, moments, wide, before);
        for (int64_t r = 0; r < rows; ++r) one.template take<Stream>(r * width, r * channels);
        merge<V>(one.pivot, one.s, one.q, before, rows, one.mean, one.m2);
    } else {
        Column<V, T> one(panel, y, left, moments, wide, before);
        Column<V, T> two(panel + V::lanes, y + V::lanes, left - V::lanes, moments + V::lanes, wide, before);
        for (int64_t r = 0; r < rows; ++r) {
            one.template take<Stream>(r * width, r * channels);
            two.template take<Stream>(r * width, r * channels);
        }
        merge<V>(one.pivot, one.s, one.q, before, rows, one.mean, one.m2);
        merge<V>(two.pivot, two.s, two.q, before, rows, two.mean, two.m2);
    }
}

// A product's panel -> rows of y from column on, and their part of the moments [3][wide], `before` rows on. Two
// vectors go together so that cache lines are filled at once; `stream`: past the caches, where they are whole lines.
template <class V, class T>
void emit(const float* panel, int64_t vectors, int64_t rows, int64_t column, int64_t channels, T* y, float* moments,
          int64_t before, bool stream) {
    const int64_t wide = padded(channels), width = vectors * V::lanes;
    y += column;
    moments += column;
    const auto whole = [&](int64_t v) { return stream && channels - column >= (v + 2) * V::lanes; };
    for (int64_t v = 0; v < vectors; v += 2) {
        const int64_t left = channels - column - v * V::lanes;
        const auto run = vectors - v == 1 ? emit_columns<V, T, false, 1>
                         : whole(v)       ? emit_columns<V, T, true, 2>
                                          : emit_columns<V, T, false, 2>;
        run(panel + v * V::lanes, width, rows, channels, left, y + v * V::lanes, moments + v * V::lanes, wide, before);
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
