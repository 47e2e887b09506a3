// Tasks of the 1x1 convolutions (and of the stem, as a product of patches): forward, backward, folded.
#pragma once

#include "train_rows.h"

namespace mbv2::cpu::train {
namespace {

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

template <class V, class T>
void forward(const Forward<T>& conv, int64_t first, int64_t last, float* moments, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(outputs, V::lanes);
    const int64_t stride = tile_stride(inputs);
    float *tile = scratch, *panel = tile + kRows * stride;
    const bool stream = conv.stream && outputs * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(conv.y) % 64 == 0;
    for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = least(kRows, last - row);
        const float* a = tile;
        int64_t a_stride = stride;
        if (conv.patches != nullptr) {
            gather(*conv.patches, row, rows, tile, stride);
        } else if (sizeof(T) == sizeof(float) && conv.bn == nullptr) {
            a = reinterpret_cast<const float*>(conv.x + row * inputs);
            a_stride = inputs;
        } else {
            activate<V>(conv.x + row * inputs, conv.bn, rows, inputs, tile, stride);
        }
        for (int64_t p = 0; p < panels(vectors); ++p) {
            const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p);
            gemm<V, false>(a, a_stride, rows, inputs, conv.weights + column * inputs, count, panel, false);
            emit<V>(panel, count, rows, column, outputs, conv.y + row * outputs, moments, row - first, stream);
        }
    }
    if (stream) V::fence();
    for (int64_t c = 0; c < padded(outputs); ++c) moments[c] = static_cast<float>(last - first);
}

// da2 in `panel` -> dz2 and sums, and relu6(bn2(y2)) -> `activation`, for rows of one vector of channels.
template <class V, class T, bool Gradient, bool Activation>
void mask_vector(const ProjectBackward<T>& conv, int64_t row, int64_t rows, int64_t c, const float* panel,
                 float* activation, int64_t width, float* sums, bool add, bool ahead) {
    const int64_t hidden = conv.hidden, wide = padded(hidden), n = hidden - c;
    const typename V::Type mean = V::load(conv.bn2 + kMean * wide + c), scale = V::load(conv.bn2 + kScale * wide + c);
    const typename V::Type shift = V::load(conv.bn2 + kShift * wide + c);
    typename V::Type first[2] = {V::zero(), V::zero()}, second[2] = {V::zero(), V::zero()};
    const T* y = conv.y2 + row * hidden + c;
    T* out = conv.dz2 + row * hidden + c;
    const auto take = [&](int64_t r, int half) __attribute__((always_inline)) {
        // The same channels of the next tile: no hardware follows columns.
        if (ahead) {
            __builtin_prefetch(y + (r + kRows) * hidden, 0, 2);
            if constexpr (Gradient) __builtin_prefetch(out + (r + kRows) * hidden, 0, 2);
        }
        const typename V::Type value = load_n<V>(y + r * hidden, n), z = V::fma(value, scale, shift);
        if constexpr (Activation) V::store(activation + r * width, V::relu6(z));
        if constexpr (Gradient) {
            const typename V::Type dz = V::template round<T>(V::inside(V::load(panel + r * width), z));
            store_n<V>(out + r * hidden, dz, n);
            first[half] = V::add(first[half], dz);
            second[half] = V::fma(dz, V::sub(value, mean), second[half]);
        }
    };
    int64_t r = 0;
    for (; r + 2 <= rows; r += 2) {
        take(r, 0);
        take(r + 1, 1);
    }
    if (r < rows) take(r, 0);
    if constexpr (Gradient) {
        float *at = sums + c, *centred = sums + wide + c;
        const typename V::Type f = V::add(first[0], first[1]), s = V::add(second[0], second[1]);
        V::store(at, add ? V::add(V::load(at), f) : f);
        V::store(centred, add ? V::add(V::load(centred), s) : s);
    }
}

template <class V, class T>
void project_backward(const ProjectBackward<T>& conv, int64_t first, int64_t last, int64_t panel_begin,
                      int64_t panel_end, float* sums, float* dweight, float* scratch) {
    const int64_t hidden = conv.hidden, outputs = conv.outputs, vectors = ceil_div(hidden, V::lanes);
    const int64_t stride = tile_stride(outputs);
    float *tile = scratch, *panel = tile + kRows * stride, *activation = panel + kRows * kPanel;
    const bool input = conv.weights != nullptr, weight = dweight != nullptr;
    const auto mask = input ? (weight ? mask_vector<V, T, true, true> : mask_vector<V, T, true, false>)
                            : mask_vector<V, T, false, true>;
    for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = least(kRows, last - row);
        affine<V, T>(conv.grad + row * outputs, conv.y3 + row * outputs, conv.coef3, nullptr, rows, outputs, 0, outputs,
                     tile, stride);
        for (int64_t p = panel_begin; p < panel_end; ++p) {
            const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
            if (input) {
                gemm<V, false>(tile, stride, rows, outputs, conv.weights + column * outputs, count, panel, false);
            }
            for (int64_t v = 0; v < count; ++v) {
                const int64_t at = v * V::lanes;
                mask(conv, row, rows, column + at, panel + at, activation + at, width, sums, row > first,
                     v % 2 == 0 && row + 2 * kRows <= last);
            }
            if (weight) {
                gemm<V, true>(tile, stride, outputs, rows, activation, count, dweight + column * outputs, row > first);
            }
        }
    }
}

// The product for dx, plus the shortcut's gradient, of rows of one panel.
template <class V, class T>
void finish(const float* panel, int64_t vectors, int64_t rows, int64_t column, int64_t channels, const T* residual,
            T* dx) {
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t v = 0; v < vectors; ++v, panel += V::lanes) {
            const int64_t c = column + v * V::lanes, n = channels - c;
            typename V::Type value = V::load(panel);
            if (residual != nullptr) value = V::add(value, load_n<V>(residual + r * channels + c, n));
            store_n<V>(dx + r * channels + c, value, n);
        }
    }
}

template <class V, class T>
void pointwise_backward(const PointwiseBackward<T>& conv, int64_t first, int64_t last, int64_t begin, int64_t end,
                        float* dweight, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(inputs, V::lanes);
    const int64_t stride = tile_stride(kChunk);
    float *tile = scratch, *product = tile + kRows * stride, *rows_of_x = product + kRows * (padded(inputs) + kPanel);
    for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = least(kRows, last - row);
        if (dweight != nullptr) {
            // By way of `product`, which is not in use yet.
            const int64_t x_stride = padded(inputs);
            if (conv.patches != nullptr) {
                gather(*conv.patches, row, rows, product, x_stride);
            } else {
                activate<V>(conv.x + row * inputs, nullptr, rows, inputs, product, x_stride);
            }
            to_panels<V>(product, x_stride, rows, inputs, rows_of_x);
        }
        for (int64_t h = begin; h < end; h += kChunk) {
            const int64_t h_end = least(h + kChunk, end);
            affine<V, T>(conv.dz + row * outputs, conv.y + row * outputs, conv.coef, conv.bn, rows, outputs, h, h_end,
                         tile, stride);
            for (int64_t p = 0; p < panels(vectors); ++p) {
                const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
                if (conv.weights != nullptr) {
                    gemm<V, false>(tile, stride, rows, h_end - h, conv.weights + column * outputs + h * width, count,
                                   product + column * rows, h > begin);
                }
                if (dweight != nullptr) {
                    gemm<V, true>(tile, stride, h_end - h, rows, rows_of_x + column * rows, count,
                                  dweight + column * outputs + h * width, row > first);
                }
            }
        }
        if (conv.weights == nullptr) continue;
        for (int64_t p = 0; p < panels(vectors); ++p) {
            const int64_t column = 2 * p * V::lanes;
            finish<V, T>(product + column * rows, panel_vectors(vectors, p), rows, column, inputs,
                         conv.residual == nullptr ? nullptr : conv.residual + row * inputs, conv.dx + row * inputs);
        }
    }
}

template <class V, class T>
void folded(const Folded<T>& conv, int64_t first, int64_t last, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(outputs, V::lanes);
    const int64_t stride = tile_stride(inputs);
    float *tile = scratch, *panel = tile + kRows * stride;
    for (int64_t row = first; row < last; row += kRows) {
        const int64_t rows = least(kRows, last - row);
        const float* a = tile;
        int64_t a_stride = stride;
        if (conv.patches != nullptr) {
            gather(*conv.patches, row, rows, tile, stride);
        } else if (sizeof(T) == sizeof(float)) {
            a = reinterpret_cast<const float*>(conv.x + row * inputs);
            a_stride = inputs;
        } else {
            activate<V>(conv.x + row * inputs, nullptr, rows, inputs, tile, stride);
        }
        for (int64_t p = 0; p < panels(vectors); ++p) {
            const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p);
            gemm<V, false>(a, a_stride, rows, inputs, conv.weights + column * inputs, count, panel, false);
            const float* from = panel;
            for (int64_t r = row; r < row + rows; ++r) {
                for (int64_t v = 0; v < count; ++v, from += V::lanes) {
                    const int64_t c = column + v * V::lanes, n = outputs - c;
                    typename V::Type value = V::add(V::load(from), V::load(conv.bias + c));
                    if (conv.relu6) value = V::relu6(value);
                    if (conv.residual != nullptr) value = V::add(value, load_n<V>(conv.residual + r * outputs + c, n));
                    store_n<V>(conv.y + r * outputs + c, value, n);
                }
            }
        }
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
