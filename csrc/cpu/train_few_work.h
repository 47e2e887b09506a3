// Stages of few rows: when they are, and panels shared out among threads.
#pragma once

#include "train_work.h"

namespace mbv2::cpu::train {

// Most rows of a batch for which packing weights where they are used pays: a second tile of rows would share them.
constexpr int64_t kFewRows = 256;

// Whether a product of `rows` rows takes weights where they lie: of 1x1 convolutions, with dense inputs.
template <class T>
bool few_rows(const Weight<T>& weight, int64_t rows) {
    return rows <= kFewRows && weight.taps == 1 && (weight.inputs == 1 || weight.input_stride == 1);
}

template <class T>
void forward_few(const Machine& machine, Forward<T> conv, const float* bn, const Weight<const T>& weight, int64_t rows,
                 float* moments) {
    conv.inputs = weight.inputs;
    conv.outputs = weight.outputs;
    if (bn != nullptr) {
        float* wide_bn = memory.vectors.get(6 * padded(conv.inputs));
        pad(bn, 6, conv.inputs, wide_bn);
        conv.bn = wide_bn;
    }
    const int64_t wide = padded(conv.outputs), count = panels(ceil_div(conv.outputs, machine.kernels.lanes));
    float* all = memory.parts.get(3 * wide);
    std::fill(all, all + wide, static_cast<float>(rows));
    const InPlace<T> in_place = {weight.data, nullptr, weight.output_stride};
    run_ranges(for_work(machine, rows * conv.inputs * conv.outputs), count, forward_few_scratch(rows, conv.inputs),
               [&](int64_t begin, int64_t end, float* scratch) {
                   tasks<T>(machine.kernels).forward_few(conv, in_place, rows, begin, end, all, scratch);
               });
    add_parts(machine, all, 1, 3, conv.outputs, moments);
}

template <class T>
void project_backward_few(const Machine& machine, ProjectBackward<T> conv, const Weight<const T>& weight, int64_t rows,
                          float* sums, const Weight<T>* dweight) {
    const int64_t hidden = conv.hidden, outputs = conv.outputs;
    const InPlace<T> in_place = {weight.data, dweight == nullptr ? nullptr : dweight->data, weight.output_stride};
    float* all = memory.parts.get(2 * padded(hidden));
    run_ranges(for_work(machine, rows * hidden * outputs), panels(ceil_div(hidden, machine.kernels.lanes)),
               backward_few_scratch(rows, outputs), [&](int64_t begin, int64_t end, float* scratch) {
                   tasks<T>(machine.kernels).project_backward_few(conv, in_place, rows, begin, end, all, scratch);
               });
    if (conv.dz2 != nullptr) add_parts(machine, all, 1, 2, hidden, sums);
}

template <class T>
void expand_backward_few(const Machine& machine, PointwiseBackward<T> conv, const float* coef,
                         const Weight<const T>& weight, int64_t rows, const Weight<T>* dweight) {
    float* wide_coef = memory.vectors.get(3 * padded(conv.outputs));
    pad(coef, 3, conv.outputs, wide_coef);
    conv.coef = wide_coef;
    const InPlace<T> in_place = {weight.data, dweight == nullptr ? nullptr : dweight->data, weight.output_stride};
    run_ranges(for_work(machine, rows * conv.inputs * conv.outputs),
               panels(ceil_div(conv.inputs, machine.kernels.lanes)), backward_few_scratch(rows, conv.outputs),
               [&](int64_t begin, int64_t end, float* scratch) {
                   tasks<T>(machine.kernels).expand_backward_few(conv, in_place, rows, begin, end, scratch);
               });
}

}  // namespace mbv2::cpu::train
