// How a fused block's work is cut: chosen from its shape and the GPU's limits alone. No CUDA and no torch header.
#pragma once

#include <cstdint>
#include <vector>

#include "fused_params.h"

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

// Limits a choice; -1: the planner's own.
struct Wish {
    int tile = -1;
    int tile_images = -1;
    int tile_height = -1;
    int tile_width = -1;
    int splits = -1;
};

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

// Why the kernel cannot run this block, or null.
const char* refusal(const BlockShape& shape, const Gpu& gpu);

// The plan with the least estimated time. Returns false where none fits the wish or the shared memory.
bool plan_block(const BlockShape& shape, const Gpu& gpu, const Wish& wish, Plan* best);

}  // namespace mbv2::cuda
