// Tasks that pass once over rows of channels: BatchNorm applied, its sums, pooling.
#pragma once

#include "train_rows.h"

namespace mbv2::cpu::train {
namespace {

template <class V, class T>
void bn_apply(const T* y, const float* bn, const T* residual, bool relu6, int64_t channels, int64_t first, int64_t last,
              T* out) {
    const float *scale = bn + kScale * padded(channels), *shift = bn + kShift * padded(channels);
    for (int64_t r = first; r < last; ++r) {
        for (int64_t c = 0; c < channels; c += V::lanes) {
            const int64_t at = r * channels + c, n = channels - c;
            typename V::Type z = V::fma(load_n<V>(y + at, n), V::load(scale + c), V::load(shift + c));
            if (relu6) z = V::relu6(z);
            if (residual != nullptr) z = V::add(z, load_n<V>(residual + at, n));
            store_n<V>(out + at, z, n);
        }
    }
}

// Adds the sums of dz(row) and dz * (y - mean) over rows to `sums`, a few rows of all channels at a time.
template <class V, class T, class Dz>
void add_sums(const T* y, const float* bn, int64_t channels, int64_t first, int64_t last, float* sums, const Dz& dz) {
    constexpr int64_t kBlock = 32;
    const int64_t wide = padded(channels);
    for (int64_t row = first; row < last; row += kBlock) {
        const int64_t until = row + kBlock < last ? row + kBlock : last;
        for (int64_t c = 0; c < channels; c += V::lanes) {
            const typename V::Type mean = V::load(bn + kMean * wide + c);
            typename V::Type sum = V::zero(), centred = V::zero();
            for (int64_t r = row; r < until; ++r) {
                const typename V::Type value = load_n<V>(y + r * channels + c, channels - c);
                const typename V::Type grad = dz(r, c, value);
                sum = V::add(sum, grad);
                centred = V::fma(grad, V::sub(value, mean), centred);
            }
            V::store(sums + c, V::add(V::load(sums + c), sum));
            V::store(sums + wide + c, V::add(V::load(sums + wide + c), centred));
        }
    }
}

template <class V>
inline typename V::Type normalised(typename V::Type value, const float* bn, int64_t wide, int64_t c) {
    return V::fma(value, V::load(bn + kScale * wide + c), V::load(bn + kShift * wide + c));
}

template <class V, class T>
void bn_sums(const T* grad, const T* y, const float* bn, bool relu6, int64_t channels, int64_t first, int64_t last,
             float* sums) {
    const int64_t wide = padded(channels);
    for (int64_t c = 0; c < 2 * wide; ++c) sums[c] = 0;
    const auto plain = [&](int64_t r, int64_t c, typename V::Type) {
        return load_n<V>(grad + r * channels + c, channels - c);
    };
    const auto masked = [&](int64_t r, int64_t c, typename V::Type value) {
        return V::inside(load_n<V>(grad + r * channels + c, channels - c), normalised<V>(value, bn, wide, c));
    };
    relu6 ? add_sums<V>(y, bn, channels, first, last, sums, masked)
          : add_sums<V>(y, bn, channels, first, last, sums, plain);
}

template <class V, class T>
void pool(const T* y, const float* bn, int64_t channels, int64_t pixels, int64_t first, int64_t last, T* pooled) {
    const int64_t wide = padded(channels);
    for (int64_t n = first; n < last; ++n) {
        const T* from = y + n * pixels * channels;
        for (int64_t c = 0; c < channels; c += V::lanes) {
            typename V::Type sum[2] = {V::zero(), V::zero()};
            for (int64_t r = 0; r < pixels; ++r) {
                typename V::Type value = load_n<V>(from + r * channels + c, channels - c);
                if (bn != nullptr) value = V::relu6(normalised<V>(value, bn, wide, c));
                sum[r % 2] = V::add(sum[r % 2], value);
            }
            const typename V::Type mean = V::mul(V::add(sum[0], sum[1]), V::set(1.0f / static_cast<float>(pixels)));
            store_n<V>(pooled + n * channels + c, mean, channels - c);
        }
    }
}

template <class V, class T>
void pool_backward(const T* grad, const T* y, const float* bn, int64_t channels, int64_t pixels, int64_t first,
                   int64_t last, T* dz, float* sums) {
    const int64_t wide = padded(channels);
    for (int64_t c = 0; c < 2 * wide; ++c) sums[c] = 0;
    const typename V::Type share = V::set(1.0f / static_cast<float>(pixels));
    for (int64_t n = first; n < last; ++n) {
        const auto spread = [&](int64_t r, int64_t c, typename V::Type value) {
            const typename V::Type g = V::mul(load_n<V>(grad + n * channels + c, channels - c), share);
            const typename V::Type z = normalised<V>(value, bn, wide, c);
            const typename V::Type kept = V::template round<T>(V::inside(g, z));
            store_n<V>(dz + r * channels + c, kept, channels - c);
            return kept;
        };
        add_sums<V>(y, bn, channels, n * pixels, (n + 1) * pixels, sums, spread);
    }
}

template <class V>
void add(const float* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += V::lanes) {
        const int64_t n = count - i;
        store_n<V>(to + i, V::add(load_n<V>(to + i, n), load_n<V>(from + i, n)), n);
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
