// AVX-512F, float32.
#include "kernels.h"

#if defined(__AVX512F__) || defined(MBV2_SIMDE)
#include "microkernels.h"
#include "vectors_avx512.h"

namespace mbv2::cpu {
namespace {

constexpr Kernels<Float32> kKernels = kernels_of<Avx512, Float32>("avx512");

}  // namespace

const Kernels<Float32>* avx512_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
#else
const mbv2::cpu::Kernels<mbv2::cpu::Float32>* mbv2::cpu::avx512_kernels() { return nullptr; }
#endif
