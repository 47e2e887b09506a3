#define MBV2_TENSOR Bfloat16Tensor
#define MBV2_TYPE bfloat16
#include "fused_kernels.cuh"
