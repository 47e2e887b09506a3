#define MBV2_TENSOR HalfTensor
#define MBV2_TYPE half
#include "fused_kernels.cuh"
