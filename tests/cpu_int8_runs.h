// Small int8 networks of awkward shapes; for the programs that test_cpu_int8.py and test_cpu_network.py build.
#pragma once

#include <cmath>

#include "cpu_network_runs.h"

namespace {

// Whole numbers from -most to most.
std::vector<float> whole(int64_t count, int seed, float most) {
    std::vector<float> result = values(count, seed);
    for (float& value : result) value = std::nearbyint(value * most);
    return result;
}

// What a network's outputs have beside their weights: bias, multiplier, shortcut, offset.
std::vector<float> of_outputs(int64_t outputs, int seed, float bias, float multiplier) {
    std::vector<float> result = whole(4 * outputs, seed, bias);
    for (int64_t o = 0; o < outputs; ++o) {
        result[outputs + o] = multiplier;
        result[2 * outputs + o] = 9000.0f;
        result[3 * outputs + o] = 6000.0f;
    }
    return result;
}

// As `logits`, with weights and a picture that int8 can hold.
std::vector<float> int8_logits(const Kernels<Int8>& kernels, const std::vector<int64_t>& numbers, int64_t batch,
                               int64_t height, int64_t width, bool channels_last, int threads) {
    const Plan plan(numbers.data(), static_cast<int64_t>(numbers.size()));
    const std::vector<int64_t> sizes = weight_sizes<Int8>(plan);
    std::vector<std::vector<float>> weights;
    for (size_t i = 0; i < sizes.size(); i += 2) {
        const int seed = static_cast<int>(i);
        const int64_t outputs = sizes[i + 1] / 4;
        const bool stem = i == 0, last = i + 2 == sizes.size(), head = i + 4 == sizes.size();
        // Of a block's convolutions the first block has no expansion: stem, depthwise, project, then in threes.
        const bool depthwise = !stem && !last && !head && sizes[i] == 9 * outputs && i % 6 == 2;
        // The weights of four inputs of one sign sum to at most 128.
        weights.push_back(whole(sizes[i], seed, stem || depthwise ? 6000.0f : 31.0f));
        const float multiplier = depthwise ? 600.0f : 0.5f;
        weights.push_back(of_outputs(outputs, seed + 1, depthwise ? 2000.0f : 20000.0f, multiplier));
        if (head) {
            for (int64_t o = 0; o < outputs; ++o) weights.back()[2 * outputs + o] = 255.0f / 32767;
        }
    }
    std::vector<const float*> pointers;
    for (const auto& weight : weights) pointers.push_back(weight.data());
    const size_t bytes = static_cast<size_t>(packed_size(plan, kernels));
    const std::unique_ptr<std::byte, Free> packed(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
    pack(plan, kernels, pointers.data(), packed.get());
    // In sixteenths, so that the stem's float sums are exact in any order.
    std::vector<float> picture = whole(batch * 3 * height * width, 99, 32.0f);
    for (float& value : picture) value /= 16;
    const Image image = image_of(picture, batch, height, width, channels_last);
    std::vector<float> result(static_cast<size_t>(batch * plan.classes));
    run(plan, kernels, packed.get(), image, {threads, two_threads}, result.data());
    return result;
}

}  // namespace
