// Launching the fused block and the products of pairs; no torch header, so that one build serves every torch.
#pragma once

#include "product_params.h"

namespace mbv2::cuda {

// Puts the kernel of `element` and `tile`, and the one that adds partial sums where params.splits > 1, on `stream` of
// the current device. Returns null, or the CUDA runtime's words on why it could not.
const char* launch_fused(Element element, int tile, int64_t blocks, int shared_bytes, const FusedParams& params,
                         void* stream);

// The same of a product.
const char* launch_product(Element element, int tile, int64_t blocks, int shared_bytes, const ProductParams& params,
                           void* stream);

}  // namespace mbv2::cuda
