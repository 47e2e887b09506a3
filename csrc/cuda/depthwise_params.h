// Arguments of the training depthwise kernels and the functions that launch them. Host and device, no torch.
#pragma once

#include <stdint.h>

#ifdef __CUDACC__
#include <cuda_runtime_api.h>
#else
typedef struct CUstream_st* cudaStream_t;
#endif

namespace mbv2 {
namespace cuda {

enum DepthwiseType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// How images are cut: a group is `columns` neighbouring columns of the output (of its gradient) of one image, counted
// through all images (group p is group p % chunks of image p / chunks); a block takes `groups` of them, a slab of 16
// channels, and walks down `rows` rows.
struct DepthwiseCut {
    int32_t columns, groups, chunks, rows, strips;
};

// y = depthwise3x3(relu6(bn(x))) with moments; bn null: x as it is. NHWC, C a multiple of 8.
struct DepthwiseParams {
    const void* x;
    const float* bn;  // [6, C]
    const void* weight;
    void* y;
    float* moments;  // [parts, 3, C]
    int32_t n, c, h, w, ho, wo;
    DepthwiseCut cut;
};

// See depthwise_backward in kernels/aten.py; dz1, sums and dweight may be null.
struct DepthwiseBackwardParams {
    const void* dz2;
    const void* y2;
    const float* coef;  // [3, C]
    const void* y1;
    const float* bn;  // [6, C]
    const void* weight;
    void* dz1;
    float* sums;     // [parts, 2, C]
    float* dweight;  // [parts, C, 9]
    int32_t n, c, h, w, ho, wo;
    DepthwiseCut cut;
};

// Blocks of a launch, channel slabs fastest.
inline int64_t depthwise_blocks(int32_t n, int32_t c, const DepthwiseCut& cut) {
    const int64_t groups = static_cast<int64_t>(n) * cut.chunks;
    const int64_t slabs = (c + 15) / 16;
    return (groups + cut.groups - 1) / cut.groups * cut.strips * slabs;
}

// Null, or why the launch failed.
const char* launch_depthwise(const DepthwiseParams& params, DepthwiseType type, int stride, cudaStream_t stream);
const char* launch_depthwise_backward(const DepthwiseBackwardParams& params, DepthwiseType type, int stride,
                                      cudaStream_t stream);

}  // namespace cuda
}  // namespace mbv2
