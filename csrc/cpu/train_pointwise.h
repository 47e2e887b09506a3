// Tasks of the 1x1 convolutions (and of the stem, as a product of patches): forward, backward, folded.
#pragma once

#include "train_rows.h"

namespace mbv2::cpu::train {
namespace {

template <class V, class T>
void forward(const Forward<T>& conv, int64_t first, int64_t last, float* moments, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(outputs, V::lanes);
    const int64_t stride = tile_stride(inputs);
    float *tile = scratch, *panel = tile + kRows * stride;
    const bool stream = conv.stream && outputs * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(conv.y) % 64 == 0;
    // What is wider sets the pace: the results, unless they are stored past the caches, or the next tile of x.
    const bool into_caches = !stream && outputs > inputs;
    const int64_t height = tile_rows(last - first);
    for (int64_t row = first; row < last; row += height) {
        const int64_t rows = least(height, last - row), next = row + rows;
        Ahead ahead;
        if (!into_caches && conv.patches == nullptr) {
            ahead = {conv.x + next * inputs, least(height, last - next), inputs, inputs,
                     tiles_of<V>(rows) * panels(vectors)};
        }
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
            if (into_caches) {
                ahead = {conv.y + row * outputs + column, rows, count * V::lanes, outputs, tiles_of<V>(rows)};
            }
            gemm<V, false>(a, a_stride, rows, inputs, conv.weights + column * inputs, count, panel, false, ahead);
            emit<V>(panel, count, rows, column, outputs, conv.y + row * outputs, moments, row - first, stream);
        }
    }
    if (stream) V::fence();
    for (int64_t c = 0; c < padded(outputs); ++c) moments[c] = static_cast<float>(last - first);
}

// One vector of hidden channels between the two products of project's backward pass.
template <class V, class T>
struct Hidden {
    const float* panel;
    float* activation;
    const T* y;
    T* out;
    int64_t n;
    float *at, *at_centred;
    typename V::Type mean, scale, shift, sum, centred;

    Hidden(const ProjectBackward<T>& conv, int64_t row, int64_t c, const float* panel_, float* activation_, float* sums,
           bool add)
        : panel(panel_),
          activation(activation_),
          y(conv.y2 + row * conv.hidden + c),
          out(conv.dz2 + row * conv.hidden + c),
          n(conv.hidden - c),
          at(sums + c),
          at_centred(at + padded(conv.hidden)) {
        const int64_t wide = padded(conv.hidden);
        mean = V::load(conv.bn2 + kMean * wide + c);
        scale = V::load(conv.bn2 + kScale * wide + c);
        shift = V::load(conv.bn2 + kShift * wide + c);
        sum = add ? V::load(at) : V::zero();
        centred = add ? V::load(at_centred) : V::zero();
    }
    // da2 in the panel -> dz2 and the sums, and relu6(bn2(y2)) -> activation.
    template <bool Gradient, bool Activation, bool Stream>
    inline __attribute__((always_inline)) void take(int64_t in_panel, int64_t in_y) {
        const typename V::Type value = load_n<V>(y + in_y, n), z = V::fma(value, scale, shift);
        if constexpr (Activation) V::store(activation + in_panel, V::relu6(z));
        if constexpr (!Gradient) return;
        const typename V::Type dz = V::template round<T>(V::inside(V::load(panel + in_panel), z));
        if constexpr (Stream) {
            V::stream(out + in_y, dz);
        } else {
            store_n<V>(out + in_y, dz, n);
        }
        sum = V::add(sum, dz);
        centred = V::fma(dz, V::sub(value, mean), centred);
    }
    void finish() const {
        V::store(at, sum);
        V::store(at_centred, centred);
    }
};

// Rows of one or two vectors of channels: two, so that cache lines are filled at once.
template <class V, class T, bool Gradient, bool Activation, bool Stream>
void mask_columns(const ProjectBackward<T>& conv, int64_t row, int64_t rows, int64_t c, int64_t vectors,
                  const float* panel, float* activation, int64_t width, float* sums, bool add) {
    const int64_t hidden = conv.hidden;
    Hidden<V, T> one(conv, row, c, panel, activation, sums, add);
    if (vectors == 1) {
        for (int64_t r = 0; r < rows; ++r) {
            one.template take<Gradient, Activation, false>(r * width, r * hidden);
        }
        return one.finish();
    }
    Hidden<V, T> two(conv, row, c + V::lanes, panel + V::lanes, activation + V::lanes, sums, add);
    for (int64_t r = 0; r < rows; ++r) {
        one.template take<Gradient, Activation, Stream>(r * width, r * hidden);
        two.template take<Gradient, Activation, Stream>(r * width, r * hidden);
    }
    one.finish();
    two.finish();
}

template <class V, class T>
void project_backward(const ProjectBackward<T>& conv, int64_t first, int64_t last, int64_t panel_begin,
                      int64_t panel_end, float* sums, float* dweight, float* scratch) {
    const int64_t hidden = conv.hidden, outputs = conv.outputs, vectors = ceil_div(hidden, V::lanes);
    const int64_t stride = tile_stride(outputs);
    float *tile = scratch, *panel = tile + kRows * stride, *activation = panel + kRows * kPanel;
    const bool input = conv.weights != nullptr, weight = dweight != nullptr;
    const bool stream =
        conv.stream && input && hidden * sizeof(T) % 64 == 0 && reinterpret_cast<uintptr_t>(conv.dz2) % 64 == 0;
    const auto mask = !input    ? mask_columns<V, T, false, true, false>
                      : !weight ? mask_columns<V, T, true, false, false>
                      : stream  ? mask_columns<V, T, true, true, true>
                                : mask_columns<V, T, true, true, false>;
    const int64_t height = tile_rows(last - first);
    for (int64_t row = first; row < last; row += height) {
        const int64_t rows = least(height, last - row), next = row + rows;
        affine<V, T>(conv.grad + row * outputs, conv.y3 + row * outputs, conv.coef3, nullptr, rows, outputs, 0, outputs,
                     tile, stride);
        for (int64_t p = panel_begin; p < panel_end; ++p) {
            const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
            // The same channels of the next tile, as no hardware follows columns.
            const int64_t below = next * hidden + column;
            Ahead ahead(conv.y2 + below, input && !stream ? conv.dz2 + below : nullptr, least(height, last - next),
                        width, hidden, (input ? tiles_of<V>(rows) : 0) + (weight ? tiles_of<V>(outputs) : 0));
            if (input) {
                gemm<V, false>(tile, stride, rows, outputs, conv.weights + column * outputs, count, panel, false,
                               ahead);
            }
            for (int64_t v = 0; v < count; v += 2) {
                const int64_t at = v * V::lanes, pair = count - v == 1 ? 1 : 2;
                const auto run =
                    stream && hidden - column - at < 2 * V::lanes ? mask_columns<V, T, true, true, false> : mask;
                run(conv, row, rows, column + at, pair, panel + at, activation + at, width, sums, row > first);
            }
            if (weight) {
                gemm<V, true>(tile, stride, outputs, rows, activation, count, dweight + column * outputs, row > first,
                              ahead);
            }
        }
    }
    if (stream) V::fence();
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
    const int64_t height = tile_rows(last - first);
    for (int64_t row = first; row < last; row += height) {
        const int64_t rows = least(height, last - row);
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
            const bool more = h_end < end;
            const int64_t next = more ? row : row + rows, next_h = more ? h_end : begin;
            const int64_t tiles =
                (conv.weights == nullptr ? 0 : tiles_of<V>(rows)) + (dweight == nullptr ? 0 : tiles_of<V>(h_end - h));
            const int64_t at = next * outputs + next_h;
            Ahead ahead(conv.dz + at, conv.y + at, least(height, last - next), least(kChunk, end - next_h), outputs,
                        tiles * panels(vectors));
            for (int64_t p = 0; p < panels(vectors); ++p) {
                const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
                if (conv.weights != nullptr) {
                    gemm<V, false>(tile, stride, rows, h_end - h, conv.weights + column * outputs + h * width, count,
                                   product + column * rows, h > begin, ahead);
                }
                if (dweight != nullptr) {
                    gemm<V, true>(tile, stride, h_end - h, rows, rows_of_x + column * rows, count,
                                  dweight + column * outputs + h * width, row > first, ahead);
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
    const int64_t height = tile_rows(last - first);
    for (int64_t row = first; row < last; row += height) {
        const int64_t rows = least(height, last - row), next = row + rows;
        Ahead ahead;
        if (conv.patches == nullptr) {
            ahead = {conv.x + next * inputs, least(height, last - next), inputs, inputs,
                     tiles_of<V>(rows) * panels(vectors)};
        }
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
            gemm<V, false>(a, a_stride, rows, inputs, conv.weights + column * inputs, count, panel, false, ahead);
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
