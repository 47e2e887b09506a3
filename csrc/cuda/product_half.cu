#define MBV2_TENSOR HalfTensor
#define MBV2_TYPE half
#include "product_kernels.cuh"
