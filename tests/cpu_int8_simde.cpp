// Runs small int8 networks of awkward shapes on the AVX-512 kernels, built with SIMDe by test_cpu_int8.py, and on the
// portable ones, and compares the logits bit for bit. Prints the number of networks.
#include <cmath>
#include <cstdio>
#include <cstring>

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

std::vector<float> int8_logits(const Kernels<Int8>& kernels, const std::vector<int64_t>& numbers, int64_t height,
                               int64_t width, int threads) {
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
    std::vector<float> picture = whole(2 * 3 * height * width, 99, 32.0f);
    for (float& value : picture) value /= 16;
    const Image image = {picture.data(), 2, height, width, 3 * height * width, height * width, width, 1};
    std::vector<float> result(static_cast<size_t>(2 * plan.classes));
    run(plan, kernels, packed.get(), image, {threads, two_threads}, result.data());
    return result;
}

}  // namespace

int main() {
    int networks = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            const auto got = int8_logits(*int8_avx512_kernels(), plan, size[0], size[1], 2);
            const auto wanted = int8_logits(*int8_portable_kernels(), plan, size[0], size[1], 1);
            float spread = 0;
            for (float logit : wanted) spread += std::abs(logit - wanted[0]);
            if (std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)) != 0 || !(spread > 0)) {
                std::printf("%d x %d: not the same, %g and %g of spread %g\n", (int)size[0], (int)size[1], got[1],
                            wanted[1], spread);
                return 1;
            }
            ++networks;
        }
    }
    std::printf("%d networks\n", networks);
    return 0;
}
