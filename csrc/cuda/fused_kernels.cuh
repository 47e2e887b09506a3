// The kernels of one element type, named fused_<type>_<tile> and fused_<type>_sum. A file defines MBV2_TENSOR and
// MBV2_TYPE (half, bfloat16, float) and includes this; MBV2_ONLY_TILE compiles one tile alone.
#include "fused_block.cuh"

#define MBV2_JOIN(type, tile) fused_##type##_##tile
#define MBV2_NAME(type, tile) MBV2_JOIN(type, tile)

namespace mbv2::cuda {

#define MBV2_FUSED_KERNEL(index, chunk_bytes, walk, warps_m, warps_n, tiles_m, tiles_n, blocks)            \
    extern "C" __global__ void __launch_bounds__(32 * warps_m * warps_n, blocks)                           \
        MBV2_NAME(MBV2_TYPE, index)(const __grid_constant__ FusedParams params) {                          \
        extern __shared__ __align__(128) unsigned char memory[];                                           \
        if constexpr (kWanted<index>) Block<Traits<MBV2_TENSOR, index>>(params, memory).run();             \
    }

#ifdef MBV2_ONLY_TILE
template <int kIndex>
inline constexpr bool kWanted = kIndex == MBV2_ONLY_TILE;
#else
template <int kIndex>
inline constexpr bool kWanted = true;
#endif

MBV2_FUSED_TILES(MBV2_FUSED_KERNEL)

extern "C" __global__ void __launch_bounds__(256) MBV2_NAME(MBV2_TYPE, sum)(const __grid_constant__ FusedParams params) {
    add_partials<MBV2_TENSOR>(params);
}

}  // namespace mbv2::cuda
