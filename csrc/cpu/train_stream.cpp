// Stages that pass once over rows: depthwise, BatchNorm applied and its sums, pooling; and the merging of moments.
#include "train_work.h"

namespace mbv2::cpu::train {
namespace {

// Bands of every picture's rows: enough for many threads even of one picture, and not so many that halos cost.
struct Bands {
    int64_t batch, height, each;

    Bands(int64_t batch_, int64_t height_, int64_t multiple) : batch(batch_), height(height_) {
        const int64_t wanted = std::clamp<int64_t>(height / 8, 1, ceil_div(16, batch));
        each = ceil_div(ceil_div(height, wanted), multiple) * multiple;
    }
    int64_t per_picture() const { return ceil_div(height, each); }
    int64_t count() const { return batch * per_picture(); }
    int64_t picture(int64_t band) const { return band / per_picture(); }
    int64_t begin(int64_t band) const { return band % per_picture() * each; }
    int64_t end(int64_t band) const { return std::min(begin(band) + each, height); }
};

}  // namespace

void merge_moments(const float* parts, int64_t count, int64_t part_stride, int64_t row_stride, int64_t channels,
                   float* out) {
    for (int64_t c = 0; c < channels; ++c) {
        double n = 0, mean = 0, m2 = 0;
        for (int64_t i = 0; i < count; ++i) {
            const float* part = parts + i * part_stride + c;
            const double more = part[0], total = n + more;
            if (more == 0) continue;
            const double delta = part[row_stride] - mean, share = more / total;
            mean += delta * share;
            m2 += part[2 * row_stride] + delta * delta * n * share;
            n = total;
        }
        out[c] = static_cast<float>(n);
        out[channels + c] = static_cast<float>(mean);
        out[2 * channels + c] = static_cast<float>(m2);
    }
}

template <class T>
void depthwise(const Machine& machine, const T* x, const float* bn, const Pictures& p, const Weight<const T>& weight,
               T* y, float* moments) {
    const int64_t wide = padded(p.channels), lanes = machine.kernels.lanes;
    float *taps = memory.weights.get(taps_floats(p.channels, lanes)), *wide_bn = nullptr;
    pack_taps(weight, lanes, taps);
    if (bn != nullptr) {
        wide_bn = memory.vectors.get(6 * wide);
        pad(bn, 6, p.channels, wide_bn);
    }
    const DepthwiseForward<T> conv = {x,
                                      wide_bn,
                                      taps,
                                      y,
                                      nullptr,
                                      p.channels,
                                      p.height,
                                      p.width,
                                      p.stride,
                                      p.out_height(),
                                      p.out_width(),
                                      beyond_caches<T>(p.batch * p.channels * p.out_height() * p.out_width())};
    const Bands bands(p.batch, conv.out_height, 1);
    float* all = memory.parts.get(bands.count() * 3 * wide);
    const Machine workers = for_values(machine, p.batch * p.channels * p.height * p.width);
    run_tasks(workers, bands.count(), depthwise_scratch(p.channels, p.width), [&](int64_t i, float* scratch) {
        tasks<T>(machine.kernels)
            .depthwise(conv, bands.picture(i), bands.begin(i), bands.end(i), all + i * 3 * wide, scratch);
    });
    merge_moments(all, bands.count(), 3 * wide, wide, p.channels, moments);
}

template <class T>
void depthwise_backward(const Machine& machine, const T* dz2, const T* y2, const float* coef2, const T* y1,
                        const float* bn1, const Pictures& p, const Weight<const T>& weight, T* dz1, float* sums,
                        const Weight<T>* dweight) {
    const int64_t wide = padded(p.channels), lanes = machine.kernels.lanes;
    float* taps = memory.weights.get(taps_floats(p.channels, lanes));
    pack_taps(weight, lanes, taps);
    float *coef = memory.vectors.get(9 * wide), *wide_bn = bn1 == nullptr ? nullptr : coef + 3 * wide;
    pad(coef2, 3, p.channels, coef);
    if (bn1 != nullptr) pad(bn1, 6, p.channels, wide_bn);
    const DepthwiseBackward<T> conv = {dz2,           y2,
                                       coef,          y1,
                                       wide_bn,       taps,
                                       dz1,           p.channels,
                                       p.height,      p.width,
                                       p.stride,      p.out_height(),
                                       p.out_width(), beyond_caches<T>(p.batch * p.channels * p.height * p.width)};
    const Bands bands(p.batch, p.height, 2);
    // Of each part the sums, then the weight's gradient.
    float* all = memory.parts.get(bands.count() * 11 * wide);
    const Machine workers = for_values(machine, p.batch * p.channels * p.height * p.width);
    run_tasks(workers, bands.count(), depthwise_scratch(p.channels, conv.out_width), [&](int64_t i, float* scratch) {
        float* part = all + i * 11 * wide;
        tasks<T>(machine.kernels)
            .depthwise_backward(conv, bands.picture(i), bands.begin(i), bands.end(i), part, part + 2 * wide, scratch);
    });
    for (int64_t i = 1; i < bands.count(); ++i) machine.kernels.add(all + i * 11 * wide, 11 * wide, all);
    if (sums != nullptr) {
        for (int64_t r = 0; r < 2; ++r) std::copy(all + r * wide, all + r * wide + p.channels, sums + r * p.channels);
    }
    if (dweight != nullptr) unpack_taps(all + 2 * wide, lanes, *dweight);
}

template <class T>
void bn_apply(const Machine& machine, const T* y, const float* bn, const T* residual, bool relu6, int64_t rows,
              int64_t channels, T* out) {
    float* wide_bn = memory.vectors.get(6 * padded(channels));
    pad(bn, 6, channels, wide_bn);
    const Parts parts = parts_of(rows);
    run_tasks(for_values(machine, rows * channels), parts.count, 0, [&](int64_t i, float*) {
        tasks<T>(machine.kernels).bn_apply(y, wide_bn, residual, relu6, channels, parts.begin(i), parts.end(i), out);
    });
}

template <class T>
void bn_sums(const Machine& machine, const T* grad, const T* y, const float* bn, bool relu6, int64_t rows,
             int64_t channels, float* sums) {
    const int64_t wide = padded(channels);
    float* wide_bn = memory.vectors.get(6 * wide);
    pad(bn, 6, channels, wide_bn);
    const Parts parts = parts_of(rows);
    float* all = memory.parts.get(parts.count * 2 * wide);
    run_tasks(for_values(machine, rows * channels), parts.count, 0, [&](int64_t i, float*) {
        tasks<T>(machine.kernels)
            .bn_sums(grad, y, wide_bn, relu6, channels, parts.begin(i), parts.end(i), all + i * 2 * wide);
    });
    add_parts(machine, all, parts.count, 2, channels, sums);
}

template <class T>
void pool(const Machine& machine, const T* y, const float* bn, int64_t batch, int64_t pixels, int64_t channels,
          T* pooled) {
    float* wide_bn = nullptr;
    if (bn != nullptr) {
        wide_bn = memory.vectors.get(6 * padded(channels));
        pad(bn, 6, channels, wide_bn);
    }
    run_tasks(for_values(machine, batch * pixels * channels), batch, 0, [&](int64_t n, float*) {
        tasks<T>(machine.kernels).pool(y, wide_bn, channels, pixels, n, n + 1, pooled);
    });
}

template <class T>
void pool_backward(const Machine& machine, const T* grad, const T* y, const float* bn, int64_t batch, int64_t pixels,
                   int64_t channels, T* dz, float* sums) {
    const int64_t wide = padded(channels);
    float* wide_bn = memory.vectors.get(6 * wide);
    pad(bn, 6, channels, wide_bn);
    float* all = memory.parts.get(batch * 2 * wide);
    run_tasks(for_values(machine, batch * pixels * channels), batch, 0, [&](int64_t n, float*) {
        tasks<T>(machine.kernels).pool_backward(grad, y, wide_bn, channels, pixels, n, n + 1, dz, all + n * 2 * wide);
    });
    add_parts(machine, all, batch, 2, channels, sums);
}

#define MBV2_INSTANTIATE(T)                                                                                      \
    template void depthwise(const Machine&, const T*, const float*, const Pictures&, const Weight<const T>&, T*, \
                            float*);                                                                             \
    template void depthwise_backward(const Machine&, const T*, const T*, const float*, const T*, const float*,   \
                                     const Pictures&, const Weight<const T>&, T*, float*, const Weight<T>*);     \
    template void bn_apply(const Machine&, const T*, const float*, const T*, bool, int64_t, int64_t, T*);        \
    template void bn_sums(const Machine&, const T*, const T*, const float*, bool, int64_t, int64_t, float*);     \
    template void pool(const Machine&, const T*, const float*, int64_t, int64_t, int64_t, T*);                   \
    template void pool_backward(const Machine&, const T*, const T*, const float*, int64_t, int64_t, int64_t, T*, \
                                float*);
MBV2_INSTANTIATE(float)
MBV2_INSTANTIATE(bf16)

}  // namespace mbv2::cpu::train
