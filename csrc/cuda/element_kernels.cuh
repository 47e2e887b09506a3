// How the kernels of one element type are named, MBV2_KIND (fused, product) and MBV2_TYPE (half, bfloat16, float) being
// defined, and which of them are compiled: MBV2_ONLY_TILE leaves one tile alone, for tests.
#pragma once

#define MBV2_JOIN_(a, b, c) a##b##c
#define MBV2_JOIN(a, b, c) MBV2_JOIN_(a, b, c)
#define MBV2_KERNEL(name) MBV2_JOIN(MBV2_KIND, MBV2_JOIN(_, MBV2_TYPE, _), name)
#define MBV2_POINTER(index, ...) reinterpret_cast<const void*>(MBV2_KERNEL(index)),

#ifdef MBV2_ONLY_TILE
template <int kIndex>
inline constexpr bool kWanted = kIndex == MBV2_ONLY_TILE;
#else
template <int kIndex>
inline constexpr bool kWanted = true;
#endif
