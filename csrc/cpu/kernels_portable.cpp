// Any machine, float32 and bfloat16.
#include "microkernels.h"
#include "vectors_portable.h"

namespace mbv2::cpu {
namespace {

constexpr Kernels<Float32> kKernels = kernels_of<Portable, Float32>("portable");
constexpr Kernels<Bfloat16> kBf16Kernels = kernels_of<Portable, Bfloat16>("portable");

}  // namespace

const Kernels<Float32>* portable_kernels() { return &kKernels; }
const Kernels<Bfloat16>* bf16_portable_kernels() { return &kBf16Kernels; }

}  // namespace mbv2::cpu
