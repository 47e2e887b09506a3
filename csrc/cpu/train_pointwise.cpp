// Stages that are matrix products: expand, project, stem, the head, and their backward passes.
#include "train_few_work.h"

namespace mbv2::cpu::train {
namespace {

// Values of a weight's gradient that a task adds to once for each tile of rows: beside dx, and by themselves, where
// more tasks are worth more than reading dz and y once.
constexpr int64_t kBesideInput = 64 * 1024, kShare = 32 * 1024;

template <class T>
Patches<T> patches_of(const T* x, const Pictures& p) {
    return {x, p.channels, p.height, p.width, p.stride, p.out_height(), p.out_width()};
}

template <class T>
void forward(const Machine& machine, Forward<T> conv, const float* bn, const Weight<const T>& weight, int64_t rows,
             float* moments) {
    conv.inputs = weight.length();
    conv.outputs = weight.outputs;
    float* packed = memory.weights.get(panels_floats(weight, Along::outputs, machine.kernels.lanes));
    pack(machine, weight, Along::outputs, packed);
    conv.weights = packed;
    conv.stream = beyond_caches<T>(rows * conv.outputs);
    if (bn != nullptr) {
        float* wide_bn = memory.vectors.get(6 * padded(conv.inputs));
        pad(bn, 6, conv.inputs, wide_bn);
        conv.bn = wide_bn;
    }
    const Parts parts = parts_of(rows);
    const int64_t wide = padded(conv.outputs);
    float* all = memory.parts.get(parts.count * 3 * wide);
    const Machine workers = for_work(machine, rows * conv.inputs * conv.outputs);
    run_tasks(workers, parts.count, forward_scratch(conv.inputs), [&](int64_t i, float* scratch) {
        tasks<T>(machine.kernels).forward(conv, parts.begin(i), parts.end(i), all + i * 3 * wide, scratch);
    });
    merge_moments(all, parts.count, 3 * wide, wide, conv.outputs, moments);
}

// dx and dweight in one pass where the weight's gradient fits a core's cache, else one after the other.
template <class T>
void backward(const Machine& machine, PointwiseBackward<T> conv, const float* coef, const float* bn,
              const Weight<const T>* weight, int64_t rows, const Weight<T>* dweight) {
    const int64_t lanes = machine.kernels.lanes, wide = padded(conv.outputs);
    float* vectors = memory.vectors.get(9 * wide);
    pad(coef, 3, conv.outputs, vectors);
    conv.coef = vectors;
    if (bn != nullptr) {
        pad(bn, 6, conv.outputs, vectors + 3 * wide);
        conv.bn = vectors + 3 * wide;
    }
    if (weight != nullptr) {
        float* packed = memory.weights.get(panels_floats(*weight, Along::inputs, lanes));
        pack(machine, *weight, Along::inputs, packed);
        conv.weights = packed;
    }
    const int64_t scratch_floats = pointwise_backward_scratch(conv.inputs);
    const auto task = tasks<T>(machine.kernels).pointwise_backward;
    const int64_t size = conv.inputs * conv.outputs;
    const Machine workers = for_work(machine, rows * size);
    if (weight != nullptr && (dweight == nullptr || size > kBesideInput)) {
        const Parts parts = parts_of(rows);
        run_tasks(workers, parts.count, scratch_floats, [&](int64_t i, float* scratch) {
            task(conv, parts.begin(i), parts.end(i), 0, conv.outputs, nullptr, scratch);
        });
        conv.weights = nullptr;
    }
    if (dweight == nullptr) return;
    const Parts parts = weight_parts(rows, size);
    const int64_t floats = panels_floats(*dweight, Along::inputs, lanes);
    const int64_t share =
        conv.weights != nullptr ? conv.outputs : std::max<int64_t>(1, kShare / conv.inputs / kChunk) * kChunk;
    const int64_t shares = ceil_div(conv.outputs, share);
    float* all = memory.parts.get(parts.count * floats);
    run_tasks(workers, parts.count * shares, scratch_floats, [&](int64_t i, float* scratch) {
        const int64_t part = i / shares, begin = i % shares * share, end = std::min(begin + share, conv.outputs);
        task(conv, parts.begin(part), parts.end(part), begin, end, all + part * floats, scratch);
    });
    unpack(machine, all, parts.count, floats, Along::inputs, *dweight);
}

}  // namespace

template <class T>
void pointwise(const Machine& machine, const T* x, const float* bn, const Weight<const T>& weight, int64_t rows, T* y,
               float* moments) {
    Forward<T> conv = {};
    conv.x = x;
    conv.y = y;
    if (few_rows(weight, rows)) return forward_few(machine, conv, bn, weight, rows, moments);
    forward(machine, conv, bn, weight, rows, moments);
}

template <class T>
void stem(const Machine& machine, const T* x, const Pictures& pictures, const Weight<const T>& weight, T* y,
          float* moments) {
    const Patches<T> patches = patches_of(x, pictures);
    Forward<T> conv = {};
    conv.patches = &patches;
    conv.y = y;
    forward(machine, conv, nullptr, weight, pictures.batch * patches.out_height * patches.out_width, moments);
}

template <class T>
void project_backward(const Machine& machine, const T* grad, const T* y3, const float* coef3,
                      const Weight<const T>& weight, const T* y2, const float* bn2, int64_t rows, T* dz2, float* sums,
                      const Weight<T>* dweight) {
    const int64_t lanes = machine.kernels.lanes, hidden = weight.inputs, outputs = weight.outputs;
    const int64_t wide = padded(hidden), vectors = ceil_div(hidden, lanes);
    float* constants = memory.vectors.get(3 * padded(outputs) + 6 * wide);
    float* wide_bn = constants + 3 * padded(outputs);
    pad(coef3, 3, outputs, constants);
    pad(bn2, 6, hidden, wide_bn);
    if (few_rows(weight, rows)) {
        const ProjectBackward<T> conv = {grad, y3, constants, nullptr, y2, wide_bn, dz2, hidden, outputs, false};
        return project_backward_few(machine, conv, weight, rows, sums, dweight);
    }
    const int64_t floats = panels_floats(weight, Along::inputs, lanes);
    const float* packed = nullptr;
    if (dz2 != nullptr) {
        float* into = memory.weights.get(floats);
        pack(machine, weight, Along::inputs, into);
        packed = into;
    }
    const ProjectBackward<T> conv = {grad,    y3,  constants, packed,  y2,
                                     wide_bn, dz2, hidden,    outputs, beyond_caches<T>(rows * hidden)};
    const Parts parts = dweight == nullptr ? parts_of(rows) : weight_parts(rows, hidden * outputs);
    const int64_t share = std::max<int64_t>(1, kShare / (2 * lanes * outputs));
    const int64_t shares = ceil_div(panels(vectors), share);
    const int64_t weight_floats = dweight == nullptr ? 0 : parts.count * floats;
    float* all = memory.parts.get(weight_floats + parts.count * 2 * wide);
    float* all_sums = all + weight_floats;
    const Machine workers = for_work(machine, rows * hidden * outputs);
    run_tasks(workers, parts.count * shares, project_backward_scratch(outputs), [&](int64_t i, float* scratch) {
        const int64_t part = i / shares, begin = i % shares * share;
        tasks<T>(machine.kernels)
            .project_backward(conv, parts.begin(part), parts.end(part), begin, std::min(begin + share, panels(vectors)),
                              all_sums + part * 2 * wide, dweight == nullptr ? nullptr : all + part * floats, scratch);
    });
    if (dz2 != nullptr) add_parts(machine, all_sums, parts.count, 2, hidden, sums);
    if (dweight != nullptr) unpack(machine, all, parts.count, floats, Along::inputs, *dweight);
}

template <class T>
void expand_backward(const Machine& machine, const T* dz1, const T* y1, const float* coef1,
                     const Weight<const T>& weight, const T* x, const T* residual, int64_t rows, T* dx,
                     const Weight<T>* dweight) {
    PointwiseBackward<T> conv = {};
    conv.dz = dz1;
    conv.y = y1;
    conv.x = x;
    conv.residual = residual;
    conv.dx = dx;
    conv.inputs = weight.inputs;
    conv.outputs = weight.outputs;
    if (few_rows(weight, rows)) return expand_backward_few(machine, conv, coef1, weight, rows, dweight);
    backward(machine, conv, coef1, nullptr, dx == nullptr ? nullptr : &weight, rows, dweight);
}

template <class T>
void stem_backward(const Machine& machine, const T* grad, const T* y, const float* bn, const float* coef, const T* x,
                   const Pictures& pictures, const Weight<T>& dweight) {
    const Patches<T> patches = patches_of(x, pictures);
    PointwiseBackward<T> conv = {};
    conv.dz = grad;
    conv.y = y;
    conv.patches = &patches;
    conv.inputs = dweight.length();
    conv.outputs = dweight.outputs;
    const int64_t rows = pictures.batch * patches.out_height * patches.out_width;
    backward<T>(machine, conv, coef, bn, nullptr, rows, &dweight);
}

#define MBV2_INSTANTIATE(T)                                                                                            \
    template void pointwise(const Machine&, const T*, const float*, const Weight<const T>&, int64_t, T*, float*);      \
    template void stem(const Machine&, const T*, const Pictures&, const Weight<const T>&, T*, float*);                 \
    template void project_backward(const Machine&, const T*, const T*, const float*, const Weight<const T>&, const T*, \
                                   const float*, int64_t, T*, float*, const Weight<T>*);                               \
    template void expand_backward(const Machine&, const T*, const T*, const float*, const Weight<const T>&, const T*,  \
                                  const T*, int64_t, T*, const Weight<T>*);                                            \
    template void stem_backward(const Machine&, const T*, const T*, const float*, const float*, const T*,              \
                                const Pictures&, const Weight<T>&);
MBV2_INSTANTIATE(float)
MBV2_INSTANTIATE(bf16)

}  // namespace mbv2::cpu::train
