// Runs small networks of awkward shapes on every instruction set of this machine; built with the address and
// undefined-behaviour sanitizers by test_cpu_network.py. Prints the number of runs.
#include <cmath>
#include <cstdio>
#include <stdexcept>

#include "cpu_network_runs.h"
#include "isa.h"

int main() {
    int runs = 0;
    for (const char* name : {"avx512", "avx2", "portable"}) {
        const Kernels<Float32>* kernels = nullptr;
        try {
            kernels = &mbv2::cpu::kernels(name);
        } catch (const std::runtime_error&) {
            continue;
        }
        for (const auto& plan : kPlans) {
            for (const auto& size : kSizes) {
                const int64_t batch = size[0] > 100 ? 1 : 3;
                const auto alone = logits(*kernels, plan, batch, size[0], size[1], false, 1);
                const auto together = logits(*kernels, plan, batch, size[0], size[1], false, 2);
                logits(*kernels, plan, batch, size[0], size[1], true, 2);
                for (size_t i = 0; i < alone.size(); ++i) {
                    if (alone[i] != together[i] || std::isnan(alone[i])) {
                        std::printf("%s: logit %zu differs between one and two threads\n", name, i);
                        return 1;
                    }
                }
                runs += 3;
            }
        }
    }
    std::printf("%d runs\n", runs);
    return 0;
}
