// Small networks of awkward shapes, run on given kernels; for the programs that test_cpu_network.py builds.
#pragma once

#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "network.h"

using namespace mbv2::cpu;

namespace {

// Classes, last channels; of each block inputs, hidden, outputs, stride, shortcut.
const std::vector<std::vector<int64_t>> kPlans = {
    {10, 24, 8, 8, 8, 1, 1, 8, 48, 8, 2, 0, 8, 48, 8, 1, 1},
    {7, 40, 20, 20, 12, 2, 0, 12, 70, 12, 1, 1, 12, 72, 33, 2, 0},
    {1001, 130, 32, 32, 16, 1, 0, 16, 96, 24, 2, 0, 24, 144, 24, 1, 1},
};
constexpr int64_t kSizes[][2] = {{1, 1}, {2, 3}, {5, 31}, {17, 1}, {1, 40}, {37, 53}, {130, 150}};

void two_threads(int64_t count, void* context, void (*body)(void*, int64_t, int64_t)) {
    std::thread other([&] { body(context, 0, count / 2); });
    body(context, count / 2, count);
    other.join();
}

// The vector of exactly these values, so that one step beyond them is seen.
std::vector<float> values(int64_t count, int seed) {
    std::vector<float> result(static_cast<size_t>(count));
    unsigned state = static_cast<unsigned>(seed) * 2654435761u + 1;
    for (float& value : result) {
        state = state * 1664525u + 1013904223u;
        value = static_cast<float>(state >> 8) / 8388608.0f - 1.0f;
    }
    return result;
}

struct Free {
    void operator()(std::byte* memory) const { std::free(memory); }
};

Image image_of(const std::vector<float>& picture, int64_t batch, int64_t height, int64_t width, bool channels_last) {
    return {picture.data(),
            batch,
            height,
            width,
            3 * height * width,
            channels_last ? 1 : height * width,
            channels_last ? 3 * width : width,
            channels_last ? 3 : 1};
}

template <class F>
std::vector<float> logits(const Kernels<F>& kernels, const std::vector<int64_t>& numbers, int64_t batch, int64_t height,
                          int64_t width, bool channels_last, int threads) {
    const Plan plan(numbers.data(), static_cast<int64_t>(numbers.size()));
    std::vector<std::vector<float>> weights;
    std::vector<const float*> pointers;
    for (int64_t size : weight_sizes<F>(plan)) weights.push_back(values(size, static_cast<int>(weights.size())));
    for (const auto& weight : weights) pointers.push_back(weight.data());
    const size_t bytes = static_cast<size_t>(packed_size(plan, kernels));
    const std::unique_ptr<std::byte, Free> packed(static_cast<std::byte*>(std::aligned_alloc(64, bytes)));
    pack(plan, kernels, pointers.data(), packed.get());
    const std::vector<float> picture = values(batch * 3 * height * width, 99);
    const Image image = image_of(picture, batch, height, width, channels_last);
    std::vector<float> result(static_cast<size_t>(batch * plan.classes));
    run(plan, kernels, packed.get(), image, {threads, two_threads}, result.data());
    return result;
}

}  // namespace
