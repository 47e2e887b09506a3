// What a fused block does with its sums: the bias they start from, results by way of shared memory, partial sums.
#pragma once

#include "fused_block.cuh"

namespace mbv2::cuda {

// The depthwise results of a chunk, [positions, hidden] in global memory.
template <class Tr>
__device__ __forceinline__ void Block<Tr>::store_hidden(int first_channel) {
    constexpr int kVectors = kShape.chunk_bytes / 16;
    Scalar* out = static_cast<Scalar*>(p.out) + first_output() * p.hidden + first_channel;
#pragma unroll 1
    for (int i = thread; i < groups() * 16 * kVectors; i += Tr::kThreads) {
        const int u = i / kVectors, vector = i % kVectors;
        if (first_channel + vector * Tr::kVector >= p.hidden) continue;
        const Unit unit = units()[u];
        const unsigned char* from = smem + p.at_a2 + (u / 16 * 16 * Tr::kWalk + u % 16) * Tr::kPitch + vector * 16;
        Scalar* to = out + static_cast<int64_t>(unit.out) * p.hidden + vector * Tr::kVector;
#pragma unroll
        for (int walked = 0; walked < Tr::kWalk; ++walked, to += p.out_width * p.hidden) {
            if (walked >= unit.rows) break;
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from + walked * 16 * Tr::kPitch);
        }
    }
}

// The bias of the projection, or nothing where `add_partials` adds it.
template <class Tr>
__device__ __forceinline__ void Block<Tr>::start(Sums& sums) const {
#pragma unroll
    for (int j = 0; j < kShape.tiles_n; ++j) {
        const int channel = (first_n() + j) * 8 + lane % 4 * 2;
        const bool wanted = channel < p.outputs && p.splits == 1;
        const float2 bias = wanted ? *reinterpret_cast<const float2*>(p.b3 + channel) : make_float2(0, 0);
#pragma unroll
        for (int i = 0; i < kShape.tiles_m; ++i) {
            sums[i][j][0] = sums[i][j][2] = bias.x;
            sums[i][j][1] = sums[i][j][3] = bias.y;
        }
    }
}

// Sums of this split's hidden channels; `add_partials` adds them up.
template <class Tr>
__device__ __forceinline__ void Block<Tr>::store_partial(const Sums& sums) {
    float* out = p.partial + (static_cast<int64_t>(shared_tile().split) * p.out_positions + first_output()) * p.outputs;
    each_row([&](int i, int half, int row, const Unit& unit, int walked) {
        float* to = out + static_cast<int64_t>(unit.out + walked * p.out_width) * p.outputs;
        each_pair([&](int j, int channel) {
            const float* pair = sums[i][j] + half * 2;
            *reinterpret_cast<float2*>(to + channel) = make_float2(pair[0], pair[1]);
        });
    });
}

// Rows are put together in shared memory, so that global memory is written 16 bytes at a time.
template <class Tr>
__device__ __forceinline__ void Block<Tr>::store(const Sums& sums) {
    const int pitch = p.outputs * Tr::kBytes + 16;
    unsigned char* stage = smem + p.at_a1;
    if (p.residual) {
        stage_with_shortcut(sums, stage, pitch);
    } else {
        stage_alone(sums, stage, pitch);
    }
    __syncthreads();
    Scalar* out = static_cast<Scalar*>(p.out) + first_output() * p.outputs;
    const int vectors = p.out_vectors.value;
#pragma unroll 1
    for (int i = thread; i < groups() * Tr::kWalk * 16 * vectors; i += Tr::kThreads) {
        const int row = quotient(i, p.out_vectors), vector = i - row * vectors;
        const Unit unit = unit_of_row(row);
        const int walked = row / 16 % Tr::kWalk;
        if (walked >= unit.rows) continue;
        Scalar* to = out + static_cast<int64_t>(unit.out + walked * p.out_width) * p.outputs;
        reinterpret_cast<uint4*>(to)[vector] = *reinterpret_cast<const uint4*>(stage + row * pitch + vector * 16);
    }
}

template <class Tr>
__device__ __forceinline__ void Block<Tr>::stage_alone(const Sums& sums, unsigned char* stage, int pitch) {
    each_row([&](int i, int half, int row, const Unit& unit, int walked) {
        unsigned char* to = stage + row * pitch;
        each_pair([&](int j, int channel) {
            const float* pair = sums[i][j] + half * 2;
            store_pair<Tensor>(to + channel * Tr::kBytes, pair[0], pair[1]);
        });
    });
}

template <class Tr>
__device__ __forceinline__ void Block<Tr>::stage_with_shortcut(const Sums& sums, unsigned char* stage, int pitch) {
    each_row([&](int i, int half, int row, const Unit& unit, int walked) {
        unsigned char* to = stage + row * pitch;
        const Scalar* from = shortcut(unit, walked);
        each_pair([&](int j, int channel) {
            const float* pair = sums[i][j] + half * 2;
            const float2 x = load_pair<Tensor>(from + channel);
            store_pair<Tensor>(to + channel * Tr::kBytes, pair[0] + x.x, pair[1] + x.y);
        });
    });
}

// The input at an output's position: in shared memory, but in blocks without expansion only global memory has all
// channels of it.
template <class Tr>
__device__ __forceinline__ auto Block<Tr>::shortcut(const Unit& unit, int walked) const -> const Scalar* {
    if (expands) {
        const int position = unit.x + walked * shared_tile().in_columns;
        return reinterpret_cast<const Scalar*>(smem + position * p.x_pitch);
    }
    return static_cast<const Scalar*>(p.x) + (first_output() + unit.out + walked * p.out_width) * p.inputs;
}

// Calls use(tile, half, row, unit, walked) for every row of sums of this lane whose output exists.
template <class Tr>
template <class Use>
__device__ __forceinline__ void Block<Tr>::each_row(const Use& use) {
#pragma unroll
    for (int i = 0; i < kShape.tiles_m; ++i) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = (first_m() + i) * 16 + half * 8 + lane / 4;
            if (row >= groups() * Tr::kWalk * 16) continue;
            const Unit unit = unit_of_row(row);
            const int walked = row / 16 % Tr::kWalk;
            if (walked < unit.rows) use(i, half, row, unit, walked);
        }
    }
}

template <class Tr>
template <class Use>
__device__ __forceinline__ void Block<Tr>::each_pair(const Use& use) {
    int first = first_n() * 8 + lane % 4 * 2;
    // Found anew, or the compiler keeps what `start` made of it in registers of the main loop.
    asm volatile("" : "+r"(first));
#pragma unroll
    for (int j = 0; j < kShape.tiles_n; ++j) {
        if (first + j * 8 >= p.outputs) break;
        use(j, first + j * 8);
    }
}

// out = partials added in the order of the splits + b3 (+ x); a thread makes 4 channels of a position.
template <class Tensor>
__device__ __forceinline__ void add_partials(const FusedParams& p) {
    using Scalar = typename Tensor::Scalar;
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * 4;
    const int64_t size = p.out_positions * p.outputs;
    if (first >= size) return;
    const int channel = static_cast<int>(first % p.outputs);
    float4 sum = *reinterpret_cast<const float4*>(p.b3 + channel);
    for (int split = 0; split < p.splits; ++split) {
        const float4 part = *reinterpret_cast<const float4*>(p.partial + split * size + first);
        sum.x += part.x, sum.y += part.y, sum.z += part.z, sum.w += part.w;
    }
    if (p.residual) {
        // A block with a shortcut has as many inputs as outputs, and as many positions.
        const Scalar* x = static_cast<const Scalar*>(p.x) + first;
        const float2 low = load_pair<Tensor>(x), high = load_pair<Tensor>(x + 2);
        sum.x += low.x, sum.y += low.y, sum.z += high.x, sum.w += high.y;
    }
    Scalar* out = static_cast<Scalar*>(p.out) + first;
    store_pair<Tensor>(out, sum.x, sum.y);
    store_pair<Tensor>(out + 2, sum.z, sum.w);
}

}  // namespace mbv2::cuda
