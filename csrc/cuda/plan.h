// How a fused block's work is cut: chosen from its shape and the GPU's limits alone. No CUDA and no torch header.
#pragma once

#include <cstdint>
#include <vector>

#include "product_params.h"

namespace mbv2::cuda {

struct BlockShape {
    Element element;
    int64_t images, height, width;
    int64_t inputs, hidden, outputs;
    int64_t stride;
    bool expands, residual;
};

struct Gpu {
    int arch;  // 80 for compute capability 8.0
    int processors;
    int shared_per_block;
    int shared_per_processor;
};

// How a block becomes launches: one, or a pair of which the first expands and applies the depthwise convolution and the
// second projects.
enum class Cut : int32_t { kWhole = 0, kPair = 1 };

// Limits a choice; -1: the planner's own. Tile and splits are those of the launch that has the depthwise stage.
struct Wish {
    int tile = -1;
    int tile_images = -1;
    int tile_height = -1;
    int tile_width = -1;
    int splits = -1;
    int cut = -1;
    int product = -1;
};

// The launch of a whole block, or a pair's first.
struct Plan {
    int tile;            // index into kTileShapes
    FusedParams params;  // all but the pointers
    int64_t blocks;      // thread blocks of the launch
    int threads;
    int shared_bytes;
    int64_t partial_bytes;  // of `FusedParams::partial`; 0 with one split
    double microseconds;    // the model's estimate, by which plans are compared
    double busy;            // the same, of the SMs alone
    double instructions;    // of all threads, without those of the kernel that adds partial sums
};

// A pair's second launch.
struct ProductPlan {
    int tile;              // index into kProductTiles
    ProductParams params;  // all but the pointers
    int64_t blocks;
    int threads;
    int shared_bytes;
    double microseconds;
    double instructions;
};

struct BlockPlan {
    Cut cut;
    Plan block;
    ProductPlan product;  // nothing where the cut is kWhole
    double microseconds;
};

// Why the kernels cannot run this block, or null.
const char* refusal(const BlockShape& shape, const Gpu& gpu);

// The plan with the least estimated time. Returns false where none fits the wish or the shared memory.
bool plan_block(const BlockShape& shape, const Gpu& gpu, const Wish& wish, BlockPlan* best);

// Of one launch with the depthwise stage, `outputs` 0: without the projection; dram: bytes it moves.
bool plan_launch(const BlockShape& shape, const Gpu& gpu, const Wish& wish, double dram, Plan* best);

// Of a 1x1 convolution of `rows` positions.
bool plan_product(Element element, int64_t rows, int64_t inner, int64_t columns, const Gpu& gpu, const Wish& wish,
                  double dram, ProductPlan* best);

}  // namespace mbv2::cuda
