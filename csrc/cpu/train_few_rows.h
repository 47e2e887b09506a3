// Tasks of the 1x1 convolutions where a batch has few rows, and the weights are more memory than the activations.
//
// Packing all of the weights beforehand, and their gradient out of panels afterwards, would take as long as the
// products. Here a panel of them is packed into the first cache right before its only product, and a panel of the
// gradient leaves it right after: memory is read and written once. A task does some of the panels for all of the
// rows, so that whoever does them the bits are the same.
#pragma once

#include "train_pointwise.h"

namespace mbv2::cpu::train {
namespace {

// Blocks of 8 x 4 values, in the vector type of GCC and Clang.
using Four = float __attribute__((vector_size(16), aligned(4)));
using Eight = float __attribute__((vector_size(32), aligned(4)));

// Rows [0, 8) of 4 columns -> 4 rows of 8.
inline void transpose_block(const float* from, int64_t stride, float* to, int64_t width) {
    Eight rows[4], pairs[4];
    for (int64_t r = 0; r < 4; ++r) {
        const Four above = *reinterpret_cast<const Four*>(from + r * stride);
        const Four below = *reinterpret_cast<const Four*>(from + (r + 4) * stride);
        rows[r] = __builtin_shufflevector(above, below, 0, 1, 2, 3, 4, 5, 6, 7);
    }
    for (int64_t r = 0; r < 2; ++r) {
        pairs[r] = __builtin_shufflevector(rows[2 * r], rows[2 * r + 1], 0, 8, 1, 9, 4, 12, 5, 13);
        pairs[2 + r] = __builtin_shufflevector(rows[2 * r], rows[2 * r + 1], 2, 10, 3, 11, 6, 14, 7, 15);
    }
    for (int64_t r = 0; r < 4; r += 2, to += 2 * width) {
        *reinterpret_cast<Eight*>(to) = __builtin_shufflevector(pairs[r], pairs[r + 1], 0, 1, 8, 9, 4, 5, 12, 13);
        *reinterpret_cast<Eight*>(to + width) =
            __builtin_shufflevector(pairs[r], pairs[r + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    }
}

// `used` rows of `length` values -> a panel [length][width], zeros beyond `used`.
inline void transpose(const float* from, int64_t stride, int64_t used, int64_t length, int64_t width, float* panel) {
    const int64_t whole = used / 8 * 8, most = length / 4 * 4;
    for (int64_t l = 0; l < most; l += 4) {
        for (int64_t r = 0; r < whole; r += 8) {
            transpose_block(from + r * stride + l, stride, panel + l * width + r, width);
        }
    }
    for (int64_t l = most; l < length; ++l) {
        for (int64_t r = 0; r < whole; ++r) panel[l * width + r] = from[r * stride + l];
    }
    for (int64_t l = 0; whole < width && l < length; ++l) {
        for (int64_t r = whole; r < width; ++r) panel[l * width + r] = r < used ? from[r * stride + l] : 0.0f;
    }
}

// `rows` rows of a dense matrix, `used` columns of them, <-> a panel [rows][vectors * lanes], zeros beyond `used`.
template <class V, class T>
void into_panel(const T* from, int64_t stride, int64_t rows, int64_t used, int64_t vectors, float* panel) {
    for (int64_t r = 0; r < rows; ++r, from += stride) {
        for (int64_t v = 0; v < vectors; ++v, panel += V::lanes) {
            V::store(panel, load_n<V>(from + v * V::lanes, used - v * V::lanes));
        }
    }
}
template <class V, class T>
void out_of_panel(const float* panel, int64_t rows, int64_t vectors, int64_t used, T* to, int64_t stride) {
    for (int64_t r = 0; r < rows; ++r, to += stride) {
        for (int64_t v = 0; v < vectors; ++v, panel += V::lanes) {
            store_n<V>(to + v * V::lanes, V::load(panel), used - v * V::lanes);
        }
    }
}

template <class V, class T>
void forward_few(const Forward<T>& conv, const InPlace<T>& weights, int64_t rows, int64_t begin, int64_t end,
                 float* moments, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(outputs, V::lanes);
    const int64_t stride = tile_stride(inputs);
    float *tile = scratch, *panel = tile + rows * stride, *packed = panel + rows * kPanel;
    float* widened = packed + inputs * kPanel;
    const float* a = tile;
    int64_t a_stride = stride;
    if (sizeof(T) == sizeof(float) && conv.bn == nullptr) {
        a = reinterpret_cast<const float*>(conv.x);
        a_stride = inputs;
    } else {
        activate<V>(conv.x, conv.bn, rows, inputs, tile, stride);
    }
    for (int64_t p = begin; p < end; ++p) {
        const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
        const int64_t used = least(width, outputs - column), next = column + width;
        const T* from = weights.weight + column * weights.stride;
        if constexpr (sizeof(T) == sizeof(float)) {
            transpose(reinterpret_cast<const float*>(from), weights.stride, used, inputs, width, packed);
        } else {
            for (int64_t r = 0; r < used; ++r) {
                activate<V>(from + r * weights.stride, nullptr, 1, inputs, widened + r * stride, stride);
            }
            transpose(widened, stride, used, inputs, width, packed);
        }
        Ahead ahead(weights.weight + next * weights.stride, p + 1 < end ? least(2 * V::lanes, outputs - next) : 0,
                    inputs, weights.stride, tiles_of<V>(rows) * ceil_div(inputs, kRun));
        gemm<V, false>(a, a_stride, rows, inputs, packed, count, panel, false, ahead);
        emit<V>(panel, count, rows, column, outputs, conv.y, moments, 0, false);
    }
}

// Columns [next, next + width) of the first `left` rows of a weight and of its gradient, during the products of the
// panel before: dx or dz2 if `input`, the gradient if it is wanted.
template <class V, class T>
Ahead columns_ahead(const InPlace<T>& weights, int64_t next, int64_t left, int64_t width, int64_t rows, int64_t outputs,
                    bool input) {
    const bool weight = weights.gradient != nullptr;
    return {weights.weight + next,
            weight ? weights.gradient + next : nullptr,
            left,
            width,
            weights.stride,
            (input ? tiles_of<V>(rows) * ceil_div(outputs, kRun) : 0) +
                (weight ? tiles_of<V>(outputs) * ceil_div(rows, kRun) : 0)};
}

template <class V, class T>
void project_backward_few(const ProjectBackward<T>& conv, const InPlace<T>& weights, int64_t rows, int64_t begin,
                          int64_t end, float* sums, float* scratch) {
    const int64_t hidden = conv.hidden, outputs = conv.outputs, vectors = ceil_div(hidden, V::lanes);
    const int64_t stride = tile_stride(outputs);
    float *tile = scratch, *panel = tile + rows * stride, *activation = panel + rows * kPanel;
    float* packed = activation + rows * kPanel;
    const bool input = conv.dz2 != nullptr, weight = weights.gradient != nullptr;
    const auto mask = !input    ? mask_columns<V, T, false, true, false>
                      : !weight ? mask_columns<V, T, true, false, false>
                                : mask_columns<V, T, true, true, false>;
    affine<V, T>(conv.grad, conv.y3, conv.coef3, nullptr, rows, outputs, 0, outputs, tile, stride);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
        const int64_t used = least(width, hidden - column), next = column + width;
        Ahead ahead = columns_ahead<V>(weights, next, p + 1 < end ? outputs : 0, width, rows, outputs, input);
        if (input) {
            into_panel<V>(weights.weight + column, weights.stride, outputs, used, count, packed);
            gemm<V, false>(tile, stride, rows, outputs, packed, count, panel, false, ahead);
        }
        for (int64_t v = 0; v < count; v += 2) {
            const int64_t at = v * V::lanes;
            mask(conv, 0, rows, column + at, count - v == 1 ? 1 : 2, panel + at, activation + at, width, sums, false);
        }
        if (weight) {
            gemm<V, true>(tile, stride, outputs, rows, activation, count, packed, false, ahead);
            out_of_panel<V>(packed, outputs, count, used, weights.gradient + column, weights.stride);
        }
    }
}

template <class V, class T>
void expand_backward_few(const PointwiseBackward<T>& conv, const InPlace<T>& weights, int64_t rows, int64_t begin,
                         int64_t end, float* scratch) {
    const int64_t inputs = conv.inputs, outputs = conv.outputs, vectors = ceil_div(inputs, V::lanes);
    const int64_t stride = tile_stride(outputs);
    float *tile = scratch, *panel = tile + rows * stride, *packed = panel + rows * kPanel;
    const bool input = conv.dx != nullptr, weight = weights.gradient != nullptr;
    affine<V, T>(conv.dz, conv.y, conv.coef, nullptr, rows, outputs, 0, outputs, tile, stride);
    for (int64_t p = begin; p < end; ++p) {
        const int64_t column = 2 * p * V::lanes, count = panel_vectors(vectors, p), width = count * V::lanes;
        const int64_t used = least(width, inputs - column), next = column + width;
        Ahead ahead = columns_ahead<V>(weights, next, p + 1 < end ? outputs : 0, width, rows, outputs, input);
        if (input) {
            into_panel<V>(weights.weight + column, weights.stride, outputs, used, count, packed);
            gemm<V, false>(tile, stride, rows, outputs, packed, count, panel, false, ahead);
            finish<V, T>(panel, count, rows, column, inputs, conv.residual, conv.dx);
        }
        if (weight) {
            into_panel<V>(conv.x + column, inputs, rows, used, count, panel);
            gemm<V, true>(tile, stride, outputs, rows, panel, count, packed, false, ahead);
            out_of_panel<V>(packed, outputs, count, used, weights.gradient + column, weights.stride);
        }
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
