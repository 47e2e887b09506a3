// Launches the training depthwise kernels.
#include "depthwise_kernels.h"

namespace mbv2 {
namespace cuda {
namespace {

template <class Params>
const char* launch(const DepthwiseKernel& kernel, const Params& p, cudaStream_t stream) {
    const int64_t blocks = depthwise_blocks(p.n, p.c, p.cut);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "more blocks than a launch can have";
    cudaError_t error =
        cudaFuncSetAttribute(kernel.function, cudaFuncAttributeMaxDynamicSharedMemorySize, kernel.shared_bytes);
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<Params*>(&p)};
        error = cudaLaunchKernel(kernel.function, dim3(static_cast<unsigned>(blocks)), dim3(kDepthwiseThreads),
                                 arguments, kernel.shared_bytes, stream);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_depthwise(const DepthwiseParams& params, DepthwiseType type, int stride, cudaStream_t stream) {
    const bool normalise = params.bn != nullptr;
    return launch(
        type == kFloat32 ? depthwise_single_kernel(stride, normalise) : depthwise_kernel(type, stride, normalise),
        params, stream);
}

const char* launch_depthwise_backward(const DepthwiseBackwardParams& params, DepthwiseType type, int stride,
                                      cudaStream_t stream) {
    const bool normalise = params.bn != nullptr;
    return launch(type == kFloat32 ? depthwise_backward_single_kernel(stride, normalise)
                                   : depthwise_backward_kernel(type, stride, normalise),
                  params, stream);
}

}  // namespace cuda
}  // namespace mbv2
