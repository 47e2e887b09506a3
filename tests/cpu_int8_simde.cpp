// Runs small int8 networks of awkward shapes on the AVX-512 kernels, built with SIMDe by test_cpu_int8.py, and on the
// portable ones, and compares the logits bit for bit. Prints the number of networks.
#include <cmath>
#include <cstdio>
#include <cstring>

#include "cpu_int8_runs.h"

int main() {
    int networks = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            const auto got = int8_logits(*int8_avx512_kernels(), plan, 2, size[0], size[1], false, 2);
            const auto wanted = int8_logits(*int8_portable_kernels(), plan, 2, size[0], size[1], false, 1);
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
