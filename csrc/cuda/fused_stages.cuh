// The three products of a fused block: expand, depthwise and project of a chunk of hidden channels.
#pragma once

#include "fused_block.cuh"

namespace mbv2::cuda {

// An item is 32 positions x 64 bytes of hidden channels.
template <class Tr>
__device__ __forceinline__ void Block<Tr>::expand(int first_channel, int buffer) {
    const uint32_t row = (lane & 15) * p.x_pitch + (lane >> 4) * 16;
    const uint32_t column = ((lane & 7) + (lane >> 4) * 8) * p.x_pitch + (lane >> 3 & 1) * 16;
    const int items = padded(positions()) / 32 * Tr::kExpandItems;
#pragma unroll 1
    for (int item = warp; item < items; item += Tr::kWarps) {
        const int m = item / Tr::kExpandItems * 32, n = item % Tr::kExpandItems * 8 * Tr::kExpandTiles;
        if (first_channel + n >= p.hidden) continue;
        float d[2][Tr::kExpandTiles][4];
        const float* bias = reinterpret_cast<const float*>(smem + biases_of(buffer)) + n + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < Tr::kExpandTiles; ++j) {
            const float2 both = *reinterpret_cast<const float2*>(bias + j * 8);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                d[i][j][0] = d[i][j][2] = both.x;
                d[i][j][1] = d[i][j][3] = both.y;
            }
        }
        uint32_t x = at + m * p.x_pitch + row, w1 = at + w1_of(buffer) + n * p.x_pitch + column;
#pragma unroll 1
        for (int step = p.x_vectors.value / 2; step > 0; --step, x += 32, w1 += 32) {
            Left<Tensor> left[2];
            left[0].load(x), left[1].load(x + 16 * p.x_pitch);
#pragma unroll
            for (int j = 0; j < Tr::kExpandTiles; j += 2) {
                Right<Tensor> right;
                right.load(w1 + j * 8 * p.x_pitch);
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    multiply<0>(d[i][j], left[i], right);
                    multiply<1>(d[i][j + 1], left[i], right);
                }
            }
        }
#pragma unroll
        for (int half = 0; half < 4; ++half) {
            const int to = places()[m + half * 8 + lane / 4].a1;
            if (to < 0) continue;
            unsigned char* a1 = smem + p.at_a1 + to + (n + lane % 4 * 2) * Tr::kBytes;
#pragma unroll
            for (int j = 0; j < Tr::kExpandTiles; ++j) {
                // Past the last channel an infinite x times a zero weight would be NaN.
                if (first_channel + n + j * 8 >= p.hidden) break;
                const float* pair = d[half / 2][j] + half % 2 * 2;
                store_relu6<Tensor>(a1 + j * 8 * Tr::kBytes, pair[0], pair[1]);
            }
        }
    }
}

// An item is a group of 16 units x 32 bytes of hidden channels.
template <class Tr>
template <int kStride>
__device__ __forceinline__ void Block<Tr>::depthwise(int first_channel, int buffer) {
    const int items = groups() * Tr::kSteps;
#pragma unroll 1
    for (int item = warp; item < items; item += Tr::kWarps) {
        const int group = item / Tr::kSteps, step = item % Tr::kSteps;
        if (first_channel + step * Tr::kStep >= p.hidden) continue;
        if constexpr (Tensor::kPacked) {
            depthwise_by_diagonals<kStride>(group, step, buffer);
        } else {
            depthwise_by_multiply_adds<kStride>(group, step, buffer);
        }
    }
}

template <class Tr>
template <int kStride>
__device__ __forceinline__ void Block<Tr>::depthwise_by_diagonals(int group, int step, int buffer) {
    // Lane 4 n + t holds the rows 2 t and 2 t + 1 of column n of a tap's matrix: its weight if n is one of them.
    const uint32_t place = lane % 4 != lane / 8 ? 0u : lane / 4 % 2 ? 0x10000u : 1u;
    uint32_t taps[2][9];
    float bias[2][4];
#pragma unroll
    for (int q = 0; q < 2; ++q) {
        const int channel = step * 16 + q * 8;
        const uint16_t* from = reinterpret_cast<const uint16_t*>(smem + taps_of(buffer)) + (channel + lane / 4) * 9;
#pragma unroll
        for (int tap = 0; tap < 9; ++tap) taps[q][tap] = from[tap] * place;
        const float* bd = reinterpret_cast<const float*>(smem + biases_of(buffer)) + Tr::kChunk;
        const float2 both = *reinterpret_cast<const float2*>(bd + channel + lane % 4 * 2);
        bias[q][0] = bias[q][2] = both.x;
        bias[q][1] = bias[q][3] = both.y;
    }
    const uint32_t from = at + p.at_a1 + units()[group * 16 + lane % 16].a1 + step * 32;
    typename Row::Source source = {from + lane / 16 * Tr::kPitch, from + 2 * Tr::kPitch + lane / 16 * 16};
    const uint32_t down = shared_tile().a1_columns * Tr::kPitch;
    unsigned char* to = smem + p.at_a2 + (group * Tr::kWalk * 16 + lane / 4) * Tr::kPitch + step * 32 + lane % 4 * 4;
    Row upper, middle, lower;
    upper.load(source, down);
    if (kStride == 1) middle.load(source, down);
#pragma unroll
    for (int out = 0; out < Tr::kWalk; ++out, to += 16 * Tr::kPitch) {
        if (kStride == 2) middle.load(source, down);
        float d[2][4];
        // The upper row is done with before the lower one is loaded, which saves its registers.
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            upper.template add<0>(d[q], q, taps[q], bias[q]);
            middle.template add<3>(d[q], q, taps[q], d[q]);
        }
        lower.load(source, down);
#pragma unroll
        for (int q = 0; q < 2; ++q) {
            lower.template add<6>(d[q], q, taps[q], d[q]);
            store_relu6<Tensor>(to + q * 16, d[q][0], d[q][1]);
            store_relu6<Tensor>(to + q * 16 + 8 * Tr::kPitch, d[q][2], d[q][3]);
        }
        upper = kStride == 1 ? middle : lower;
        if (kStride == 1) middle = lower;
    }
}

template <class Tr>
template <int kStride>
__device__ __forceinline__ void Block<Tr>::depthwise_by_multiply_adds(int group, int step, int buffer) {
    const int channel = step * 8 + lane % 4 * 2;
    const float* weights = reinterpret_cast<const float*>(smem + taps_of(buffer)) + channel * 9;
    const float* bd = reinterpret_cast<const float*>(smem + biases_of(buffer)) + Tr::kChunk + channel;
    float taps[2][9];
#pragma unroll
    for (int tap = 0; tap < 9; ++tap) taps[0][tap] = weights[tap], taps[1][tap] = weights[9 + tap];
    const int down = shared_tile().a1_columns * Tr::kPitch;
    // One unit after the other: both at once would not leave registers for the sums.
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
        const int unit = half * 8 + lane / 4;
        const unsigned char* from = smem + p.at_a1 + units()[group * 16 + unit].a1 + channel * 4;
        unsigned char* to = smem + p.at_a2 + (group * Tr::kWalk * 16 + unit) * Tr::kPitch + channel * 4;
        float2 rows[3][3];
#pragma unroll
        for (int r = 0; r < 3 - kStride; ++r, from += down) load_row(rows[kStride + r], from);
#pragma unroll
        for (int out = 0; out < Tr::kWalk; ++out) {
#pragma unroll
            for (int r = 0; r < 3 - kStride; ++r) {
#pragma unroll
                for (int s = 0; s < 3; ++s) rows[r][s] = rows[kStride + r][s];
            }
#pragma unroll
            for (int r = 3 - kStride; r < 3; ++r, from += down) load_row(rows[r], from);
            float2 sum = make_float2(bd[0], bd[1]);
#pragma unroll
            for (int tap = 0; tap < 9; ++tap) {
                sum.x = fmaf(rows[tap / 3][tap % 3].x, taps[0][tap], sum.x);
                sum.y = fmaf(rows[tap / 3][tap % 3].y, taps[1][tap], sum.y);
            }
            store_relu6<Tensor>(to + out * 16 * Tr::kPitch, sum.x, sum.y);
        }
    }
}

template <class Tr>
__device__ __forceinline__ void Block<Tr>::project(int first_channel, int buffer, Sums& sums) {
    const uint32_t a2 = at + p.at_a2 + (first_m() * 16 + (lane & 15)) * Tr::kPitch + (lane >> 4) * 16;
    const uint32_t w3 =
        at + w3_of(buffer) + (first_n() * 8 + (lane & 7) + (lane >> 4) * 8) * Tr::kPitch + (lane >> 3 & 1) * 16;
    const int m_tiles = groups() * Tr::kWalk;
#pragma unroll
    for (int step = 0; step < Tr::kSteps; ++step) {
        if (first_channel + step * Tr::kStep >= p.hidden) break;
        Left<Tensor> left[kShape.tiles_m];
#pragma unroll
        for (int i = 0; i < kShape.tiles_m; ++i) {
            if (first_m() + i < m_tiles) left[i].load(a2 + i * 16 * Tr::kPitch + step * 32);
        }
#pragma unroll
        for (int j = 0; j < kShape.tiles_n; j += 2) {
            if ((first_n() + j) * 8 >= p.outputs) break;
            Right<Tensor> right;
            right.load(w3 + j * 8 * Tr::kPitch + step * 32);
#pragma unroll
            for (int i = 0; i < kShape.tiles_m; ++i) {
                multiply<0>(sums[i][j], left[i], right);
                multiply<1>(sums[i][j + 1], left[i], right);
            }
        }
    }
}

}  // namespace mbv2::cuda
