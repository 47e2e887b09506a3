// Where each convolution's weights lie in the packed network.
#pragma once

#include <cstddef>

#include "network.h"

namespace mbv2::cpu {

constexpr int64_t kStemInputs = 27;

// Sections of the packed weights, each aligned to 64 bytes, handed out in the order of `weight_sizes`.
template <class F>
class Sections {
 public:
    Sections(const Kernels<F>& kernels, const std::byte* packed)
        : lanes_(kernels.lanes), panel_(kernels.panel), packed_(packed) {}

    template <class Weight>
    Pointwise<Weight> pointwise(int64_t inputs, int64_t outputs, int group) {
        const int64_t vectors = ceil_div(outputs, lanes_);
        const Weight* weights = take<Weight>(vectors * lanes_ * ceil_div(inputs, group) * group);
        return {weights, of_outputs(vectors), inputs, Panels(vectors, panel_)};
    }

    DepthwiseWeights<typename F::Tap> depthwise(int64_t channels) {
        const int64_t vectors = ceil_div(channels, lanes_);
        const auto* taps = take<typename F::Tap>(vectors * 9 * lanes_);
        return {taps, of_outputs(vectors)};
    }

    int64_t taken() const { return taken_; }

 private:
    const float* of_outputs(int64_t vectors) { return take<float>(vectors * F::output_vectors * lanes_); }

    template <class T>
    const T* take(int64_t count) {
        const std::byte* section = packed_ == nullptr ? nullptr : packed_ + taken_;
        taken_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 64) * 64;
        return reinterpret_cast<const T*>(section);
    }

    int64_t lanes_;
    int panel_;
    const std::byte* packed_;
    int64_t taken_ = 0;
};

// Every convolution of the network on its packed weights.
template <class F>
struct Network {
    using Conv = Pointwise<typename F::Weight>;

    Pointwise<float> stem;
    Conv expand[Plan::kMostBlocks];  // not of the first
    DepthwiseWeights<typename F::Tap> depthwise[Plan::kMostBlocks];
    Conv project[Plan::kMostBlocks];
    Conv head, classifier;
    int64_t bytes;

    // With `packed` null only `bytes` means anything.
    Network(const Plan& plan, const Kernels<F>& kernels, const std::byte* packed) {
        using Weight = typename F::Weight;
        Sections<F> sections(kernels, packed);
        for (int64_t i = 0; i < plan.block_count; ++i) {
            const Block& block = plan.blocks[i];
            if (i == 0) {
                stem = sections.template pointwise<float>(kStemInputs, block.hidden, 1);
            } else {
                expand[i] = sections.template pointwise<Weight>(block.inputs, block.hidden, F::group);
            }
            depthwise[i] = sections.depthwise(block.hidden);
            project[i] = sections.template pointwise<Weight>(block.hidden, block.outputs, F::group);
        }
        const int64_t last = plan.blocks[plan.block_count - 1].outputs;
        head = sections.template pointwise<Weight>(last, plan.last_channels, F::group);
        classifier = sections.template pointwise<Weight>(plan.last_channels, plan.classes, F::group);
        bytes = sections.taken();
    }
};

}  // namespace mbv2::cpu
