// What a thread block of the fused block works on, and the compile-time figures of a tile.
#pragma once

#include "fused_params.h"
#include "fused_tensor.cuh"

namespace mbv2::cuda {

// A column of outputs: bytes from a1's start to its first input, positions from the tile's first output and from x's
// first position to its first output, and how many of its outputs exist.
struct Unit {
    int32_t a1;
    int32_t out;
    int32_t x;
    int32_t rows;
};

// An input position of the tile that lies inside the image: positions from the first image's start, bytes into a1.
struct Place {
    int32_t source;
    int32_t a1;
};

template <class TensorType, int kIndex>
struct Traits {
    using Tensor = TensorType;
    using Scalar = typename Tensor::Scalar;
    static constexpr TileShape kShape = kTileShapes[kIndex];
    static constexpr int kBytes = sizeof(Scalar);
    static constexpr int kVector = 16 / kBytes;  // channels of 16 bytes
    static constexpr int kStep = 2 * kVector;    // channels of one step of a product
    static constexpr int kChunk = kShape.chunk_bytes / kBytes;
    static constexpr int kPitch = kShape.chunk_bytes + 16;  // an odd number of 16 bytes: no bank conflicts of ldmatrix
    static constexpr int kThreads = kShape.threads();
    static constexpr int kWarps = kThreads / 32;
    static constexpr int kWalk = kShape.walk;
    static constexpr int kUnits = kShape.outputs() / kWalk;
    static constexpr int kExpandTiles = kStep * 2 / 8;  // 8-column tiles of an item of the expansion, 64 bytes
    static constexpr int kExpandItems = kShape.chunk_bytes / 64;
    static constexpr int kSteps = kShape.chunk_bytes / 32;

    static_assert(kShape.chunk_bytes % 64 == 0 && kThreads <= 1024);
    static_assert(kShape.tiles_n % 2 == 0, "right operands are loaded for two tiles at once");
    static_assert(kPitch / 16 % 2 == 1);
    static_assert(kShape.outputs() % (16 * kWalk) == 0);
};

__device__ __forceinline__ int quotient(uint32_t value, const Divisor& by) {
    return by.value == 1 ? value : __umulhi(value, by.magic);
}

// What a thread block works on.
struct Tile {
    int split, first_image, images, top, left, rows, columns;  // of outputs
    int in_top, in_left, in_rows, in_columns;                  // inputs inside the image
    int a1_top, a1_left, a1_rows, a1_columns;                  // with the border; top and left may be -1
    int positions;

    __device__ __forceinline__ Tile(const FusedParams& p, int walk) {
        unsigned block = blockIdx.x;
        split = block % p.splits, block /= p.splits;
        left = block % p.tiles_across * p.tile_width, block /= p.tiles_across;
        top = block % p.tiles_down * p.tile_height, block /= p.tiles_down;
        first_image = block * p.tile_images;
        images = min(p.tile_images, p.images - first_image);
        rows = min(p.tile_height, p.out_height - top), columns = min(p.tile_width, p.out_width - left);
        a1_top = top * p.stride - 1, a1_left = left * p.stride - 1;
        a1_rows = ((p.tile_height + walk - 1) / walk * walk - 1) * p.stride + 3;
        a1_columns = (p.tile_width - 1) * p.stride + 3;
        in_top = max(a1_top, 0), in_left = max(a1_left, 0);
        in_rows = min(a1_top + (rows - 1) * p.stride + 3, p.height) - in_top;
        in_columns = min(a1_left + (columns - 1) * p.stride + 3, p.width) - in_left;
        positions = images * in_rows * in_columns;
    }
};

static_assert(sizeof(Tile) <= kTileBytes && sizeof(Unit) == kUnitBytes && sizeof(Place) == kPlaceBytes);

}  // namespace mbv2::cuda
