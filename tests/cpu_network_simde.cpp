// Runs small networks of awkward shapes on the AVX-512 kernels, built with SIMDe by test_cpu_network.py, and on the
// portable ones, and compares the logits, in float32 and in bfloat16. Prints the number of networks.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "cpu_network_runs.h"

namespace {

// Whether the logits differ by no more than `tolerance` of the largest.
template <class F>
bool same(const Kernels<F>& avx512, const Kernels<F>& portable, const std::vector<int64_t>& plan, int64_t height,
          int64_t width, bool channels_last, float tolerance) {
    const auto got = logits(avx512, plan, 2, height, width, channels_last, 2);
    const auto wanted = logits(portable, plan, 2, height, width, channels_last, 1);
    float largest = 0, difference = 0;
    for (size_t i = 0; i < got.size(); ++i) {
        largest = std::max(largest, std::abs(wanted[i]));
        difference = std::max(difference, std::abs(got[i] - wanted[i]));
    }
    // Written so that NaN fails.
    if (difference <= tolerance * largest && largest > 0) return true;
    std::printf("%s, %d x %d: differ by %g of %g\n", F::name, static_cast<int>(height), static_cast<int>(width),
                static_cast<double>(difference), static_cast<double>(largest));
    return false;
}

}  // namespace

int main() {
    int networks = 0;
    for (const auto& plan : kPlans) {
        for (const auto& size : kSizes) {
            for (bool last : {false, true}) {
                if (!same(*avx512_kernels(), *portable_kernels(), plan, size[0], size[1], last, 1e-5f)) return 1;
                // Two sums in another order may round to neighbouring bfloat16.
                if (!same(*bf16_avx512_kernels(), *bf16_portable_kernels(), plan, size[0], size[1], last, 1e-2f)) {
                    return 1;
                }
                networks += 2;
            }
        }
    }
    std::printf("%d networks\n", networks);
    return 0;
}
