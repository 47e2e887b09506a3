// Runs small networks of awkward shapes on every instruction set of this machine, in float32, bfloat16 and int8;
// built
// with the address and undefined-behaviour sanitizers by test_cpu_network.py. Prints the number of runs.
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "cpu_int8_runs.h"
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

// The same of int8, whose bits are the portable kernels' besides.
int runs(const Kernels<Int8>& kernels) {
    int done = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            for (int64_t batch : {1, 3}) {
                if (batch > 1 && size[0] > 100) continue;
                const auto wanted = int8_logits(*int8_portable_kernels(), plan, batch, size[0], size[1], false, 1);
                int8_logits(kernels, plan, batch, size[0], size[1], true, 2);
                for (int threads : {1, 2}) {
                    if (int8_logits(kernels, plan, batch, size[0], size[1], false, threads) != wanted) {
                        std::printf("int8 %s: %d threads differ from the portable kernels\n", kernels.name, threads);
                        return 0;
                    }
                }
                done += 3;
            }
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
    const int full = all_runs<Float32>(), half = all_runs<Bfloat16>(), bytes = all_runs<Int8>();
    if (full < 0 || half < 0 || bytes < 0) return 1;
    std::printf("%d runs\n", full + half + bytes);
    return 0;
}
