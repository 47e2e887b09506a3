// The choice of an instruction set at run time.
#pragma once

#include "kernels.h"

namespace mbv2::cpu {

// The kernels of the best instruction set of this machine, or of the one that MBV2_CPU_ISA names.
// Throws std::runtime_error if that one is unknown or cannot run here.
const Kernels& kernels();

// The same by name; an empty name means the best.
const Kernels& kernels(const char* name);

}  // namespace mbv2::cpu
