#define MBV2_TENSOR Bfloat16Tensor
#define MBV2_TYPE bfloat16
#include "product_kernels.cuh"
