// Inference stages on NHWC memory, BatchNorm folded: a block's hidden rows stay in a core's cache.
#include "train_work.h"

namespace mbv2::cpu::train {
namespace {

// Floats of hidden rows that a task makes before it goes on, about half of a 1 MiB L2.
constexpr int64_t kHidden = 96 * 1024;

// A weight and bias ready for the tasks, in `at`, which grows by what they take.
template <class T>
Folded<T> prepared(const Machine& machine, const Weight<const T>& weight, const float* bias, bool relu6, float*& at) {
    Folded<T> conv = {};
    conv.inputs = weight.length();
    conv.outputs = weight.outputs;
    conv.relu6 = relu6;
    pack(machine, weight, Along::outputs, at);
    conv.weights = at;
    at += padded(panels_floats(weight, Along::outputs, machine.kernels.lanes));
    pad(bias, 1, conv.outputs, at);
    conv.bias = at;
    at += padded(conv.outputs);
    return conv;
}

template <class T>
int64_t prepared_floats(const Machine& machine, const Weight<const T>& weight) {
    return padded(panels_floats(weight, Along::outputs, machine.kernels.lanes)) + padded(weight.outputs);
}

// A depthwise weight, then its bias, padded: where that is.
template <class T>
float* prepare_taps(const Machine& machine, const Weight<const T>& weight, const float* bias, float* at) {
    const int64_t lanes = machine.kernels.lanes;
    pack_taps(weight, lanes, at);
    pad(bias, 1, weight.outputs, at + padded(taps_floats(weight.outputs, lanes)));
    return at + padded(taps_floats(weight.outputs, lanes));
}

// Floats of both.
inline int64_t prepared_taps(const Machine& machine, int64_t channels) {
    return padded(taps_floats(channels, machine.kernels.lanes)) + padded(channels);
}

template <class T>
void by_rows(const Machine& machine, const Folded<T>& conv, int64_t rows) {
    const Parts parts = parts_of(rows);
    const Machine workers = for_work(machine, rows * conv.inputs * conv.outputs);
    run_tasks(workers, parts.count, forward_scratch(conv.inputs), [&](int64_t i, float* scratch) {
        tasks<T>(machine.kernels).folded(conv, parts.begin(i), parts.end(i), scratch);
    });
}

// Rows of all pictures' outputs, `each` to a task.
struct Bands {
    int64_t height, each;

    int64_t per_picture() const { return ceil_div(height, each); }
    int64_t picture(int64_t band) const { return band / per_picture(); }
    int64_t begin(int64_t band) const { return band % per_picture() * each; }
    int64_t end(int64_t band) const { return std::min(begin(band) + each, height); }
};

}  // namespace

template <class T>
void pointwise_folded(const Machine& machine, const T* x, const Weight<const T>& weight, const float* bias, bool relu6,
                      const T* residual, int64_t rows, T* y) {
    float* at = memory.weights.get(prepared_floats(machine, weight));
    Folded<T> conv = prepared(machine, weight, bias, relu6, at);
    conv.x = x;
    conv.residual = residual;
    conv.y = y;
    by_rows(machine, conv, rows);
}

template <class T>
void stem_folded(const Machine& machine, const T* x, const Pictures& p, const Weight<const T>& weight,
                 const float* bias, T* y) {
    const Patches<T> patches = {x, p.channels, p.height, p.width, p.stride, p.out_height(), p.out_width()};
    float* at = memory.weights.get(prepared_floats(machine, weight));
    Folded<T> conv = prepared(machine, weight, bias, true, at);
    conv.patches = &patches;
    conv.y = y;
    by_rows(machine, conv, p.batch * patches.out_height * patches.out_width);
}

template <class T>
void depthwise_folded(const Machine& machine, const T* x, const Pictures& p, const Weight<const T>& weight,
                      const float* bias, T* y) {
    float* taps = memory.weights.get(prepared_taps(machine, p.channels));
    const float* shift = prepare_taps(machine, weight, bias, taps);
    const DepthwiseForward<T> conv = {
        x, nullptr, taps, y, shift, p.channels, p.height, p.width, p.stride, p.out_height(), p.out_width(), false};
    const Bands bands = {conv.out_height, std::max<int64_t>(8, ceil_div(conv.out_height, 4))};
    run_tasks(
        machine, p.batch * bands.per_picture(), depthwise_scratch(p.channels, p.width), [&](int64_t i, float* scratch) {
            tasks<T>(machine.kernels).depthwise(conv, bands.picture(i), bands.begin(i), bands.end(i), nullptr, scratch);
        });
}

template <class T>
void block_folded(const Machine& machine, const T* x, const Pictures& p, const Weight<const T>* expand,
                  const float* bias1, const Weight<const T>& depthwise, const float* bias2,
                  const Weight<const T>& project, const float* bias3, bool residual, T* y) {
    const int64_t hidden = depthwise.outputs, outputs = project.outputs;
    const int64_t out_height = p.out_height(), out_width = p.out_width();
    float* at = memory.weights.get(prepared_taps(machine, hidden) +
                                   (expand == nullptr ? 0 : prepared_floats(machine, *expand)) +
                                   prepared_floats(machine, project));
    float* taps = at;
    const float* shift = prepare_taps(machine, depthwise, bias2, taps);
    at += prepared_taps(machine, hidden);
    const Folded<T> first = expand == nullptr ? Folded<T>{} : prepared(machine, *expand, bias1, true, at);
    const Folded<T> last = prepared(machine, project, bias3, false, at);

    const int64_t row = hidden * (p.stride * p.width + out_width);
    const int64_t each = std::clamp<int64_t>(kHidden / row, std::min<int64_t>(4, out_height), out_height);
    const Bands bands = {out_height, ceil_div(out_height, ceil_div(out_height, each))};
    const int64_t rows = std::min(p.height, (bands.each - 1) * p.stride + 3);
    // Scratch of the tasks first, then hidden rows before and after the depthwise convolution.
    const int64_t own =
        std::max({forward_scratch(p.channels), forward_scratch(hidden), depthwise_scratch(hidden, p.width)});
    const int64_t before = padded(rows * p.width * hidden), after = padded(bands.each * out_width * hidden);
    run_tasks(machine, p.batch * bands.per_picture(), own + before + after, [&](int64_t i, float* scratch) {
        const Tasks<T>& run = tasks<T>(machine.kernels);
        const int64_t n = bands.picture(i), begin = bands.begin(i), end = bands.end(i);
        const int64_t top = std::max<int64_t>(0, begin * p.stride - 1);
        const int64_t bottom = std::min(p.height, (end - 1) * p.stride + 2);
        const T* picture = x + n * p.height * p.width * p.channels;
        // Addresses are those of the picture's first row, of which only rows [top, bottom) exist.
        const T* from = picture;
        if (expand != nullptr) {
            T* made = reinterpret_cast<T*>(scratch + own) - top * p.width * hidden;
            Folded<T> conv = first;
            conv.x = picture;
            conv.y = made;
            run.folded(conv, top * p.width, bottom * p.width, scratch);
            from = made;
        }
        T* middle = reinterpret_cast<T*>(scratch + own + before) - begin * out_width * hidden;
        const DepthwiseForward<T> conv = {from,     nullptr, taps,     middle,     shift,     hidden,
                                          p.height, p.width, p.stride, out_height, out_width, false};
        run.depthwise(conv, 0, begin, end, nullptr, scratch);
        Folded<T> final = last;
        final.x = middle;
        final.y = y + n * out_height * out_width * outputs;
        final.residual = residual ? picture : nullptr;
        run.folded(final, begin * out_width, end * out_width, scratch);
    });
}

template <class T>
void head_folded(const Machine& machine, const T* x, const Weight<const T>& weight, const float* bias, int64_t batch,
                 int64_t pixels, T* pooled) {
    float* at = memory.weights.get(prepared_floats(machine, weight));
    const Folded<T> conv = prepared(machine, weight, bias, true, at);
    const int64_t own = forward_scratch(conv.inputs);
    run_tasks(machine, batch, own + padded(pixels * conv.outputs), [&](int64_t n, float* scratch) {
        const Tasks<T>& run = tasks<T>(machine.kernels);
        Folded<T> one = conv;
        one.x = x + n * pixels * conv.inputs;
        one.y = reinterpret_cast<T*>(scratch + own);
        run.folded(one, 0, pixels, scratch);
        run.pool(one.y, nullptr, conv.outputs, pixels, 0, 1, pooled + n * conv.outputs);
    });
}

#define MBV2_INSTANTIATE(T)                                                                                           \
    template void pointwise_folded(const Machine&, const T*, const Weight<const T>&, const float*, bool, const T*,    \
                                   int64_t, T*);                                                                      \
    template void stem_folded(const Machine&, const T*, const Pictures&, const Weight<const T>&, const float*, T*);   \
    template void depthwise_folded(const Machine&, const T*, const Pictures&, const Weight<const T>&, const float*,   \
                                   T*);                                                                               \
    template void block_folded(const Machine&, const T*, const Pictures&, const Weight<const T>*, const float*,       \
                               const Weight<const T>&, const float*, const Weight<const T>&, const float*, bool, T*); \
    template void head_folded(const Machine&, const T*, const Weight<const T>&, const float*, int64_t, int64_t, T*);
MBV2_INSTANTIATE(float)
MBV2_INSTANTIATE(bf16)

}  // namespace mbv2::cpu::train
