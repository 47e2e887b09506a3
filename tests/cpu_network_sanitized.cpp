// Runs small networks of awkward shapes on every instruction set of this machine, in float32 and in bfloat16; built
// with the address and undefined-behaviour sanitizers by test_cpu_network.py. Prints the number of runs.
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "cpu_network_runs.h"
#include "isa.h"

namespace {

// How many runs were right, or none.
template <class F>
int runs(const Kernels<F>& kernels) {
    int done = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            const int64_t batch = size[0] > 100 ? 1 : 3;
            const auto alone = logits(kernels, plan, batch, size[0], size[1], false, 1);
            const auto together = logits(kernels, plan, batch, size[0], size[1], false, 2);
            logits(kernels, plan, batch, size[0], size[1], true, 2);
            for (size_t i = 0; i < alone.size(); ++i) {
                if (alone[i] != together[i] || std::isnan(alone[i])) {
                    std::printf("%s %s: logit %zu differs between one and two threads\n", F::name, kernels.name, i);
                    return 0;
                }
            }
            done += 3;
        }
    }
    return done;
}

// Runs on every instruction set of the format; -1 if one was wrong.
template <class F>
int all_runs() {
    int done = 0;
    for (const char* name : {"avx512", "avx2", "portable"}) {
        const Kernels<F>* kernels = nullptr;
        try {
            kernels = &mbv2::cpu::kernels<F>(name);
        } catch (const std::runtime_error&) {
            continue;
        }
        const int right = runs(*kernels);
        if (right == 0) return -1;
        done += right;
    }
    return done;
}

}  // namespace

int main() {
    const int full = all_runs<Float32>(), half = all_runs<Bfloat16>();
    if (full < 0 || half < 0) return 1;
    std::printf("%d runs\n", full + half);
    return 0;
}
