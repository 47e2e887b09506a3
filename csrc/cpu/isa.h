// The choice of an instruction set at run time.
#pragma once

#include "kernels.h"

namespace mbv2::cpu {

// The kernels for format F of the instruction set of this name; an empty name means the best of this machine.
// Throws std::runtime_error if that one is unknown, cannot run here, or has no kernels for the format.
template <class F = Float32>
const Kernels<F>& kernels(const char* name);

// The same for the name in MBV2_CPU_ISA, or the best.
template <class F = Float32>
const Kernels<F>& kernels();

}  // namespace mbv2::cpu
