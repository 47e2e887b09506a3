// Runs small networks of awkward shapes on the AVX-512 kernels, built with SIMDe by test_cpu_network.py, and on the
// portable ones, and compares the logits. Prints the number of networks.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cpu_network_runs.h"

int main() {
    int networks = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            for (bool channels_last : {false, true}) {
                const auto got = logits(*avx512_kernels(), plan, 2, size[0], size[1], channels_last, 2);
                const auto wanted = logits(*portable_kernels(), plan, 2, size[0], size[1], channels_last, 1);
                float largest = 0, difference = 0;
                for (size_t i = 0; i < got.size(); ++i) {
                    largest = std::max(largest, std::abs(wanted[i]));
                    difference = std::max(difference, std::abs(got[i] - wanted[i]));
                }
                // Written so that NaN fails.
                if (!(difference <= 1e-5f * largest) || largest == 0) {
                    std::printf("%d x %d: differ by %g of %g\n", static_cast<int>(size[0]), static_cast<int>(size[1]),
                                static_cast<double>(difference), static_cast<double>(largest));
                    return 1;
                }
                ++networks;
            }
        }
    }
    std::printf("%d networks\n", networks);
    return 0;
}
