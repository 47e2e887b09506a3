// What benchmarks ask of a CPU, in torch.library, namespace mbv2: its peak, where a run's time goes, and how long a
// cache line takes from one core to another.
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <limits>
#include <string>
#include <thread>
#include <vector>

#include "ops_cpu_format.h"

namespace mbv2 {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Operations per second of one thread's multiply-adds, the best of a few tries of some 0.2 ms.
double fma_rate(const std::string& isa, const std::string& format) {
    alignas(64) float in[64], out[16];
    for (int i = 0; i < 64; ++i) in[i] = 0.5f + 0.001f * static_cast<float>(i);
    constexpr int64_t kSteps = 50000;
    return cpu::with_format(format, [&](auto f) {
        const auto& kernels = cpu::kernels<decltype(f)>(isa.c_str());
        double best = 0;
        for (int i = 0; i < 10; ++i) {
            const auto start = Clock::now();
            const int64_t done = kernels.multiply_adds(kSteps, in, out);
            best = std::max(best, 2.0 * static_cast<double>(done) / seconds_since(start));
        }
        return best;
    });
}

// Seconds that one of two threads waits for the other to answer through a cache line, one way: the best of batches
// of 200 exchanges within a second. Infinite if the threads never ran side by side.
double handover() {
    constexpr int kExchanges = 200;
    alignas(64) std::atomic<int> turn{0};
    std::atomic<bool> stop{false};
    std::thread other([&] {
        for (int next = 1; !stop.load(std::memory_order_relaxed);) {
            if (turn.load(std::memory_order_acquire) == next) {
                turn.store(next + 1, std::memory_order_release);
                next += 2;
            }
        }
    });
    double best = std::numeric_limits<double>::infinity();
    int mine = 0;
    for (const auto start = Clock::now(); seconds_since(start) < 1 && mine < 2000 * kExchanges;) {
        const auto batch = Clock::now();
        for (int i = 0; i < kExchanges; ++i, mine += 2) {
            turn.store(mine + 1, std::memory_order_release);
            while (turn.load(std::memory_order_acquire) != mine + 2) {
            }
        }
        best = std::min(best, seconds_since(batch) / (2 * kExchanges));
    }
    stop = true;
    other.join();
    return best;
}

// Seconds that one thread takes for each part of the network: blocks, head, classifier.
at::Tensor network_times(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& plan_tensor,
                         const std::string& isa, const std::string& format) {
    TORCH_CHECK(x.is_contiguous() && x.scalar_type() == at::kFloat && x.dim() == 4 && x.size(1) == 3 && x.numel() > 0,
                "the input must be contiguous float32 [N, 3, H, W]");
    const cpu::Plan plan(plan_tensor.const_data_ptr<int64_t>(), plan_tensor.numel());
    const cpu::Image image = {
        x.const_data_ptr<float>(), x.size(0), x.size(2), x.size(3), x.stride(0), x.stride(1), x.stride(2), 1};
    std::vector<float> logits(static_cast<size_t>(x.size(0) * plan.classes));
    cpu::Times times = {};
    cpu::with_format(format, [&](auto f) {
        const auto& kernels = cpu::kernels<decltype(f)>(isa.c_str());
        const std::byte* weights = cpu::packed_bytes(packed, plan, kernels);
        cpu::run(plan, kernels, weights, image, {1, nullptr}, logits.data(), &times);
    });
    at::Tensor seconds = at::zeros({plan.block_count + 2}, at::kDouble);
    std::copy_n(times.parts, plan.block_count + 2, seconds.mutable_data_ptr<double>());
    return seconds;
}

TORCH_LIBRARY_FRAGMENT(mbv2, library) {
    library.def("cpu_fma_rate(str isa, str format='float32') -> float", fma_rate);
    library.def("cpu_handover() -> float", handover);
    library.def("cpu_network_times(Tensor x, Tensor packed, Tensor plan, str isa, str format='float32') -> Tensor",
                network_times);
}

}  // namespace
}  // namespace mbv2
