// From plain weights to the layout the kernels read.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "layout.h"

namespace mbv2::cpu {
namespace {

void pack_pointwise(const Pointwise& to, int lanes, int64_t outputs, const float* weights, const float* bias) {
    float* matrix = const_cast<float*>(to.weights);
    std::copy(bias, bias + outputs, const_cast<float*>(to.bias));
    for (int64_t p = 0; p < to.panels.count; ++p) {
        const int64_t width = to.panels.size(p) * lanes, first = to.panels.first(p) * lanes;
        for (int64_t o = first; o < std::min(first + width, outputs); ++o) {
            for (int64_t k = 0; k < to.inputs; ++k) {
                matrix[first * to.inputs + k * width + (o - first)] = weights[o * to.inputs + k];
            }
        }
    }
}

void pack_stem(const Pointwise& to, int lanes, int64_t outputs, const float* weights, const float* bias) {
    // From [out, channel, row, column] to the order row, channel, column of the stem kernel's runs.
    std::vector<float> ordered(static_cast<size_t>(outputs * kStemInputs));
    for (int64_t o = 0; o < outputs; ++o) {
        for (int64_t k = 0; k < kStemInputs; ++k) {
            const int64_t channel = k / 9, row = k / 3 % 3, column = k % 3;
            ordered[o * kStemInputs + row * 9 + channel * 3 + column] = weights[o * kStemInputs + k];
        }
    }
    pack_pointwise(to, lanes, outputs, ordered.data(), bias);
}

void pack_depthwise(float* to, int lanes, int64_t channels, const float* weights, const float* bias) {
    for (int64_t c = 0; c < channels; ++c) {
        float* vector = to + c / lanes * lanes * 10 + c % lanes;
        for (int64_t tap = 0; tap < 9; ++tap) vector[tap * lanes] = weights[c * 9 + tap];
        vector[9 * lanes] = bias[c];
    }
}

}  // namespace

Plan::Plan(const int64_t* numbers, int64_t count) {
    const int64_t given = (count - 2) / 5;
    if (count < 7 || count != 2 + 5 * given || given > kMostBlocks) {
        throw std::invalid_argument("a plan of " + std::to_string(count) + " numbers describes no network");
    }
    classes = numbers[0];
    last_channels = numbers[1];
    block_count = given;
    bool right = classes > 0 && last_channels > 0;
    for (int64_t i = 0; i < given; ++i) {
        const int64_t* block = numbers + 2 + 5 * i;
        blocks[i] = {block[0], block[1], block[2], block[3], block[4] != 0};
        const int64_t inputs = i == 0 ? block[1] : blocks[i - 1].outputs;
        right = right && block[0] == inputs && block[0] > 0 && block[1] > 0 && block[2] > 0;
        right = right && (block[3] == 1 || block[3] == 2);
        right = right && (block[4] == 0 || (block[0] == block[2] && block[3] == 1));
    }
    if (!right) throw std::invalid_argument("the plan's blocks do not follow from one another");
}

int64_t packed_size(const Plan& plan, const Kernels& kernels) { return Network(plan, kernels, nullptr).size; }

std::vector<int64_t> weight_sizes(const Plan& plan) {
    std::vector<int64_t> sizes;
    const auto add = [&](int64_t outputs, int64_t inputs) { sizes.insert(sizes.end(), {outputs * inputs, outputs}); };
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

void pack(const Plan& plan, const Kernels& kernels, const float* const* weights, float* packed) {
    const Network network(plan, kernels, packed);
    std::fill(packed, packed + network.size, 0.0f);
    const int lanes = kernels.lanes;
    for (int64_t i = 0; i < plan.block_count; ++i, weights += 6) {
        const Block& block = plan.blocks[i];
        (i == 0 ? pack_stem : pack_pointwise)(network.expand[i], lanes, block.hidden, weights[0], weights[1]);
        pack_depthwise(const_cast<float*>(network.depthwise[i]), lanes, block.hidden, weights[2], weights[3]);
        pack_pointwise(network.project[i], lanes, block.outputs, weights[4], weights[5]);
    }
    pack_pointwise(network.head, lanes, plan.last_channels, weights[0], weights[1]);
    pack_pointwise(network.classifier, lanes, plan.classes, weights[2], weights[3]);
}

}  // namespace mbv2::cpu
