// The stages of training (kernels/aten.py has their meaning) on plain memory: work cut into tasks, tasks' parts merged.
//
// The cut, and so every bit of the result, depends on the shape and the instruction set, not on the threads. Tensors
// are as in train.h; bn, coef, moments and sums are here dense [rows][C], as torch has them.
#pragma once

#include "network.h"
#include "train.h"

namespace mbv2::cpu::train {

struct Machine {
    const Kernels& kernels;
    Threads threads;
};

// A convolution's weight [outputs, inputs, taps] anywhere in memory; taps are those of a 3x3 window, or one.
template <class T>
struct Weight {
    T* data;
    int64_t outputs, inputs, taps;
    int64_t output_stride, input_stride, row_stride, column_stride;

    int64_t length() const { return inputs * taps; }
    T* at(int64_t output, int64_t k) const {
        if (taps == 1) return data + output * output_stride + k * input_stride;  // no division
        const int64_t tap = k / inputs, input = k % inputs;
        return data + output * output_stride + input * input_stride + tap / 3 * row_stride + tap % 3 * column_stride;
    }
};

// Of a picture batch: size of the input, stride, and the output's size.
struct Pictures {
    int64_t batch, channels, height, width, stride;

    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
};

// y = conv(x or relu6(bn(x))), moments [3][outputs]. bn may be null.
template <class T>
void pointwise(const Machine&, const T* x, const float* bn, const Weight<const T>&, int64_t rows, T* y, float* moments);
template <class T>
void stem(const Machine&, const T* x, const Pictures&, const Weight<const T>&, T* y, float* moments);
template <class T>
void depthwise(const Machine&, const T* x, const float* bn, const Pictures&, const Weight<const T>&, T* y,
               float* moments);

// Null dz2 (with sums) or dweight: not wanted.
template <class T>
void project_backward(const Machine&, const T* grad, const T* y3, const float* coef3, const Weight<const T>&,
                      const T* y2, const float* bn2, int64_t rows, T* dz2, float* sums, const Weight<T>* dweight);
// sums null where bn1 is.
template <class T>
void depthwise_backward(const Machine&, const T* dz2, const T* y2, const float* coef2, const T* y1, const float* bn1,
                        const Pictures&, const Weight<const T>&, T* dz1, float* sums, const Weight<T>* dweight);
template <class T>
void expand_backward(const Machine&, const T* dz1, const T* y1, const float* coef1, const Weight<const T>&, const T* x,
                     const T* residual, int64_t rows, T* dx, const Weight<T>* dweight);
template <class T>
void stem_backward(const Machine&, const T* grad, const T* y, const float* bn, const float* coef, const T* x,
                   const Pictures&, const Weight<T>& dweight);

template <class T>
void bn_apply(const Machine&, const T* y, const float* bn, const T* residual, bool relu6, int64_t rows,
              int64_t channels, T* out);
template <class T>
void bn_sums(const Machine&, const T* grad, const T* y, const float* bn, bool relu6, int64_t rows, int64_t channels,
             float* sums);
// bn null: the mean of y.
template <class T>
void pool(const Machine&, const T* y, const float* bn, int64_t batch, int64_t pixels, int64_t channels, T* pooled);
template <class T>
void pool_backward(const Machine&, const T* grad, const T* y, const float* bn, int64_t batch, int64_t pixels,
                   int64_t channels, T* dz, float* sums);

// Inference, BatchNorm folded into weight and bias.
template <class T>
void pointwise_folded(const Machine&, const T* x, const Weight<const T>&, const float* bias, bool relu6,
                      const T* residual, int64_t rows, T* y);
template <class T>
void stem_folded(const Machine&, const T* x, const Pictures&, const Weight<const T>&, const float* bias, T* y);
template <class T>
void depthwise_folded(const Machine&, const T* x, const Pictures&, const Weight<const T>&, const float* bias, T* y);
// expand null: a block without expansion. residual: x is added.
template <class T>
void block_folded(const Machine&, const T* x, const Pictures&, const Weight<const T>* expand, const float* bias1,
                  const Weight<const T>& depthwise, const float* bias2, const Weight<const T>& project,
                  const float* bias3, bool residual, T* y);
template <class T>
void head_folded(const Machine&, const T* x, const Weight<const T>&, const float* bias, int64_t batch, int64_t pixels,
                 T* pooled);

// Parts [parts][3][channels] merged in order by Chan's formula -> [3][channels]; parts of count 0 change nothing.
void merge_moments(const float* parts, int64_t count, int64_t part_stride, int64_t row_stride, int64_t channels,
                   float* out);

}  // namespace mbv2::cpu::train
