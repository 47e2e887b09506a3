// What the host tells a launch of the fused block, and the tile shapes the kernel is compiled for. No CUDA header.
#pragma once

#include <cstdint>

namespace mbv2::cuda {

enum class Element : int32_t { kHalf = 0, kBfloat16 = 1, kFloat = 2 };

inline constexpr int kElements = 3;
constexpr int element_bytes(Element element) { return element == Element::kFloat ? 4 : 2; }

// Compile-time tiles: index, bytes of a chunk of hidden channels, rows a column of outputs is walked down, warps over
// outputs and over output channels, 16-row and 8-column tensor-core tiles of a warp, blocks an SM should hold. Those
// without 8-column tiles end with the depthwise stage and leave the projection to a product (product.cuh).
#define MBV2_FUSED_TILES(X)      \
    X(0, 64, 4, 8, 1, 2, 4, 2)   \
    X(1, 64, 2, 8, 1, 1, 4, 2)   \
    X(2, 64, 2, 4, 2, 2, 4, 2)   \
    X(3, 64, 2, 4, 2, 2, 6, 2)   \
    X(4, 128, 2, 4, 2, 1, 10, 2) \
    X(5, 128, 2, 2, 4, 2, 10, 1) \
    X(6, 64, 2, 2, 4, 2, 14, 1)  \
    X(7, 64, 4, 8, 1, 2, 0, 3)   \
    X(8, 64, 4, 4, 1, 2, 0, 6)

struct TileShape {
    int chunk_bytes;
    int walk;
    int warps_m;
    int warps_n;
    int tiles_m;
    int tiles_n;
    int blocks;

    constexpr int threads() const { return 32 * warps_m * warps_n; }
    constexpr int outputs() const { return 16 * warps_m * tiles_m; }
    constexpr int channels() const { return 8 * warps_n * tiles_n; }
    constexpr bool projects() const { return tiles_n > 0; }
};

#define MBV2_TILE_SHAPE(index, ...) {__VA_ARGS__},
inline constexpr TileShape kTileShapes[] = {MBV2_FUSED_TILES(MBV2_TILE_SHAPE)};
#undef MBV2_TILE_SHAPE
inline constexpr int kTiles = sizeof(kTileShapes) / sizeof(kTileShapes[0]);

constexpr int most_channels() {
    int most = 0;
    for (const TileShape& tile : kTileShapes) most = tile.channels() > most ? tile.channels() : most;
    return most;
}

// Thread blocks an SM has registers for. Where shared memory (100 KB) holds one of the large tiles anyway, it gets them
// all; `arch` is 80 for compute capability 8.0.
constexpr int resident_blocks(int tile, int arch) {
    const bool small = arch == 86 || arch == 89 || arch >= 120;
    return small && (tile == 0 || tile == 3) ? 1 : kTileShapes[tile].blocks;
}

// Tables in shared memory: the thread block's tile, its columns of outputs, its input positions.
inline constexpr int kTileBytes = 64, kUnitBytes = 16, kPlaceBytes = 8;

// Division of numbers below 2^16 by a number known at launch.
struct Divisor {
    uint32_t value;
    uint32_t magic;
};

// Where a block's tensors lie, their sizes, and how the work is cut. Pointers are to device memory, 16-byte aligned.
struct FusedParams {
    const void* x;    // [images, height, width, inputs]
    const void* w1;   // [hidden, inputs]; null: the block has no expansion and inputs == hidden
    const void* wd;   // [hidden, 9]
    const void* w3;   // [outputs, hidden]
    const float* b1;  // [hidden]
    const float* bd;  // [hidden]
    const float* b3;  // [outputs]
    void* out;        // [images, out_height, out_width, outputs]
    float* partial;   // [splits, images * out_height * out_width, outputs], where splits > 1

    int64_t out_positions;
    int32_t images, height, width, inputs, hidden, outputs, out_height, out_width;
    int32_t stride, residual;

    // A thread block makes tile_images x tile_height x tile_width outputs from `chunks` chunks of hidden channels.
    int32_t tile_images, tile_height, tile_width, tiles_down, tiles_across, splits, chunks;

    // Shared memory: offsets and pitches in bytes.
    int32_t at_a1, at_a2, at_weights, at_tables, x_pitch, weights_step, w3_bytes;
    int32_t ahead;  // weights have two buffers, weights_step apart, and arrive a chunk ahead; otherwise the step is 0

    Divisor x_vectors;    // 16-byte vectors of a row of x in shared memory
    Divisor out_vectors;  // of an output position
};

}  // namespace mbv2::cuda
