// From plain weights to the layout the kernels read.
#pragma once

#include <algorithm>
#include <vector>

#include "layout.h"

namespace mbv2::cpu {

// What each output has beside its weights: from [output_vectors, outputs] to [vectors][output_vectors][lanes].
template <class F>
void pack_outputs(const float* to, int lanes, int64_t outputs, const float* values) {
    float* packed = const_cast<float*>(to);
    for (int64_t o = 0; o < outputs; ++o) {
        float* vector = packed + o / lanes * F::output_vectors * lanes + o % lanes;
        for (int i = 0; i < F::output_vectors; ++i) vector[i * lanes] = values[i * outputs + o];
    }
}

// By runs of inputs whose places in a panel stay in L1.
template <class F, int Group, class Weight, class Convert>
void pack_pointwise(const Pointwise<Weight>& to, int lanes, int64_t outputs, const float* weights, const float* values,
                    const Convert& convert) {
    constexpr int64_t kRun = 64;
    const int64_t padded = ceil_div(to.inputs, Group) * Group;
    pack_outputs<F>(to.outputs, lanes, outputs, values);
    for (int64_t p = 0; p < to.panels.count; ++p) {
        const int64_t width = to.panels.size(p) * lanes, first = to.panels.first(p) * lanes;
        Weight* panel = const_cast<Weight*>(to.weights) + first * padded;
        for (int64_t begin = 0; begin < to.inputs; begin += kRun) {
            const int64_t end = std::min(begin + kRun, to.inputs);
            for (int64_t o = 0; o < std::min(width, outputs - first); ++o) {
                const float* from = weights + (first + o) * to.inputs;
                for (int64_t k = begin; k < end; ++k) {
                    panel[(k / Group * width + o) * Group + k % Group] = convert(from[k]);
                }
            }
        }
    }
}

template <class F>
void pack_stem(const Pointwise<float>& to, int lanes, int64_t outputs, const float* weights, const float* values) {
    // From [out, channel, row, column] to the order row, channel, column of the stem kernel's runs.
    std::vector<float> ordered(static_cast<size_t>(outputs * kStemInputs));
    for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t k = 0; k < kStemInputs; ++k) {
            const int64_t channel = k / 9, row = k / 3 % 3, column = k % 3;
            ordered[o * kStemInputs + row * 9 + channel * 3 + column] = weights[o * kStemInputs + k];
        }
    }
    pack_pointwise<F, 1>(to, lanes, outputs, ordered.data(), values, [](float value) { return value; });
}

template <class F>
void pack_depthwise(const DepthwiseWeights<typename F::Tap>& to, int lanes, int64_t channels, const float* weights,
                    const float* values) {
    auto* taps = const_cast<typename F::Tap*>(to.taps);
    pack_outputs<F>(to.outputs, lanes, channels, values);
    for (int64_t c = 0; c < channels; ++c) {
        auto* vector = taps + c / lanes * lanes * 9 + c % lanes;
        for (int64_t tap = 0; tap < 9; ++tap) vector[tap * lanes] = F::tap(weights[c * 9 + tap]);
    }
}

template <class F>
int64_t packed_size(const Plan& plan, const Kernels<F>& kernels) {
    return Network<F>(plan, kernels, nullptr).bytes;
}

template <class F>
std::vector<int64_t> weight_sizes(const Plan& plan) {
    std::vector<int64_t> sizes;
    const auto add = [&](int64_t outputs, int64_t inputs) {
        sizes.insert(sizes.end(), {outputs * inputs, outputs * F::output_vectors});
    };
    for (int64_t i = 0; i < plan.block_count; ++i) {
        const Block& block = plan.blocks[i];
        add(block.hidden, i == 0 ? kStemInputs : block.inputs);
        add(block.hidden, 9);
        add(block.outputs, block.hidden);
    }
    add(plan.last_channels, plan.blocks[plan.block_count - 1].outputs);
    add(plan.classes, plan.last_channels);
    return sizes;
}

template <class F>
void pack(const Plan& plan, const Kernels<F>& kernels, const float* const* weights, std::byte* packed) {
    const Network<F> network(plan, kernels, packed);
    std::fill(packed, packed + network.bytes, std::byte{0});
    const int lanes = kernels.lanes;
    const auto pack_one = [&](const typename Network<F>::Conv& to, int64_t outputs, const float* const* from) {
        pack_pointwise<F, F::group>(to, lanes, outputs, from[0], from[1], [](float value) { return F::weight(value); });
    };
    for (int64_t i = 0; i < plan.block_count; ++i, weights += 6) {
        const Block& block = plan.blocks[i];
        if (i == 0) {
            pack_stem<F>(network.stem, lanes, block.hidden, weights[0], weights[1]);
        } else {
            pack_one(network.expand[i], block.hidden, weights);
        }
        pack_depthwise<F>(network.depthwise[i], lanes, block.hidden, weights[2], weights[3]);
        pack_one(network.project[i], block.outputs, weights + 4);
    }
    pack_one(network.head, plan.last_channels, weights);
    pack_one(network.classifier, plan.classes, weights + 2);
}

}  // namespace mbv2::cpu
