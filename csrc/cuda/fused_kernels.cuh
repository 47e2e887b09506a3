// The kernels of one element type, named fused_<type>_<tile> and fused_<type>_sum. A file defines MBV2_TENSOR and
// MBV2_TYPE and includes this.
#include "element_kernels.cuh"
#include "fused_block.cuh"

#define MBV2_KIND fused

#ifdef __CUDA_ARCH__
inline constexpr int kArch = __CUDA_ARCH__ / 10;
#else
inline constexpr int kArch = 0;
#endif

#define MBV2_FUSED_KERNEL(index, chunk_bytes, walk, warps_m, warps_n, tiles_m, tiles_n, blocks)                     \
    extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, mbv2::cuda::resident_blocks(index, kArch)) \
        MBV2_KERNEL(index)(const __grid_constant__ mbv2::cuda::FusedParams params) {                                \
        extern __shared__ __align__(128) unsigned char memory[];                                                    \
        if constexpr (kWanted<index>) {                                                                             \
            mbv2::cuda::Block<mbv2::cuda::Traits<mbv2::cuda::MBV2_TENSOR, index>>(params, memory).run();            \
        }                                                                                                           \
    }

MBV2_FUSED_TILES(MBV2_FUSED_KERNEL)

extern "C" __global__ void __launch_bounds__(256)
    MBV2_KERNEL(sum)(const __grid_constant__ mbv2::cuda::FusedParams params) {
    mbv2::cuda::add_partials<mbv2::cuda::MBV2_TENSOR>(params);
}

namespace mbv2::cuda {

const void* MBV2_JOIN(MBV2_TYPE, _kernel, )(int index) {
    static const void* const kernels[] = {
        MBV2_FUSED_TILES(MBV2_POINTER) reinterpret_cast<const void*>(MBV2_KERNEL(sum))};
    return kernels[index];
}

}  // namespace mbv2::cuda
