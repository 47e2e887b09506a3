// The training depthwise kernels, as depthwise_launch.cu sees them. Host only.
#pragma once

#include "depthwise_params.h"

namespace mbv2 {
namespace cuda {

struct DepthwiseKernel {
    const void* function;
    int shared_bytes;  // dynamic
};

constexpr int kDepthwiseThreads = 128;  // of a block, all kernels

// float16 and bfloat16.
DepthwiseKernel depthwise_kernel(DepthwiseType type, int stride, bool normalise);
DepthwiseKernel depthwise_backward_kernel(DepthwiseType type, int stride, bool normalise);

// float32.
DepthwiseKernel depthwise_single_kernel(int stride, bool normalise);
DepthwiseKernel depthwise_backward_single_kernel(int stride, bool normalise);

}  // namespace cuda
}  // namespace mbv2
