#define MBV2_TENSOR FloatTensor
#define MBV2_TYPE float
#include "product_kernels.cuh"
