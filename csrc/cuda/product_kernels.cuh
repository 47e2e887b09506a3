// The products of one element type, named product_<type>_<tile>. A file defines MBV2_TENSOR and MBV2_TYPE and includes
// this.
#include "element_kernels.cuh"
#include "product.cuh"

#define MBV2_KIND product

#define MBV2_PRODUCT_KERNEL(index, warps_m, warps_n, tiles_m, tiles_n, blocks)         \
    extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, blocks)       \
        MBV2_KERNEL(index)(const __grid_constant__ mbv2::cuda::ProductParams params) { \
        extern __shared__ __align__(128) unsigned char memory[];                       \
        if constexpr (kWanted<index>) {                                                \
            mbv2::cuda::Product<mbv2::cuda::MBV2_TENSOR, index>(params, memory).run(); \
        }                                                                              \
    }

MBV2_PRODUCT_TILES(MBV2_PRODUCT_KERNEL)

namespace mbv2::cuda {

const void* MBV2_JOIN(MBV2_TYPE, _product, )(int index) {
    static const void* const kernels[] = {MBV2_PRODUCT_TILES(MBV2_POINTER)};
    return kernels[index];
}

}  // namespace mbv2::cuda
