// The products of one element type, named product_<type>_<tile>. A file defines MBV2_TENSOR and MBV2_TYPE and includes
// this; MBV2_ONLY_TILE compiles one tile alone, for tests.
#include "product.cuh"

#define MBV2_JOIN_(a, b, c) a##b##c
#define MBV2_JOIN(a, b, c) MBV2_JOIN_(a, b, c)
#define MBV2_KERNEL(name) MBV2_JOIN(MBV2_JOIN(product_, MBV2_TYPE, _), name, )

#ifdef MBV2_ONLY_TILE
template <int kIndex>
inline constexpr bool kWanted = kIndex == MBV2_ONLY_TILE;
#else
template <int kIndex>
inline constexpr bool kWanted = true;
#endif

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

#define MBV2_POINTER(index, ...) reinterpret_cast<const void*>(MBV2_KERNEL(index)),

const void* MBV2_JOIN(MBV2_TYPE, _product, )(int index) {
    static const void* const kernels[] = {MBV2_PRODUCT_TILES(MBV2_POINTER)};
    return kernels[index];
}

}  // namespace mbv2::cuda
