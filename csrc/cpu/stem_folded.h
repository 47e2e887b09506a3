// The stem by itself, BatchNorm folded, through the whole network's kernel.
#pragma once

#include "network.h"

namespace mbv2::cpu {

// relu6(conv3x3(image) + bias), padding 1, stride 2 -> y [batch, ceil(height / 2), ceil(width / 2), outputs], dense.
// `isa` names an instruction set, empty the best. weight: [outputs, 3, 3, 3], dense. Pictures are read where they lie.
void stem_folded(const char* isa, const Threads& threads, const Image& image, const float* weight, const float* bias,
                 int64_t outputs, float* y);

}  // namespace mbv2::cpu
