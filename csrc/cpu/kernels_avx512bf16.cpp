// AVX-512F with AVX512_BF16, bfloat16.
#include "kernels.h"

#if defined(__AVX512BF16__) || defined(MBV2_SIMDE)
#include "microkernels.h"
#include "vectors_avx512.h"

namespace mbv2::cpu {
namespace {

constexpr Kernels<Bfloat16> kKernels = kernels_of<Avx512, Bfloat16>("avx512");

}  // namespace

const Kernels<Bfloat16>* bf16_avx512_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Bfloat16>* mbv2::cpu::bf16_avx512_kernels() { return nullptr; }
#endif
