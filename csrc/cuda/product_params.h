// What the host tells a launch of a product, and the tile shapes it is compiled for. No CUDA header.
#pragma once

#include "fused_params.h"

namespace mbv2::cuda {

// Compile-time tiles: index, warps over rows and over columns, 16-row and 8-column tensor-core tiles of a warp, blocks
// an SM should hold.
#define MBV2_PRODUCT_TILES(X) \
    X(0, 4, 1, 2, 4, 4)       \
    X(1, 4, 1, 2, 8, 3)       \
    X(2, 4, 2, 2, 6, 2)       \
    X(3, 2, 2, 2, 4, 4)       \
    X(4, 2, 2, 1, 4, 4)

struct ProductTile {
    int warps_m;
    int warps_n;
    int tiles_m;
    int tiles_n;
    int blocks;

    constexpr int threads() const { return 32 * warps_m * warps_n; }
    constexpr int rows() const { return 16 * warps_m * tiles_m; }
    constexpr int columns() const { return 8 * warps_n * tiles_n; }
};

#define MBV2_PRODUCT_TILE(index, ...) {__VA_ARGS__},
inline constexpr ProductTile kProductTiles[] = {MBV2_PRODUCT_TILES(MBV2_PRODUCT_TILE)};
#undef MBV2_PRODUCT_TILE
inline constexpr int kProducts = sizeof(kProductTiles) / sizeof(kProductTiles[0]);

// Operands arrive in steps of 64 bytes of channels, two steps ahead.
inline constexpr int kProductChunk = 64, kProductPitch = kProductChunk + 16, kProductStages = 3;

// out = x W^T + bias + shortcut. Pointers are to device memory, 16-byte aligned.
struct ProductParams {
    const void* x;         // [rows, inner]
    const void* w;         // [columns, inner]
    const float* bias;     // [columns]
    const void* shortcut;  // [rows, columns] or null
    void* out;             // [rows, columns]

    int64_t rows;
    int32_t inner, columns;
};

}  // namespace mbv2::cuda
