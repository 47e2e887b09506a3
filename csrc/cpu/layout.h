// Where each convolution's weights lie in the packed network.
#pragma once

#include "network.h"

namespace mbv2::cpu {

constexpr int64_t kStemInputs = 27;

// Sections of the packed weights, each aligned to 64 bytes, handed out in the order of `weight_sizes`.
class Sections {
 public:
    explicit Sections(const Kernels& kernels, const float* packed = nullptr)
        : lanes_(kernels.lanes), panel_(kernels.panel), packed_(packed) {}

    Pointwise pointwise(int64_t inputs, int64_t outputs, bool relu6) {
        const int64_t vectors = ceil_div(outputs, lanes_);
        const float* weights = take(vectors * lanes_ * inputs);
        return {weights, take(vectors * lanes_), inputs, Panels(vectors, panel_), relu6};
    }

    const float* depthwise(int64_t channels) { return take(ceil_div(channels, lanes_) * lanes_ * 10); }

    int64_t taken() const { return taken_; }

 private:
    const float* take(int64_t floats) {
        const float* section = packed_ == nullptr ? nullptr : packed_ + taken_;
        taken_ += ceil_div(floats, 16) * 16;
        return section;
    }

    int64_t lanes_;
    int panel_;
    const float* packed_;
    int64_t taken_ = 0;
};

// Every convolution of the network on its packed weights.
struct Network {
    Pointwise expand[Plan::kMostBlocks];  // the stem for the first
    const float* depthwise[Plan::kMostBlocks];
    Pointwise project[Plan::kMostBlocks];
    Pointwise head, classifier;
    int64_t size;

    // With `packed` null only `size` means anything.
    Network(const Plan& plan, const Kernels& kernels, const float* packed) {
        Sections sections(kernels, packed);
        for (int64_t i = 0; i < plan.block_count; ++i) {
            const Block& block = plan.blocks[i];
            expand[i] = sections.pointwise(i == 0 ? kStemInputs : block.inputs, block.hidden, true);
            depthwise[i] = sections.depthwise(block.hidden);
            project[i] = sections.pointwise(block.hidden, block.outputs, false);
        }
        head = sections.pointwise(plan.blocks[plan.block_count - 1].outputs, plan.last_channels, true);
        classifier = sections.pointwise(plan.last_channels, plan.classes, false);
        size = sections.taken();
    }
};

}  // namespace mbv2::cpu
