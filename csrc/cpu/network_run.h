// The run of the whole network.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>

#include "network_block.h"

namespace mbv2::cpu {

inline int64_t halved(int64_t size) { return (size + 1) / 2; }

// Adds the time since it was made or last asked to a part.
class Watch {
 public:
    explicit Watch(Times* times) : times_(times) {
        if (times_ != nullptr) start_ = Clock::now();
    }

    void part(int64_t index) {
        if (times_ == nullptr) return;
        const Clock::time_point now = Clock::now();
        times_->parts[index] += std::chrono::duration<double>(now - start_).count();
        start_ = now;
    }

 private:
    using Clock = std::chrono::steady_clock;
    Times* times_;
    Clock::time_point start_;
};

inline int64_t activation_size(const Plan& plan, int64_t lanes, int64_t height, int64_t width) {
    int64_t most = 0;
    for (int64_t i = 0; i < plan.block_count; ++i) {
        const Block& block = plan.blocks[i];
        height = (height - 1) / block.stride + 1;
        width = (width - 1) / block.stride + 1;
        most = std::max(most, ceil_div(block.outputs, lanes) * lanes * height * width);
    }
    return most;
}

// Everything up to the pooled features of picture `n`, into planes [last channels / lanes][batch][lanes].
template <class F>
void features(const Plan& plan, const Network<F>& network, const Kernels<F>& kernels, const Image& image, int64_t n,
              const Threads& threads, typename F::Activation* pooled, Watch& watch) {
    const int64_t lanes = kernels.lanes;
    int64_t height = halved(image.height), width = halved(image.width);
    const int64_t size = activation_size(plan, lanes, height, width);
    auto* in = scratch.activations[0].get<typename F::Activation>(size);
    auto* out = scratch.activations[1].get<typename F::Activation>(size);
    const Stem stem = {network.stem,         image.data + n * image.batch_stride,
                       image.channel_stride, image.row_stride,
                       image.column_stride,  image.height,
                       image.width};
    for (int64_t i = 0; i < plan.block_count; ++i) {
        const BlockRun<F> block = {kernels,
                                   network.expand[i],
                                   network.depthwise[i],
                                   network.project[i],
                                   i == 0 ? &stem : nullptr,
                                   i == 0 ? nullptr : in,
                                   out,
                                   height,
                                   width,
                                   plan.blocks[i].stride,
                                   plan.blocks[i].residual};
        run_block(block, threads);
        watch.part(i);
        height = block.out_height();
        width = block.out_width();
        std::swap(in, out);
    }
    const int64_t pixels = height * width;
    const Panels& panels = network.head.panels;
    parallel(threads, panels.count, [&](int64_t begin, int64_t end) {
        auto* hidden = scratch.hidden.get<typename F::Hidden>(3 * lanes * pixels);
        for (int64_t p = begin; p < end; ++p) {
            kernels.expand(network.head, p, in, pixels * lanes, pixels, hidden, pixels * lanes);
            for (int64_t v = 0; v < panels.size(p); ++v) {
                auto* to = pooled + ((panels.first(p) + v) * image.batch + n) * lanes;
                kernels.mean(network.head, panels.first(p) + v, hidden + v * pixels * lanes, pixels, to);
            }
        }
    });
    watch.part(plan.block_count);
}

template <class F>
void classify(const Plan& plan, const Network<F>& network, const Kernels<F>& kernels,
              const typename F::Activation* pooled, int64_t batch, const Threads& threads, float* logits) {
    const int64_t lanes = kernels.lanes;
    const Panels& panels = network.classifier.panels;
    auto* planes = scratch.logits.get<float>(panels.vectors * lanes * batch);
    parallel(threads, panels.count, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            float* to = planes + panels.first(p) * batch * lanes;
            kernels.classify(network.classifier, p, pooled, batch * lanes, batch, to, batch * lanes);
        }
    });
    for (int64_t n = 0; n < batch; ++n) {
        for (int64_t c = 0; c < plan.classes; c += lanes) {
            std::memcpy(logits + n * plan.classes + c, planes + (c * batch + n * lanes),
                        static_cast<size_t>(std::min(lanes, plan.classes - c)) * sizeof(float));
        }
    }
}

template <class F>
void run(const Plan& plan, const Kernels<F>& kernels, const std::byte* packed, const Image& image,
         const Threads& threads, float* logits, Times* times) {
    const Network<F> network(plan, kernels, packed);
    const int64_t features_of_all = network.head.panels.vectors * kernels.lanes * image.batch;
    auto* pooled = scratch.pooled.get<typename F::Activation>(features_of_all);
    // As many pictures as divide evenly go one to a thread; the rest are each shared between all threads.
    const int64_t apart = threads.count == 1 ? image.batch : image.batch / threads.count * threads.count;
    if (apart > 0) {
        const Threads alone = {1, nullptr};
        parallel(threads, apart, [&](int64_t begin, int64_t end) {
            Watch watch(times);
            for (int64_t n = begin; n < end; ++n) features(plan, network, kernels, image, n, alone, pooled, watch);
        });
    }
    Watch watch(times);
    for (int64_t n = apart; n < image.batch; ++n) features(plan, network, kernels, image, n, threads, pooled, watch);
    classify(plan, network, kernels, pooled, image.batch, threads, logits);
    watch.part(plan.block_count + 1);
}

}  // namespace mbv2::cpu
