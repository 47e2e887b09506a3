// The projection of a block as a launch of its own: a 1x1 convolution, its bias, the shortcut.
//
// A thread block makes a tile of rows (positions) and columns (output channels). Both operands pass through shared
// memory in pieces of 64 bytes of channels, two of them on their way while one is multiplied: one barrier a piece.
#pragma once

#include "fused_tensor.cuh"
#include "product_params.h"

namespace mbv2::cuda {

template <int kLeft>
__device__ __forceinline__ void wait_for_copies_but() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <class Tensor, int kIndex>
class Product {
    using Scalar = typename Tensor::Scalar;
    static constexpr ProductTile kTile = kProductTiles[kIndex];
    static constexpr int kBytes = sizeof(Scalar), kVector = 16 / kBytes, kStep = 2 * kVector;
    static constexpr int kChunk = kProductChunk / kBytes, kVectors = kProductChunk / 16;
    static constexpr int kThreads = kTile.threads(), kRows = kTile.rows(), kColumns = kTile.columns();
    static constexpr int kStage = (kRows + kColumns) * kProductPitch;
    // Rows a thread copies lie this far apart.
    static constexpr int kApart = kThreads / kVectors;
    static_assert(kThreads % kVectors == 0 && kTile.tiles_n % 2 == 0);

 public:
    __device__ __forceinline__ Product(const ProductParams& params, unsigned char* memory)
        : p(params),
          smem(memory),
          at(shared_address(memory)),
          thread(threadIdx.x),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32) {
        const int tiles = (p.columns + kColumns - 1) / kColumns;
        first_row = static_cast<int64_t>(blockIdx.x / tiles) * kRows;
        first_column = blockIdx.x % tiles * kColumns;
    }

    __device__ __forceinline__ void run() {
        const int chunks = (p.inner + kChunk - 1) / kChunk;
        const int rows = static_cast<int>(min(p.rows - first_row, static_cast<int64_t>(kRows)));
        const int columns = min(p.columns - first_column, kColumns);
        const Source<kRows> x(static_cast<const Scalar*>(p.x) + first_row * p.inner, thread, rows, p.inner);
        const Source<kColumns> w(static_cast<const Scalar*>(p.w) + static_cast<int64_t>(first_column) * p.inner, thread,
                                 columns, p.inner);
#pragma unroll
        for (int stage = 0; stage < kProductStages - 1; ++stage) {
            if (stage < chunks) copy(stage, stage, x, w);
            commit_copies();
        }
        float sums[kTile.tiles_m][kTile.tiles_n][4];
        start(sums);
        int buffer = 0;
#pragma unroll 1
        for (int c = 0; c < chunks; ++c) {
            wait_for_copies_but<kProductStages - 2>();
            __syncthreads();
            const int ahead = c + kProductStages - 1;
            // Into the buffer that all warps left before the barrier.
            if (ahead < chunks) copy(ahead, buffer == 0 ? kProductStages - 1 : buffer - 1, x, w);
            commit_copies();
            multiply_chunk(c, buffer, sums);
            buffer = buffer == kProductStages - 1 ? 0 : buffer + 1;
        }
        __syncthreads();
        store(sums, rows, columns);
    }

 private:
    using Sums = float[kTile.tiles_m][kTile.tiles_n][4];

    // The rows of an operand that a thread copies. Those past the last repeat it: what they make is not stored.
    template <int kCount>
    struct Source {
        const Scalar* first;
        uint32_t at[(kCount + kApart - 1) / kApart];

        __device__ __forceinline__ Source(const Scalar* from, int thread, int rows, int inner) : first(from) {
#pragma unroll
            for (int i = 0; i < kCount; i += kApart) {
                at[i / kApart] =
                    min(thread / kVectors + i, rows - 1) * inner + min(thread % kVectors * kVector, inner - kVector);
            }
        }
        // 16 bytes of each row, or zeros past the last channel.
        __device__ __forceinline__ void copy(uint32_t to, int channel, bool wanted) const {
#pragma unroll
            for (int i = 0; i < kCount; i += kApart) {
                if (kCount % kApart != 0 && i + int(threadIdx.x) / kVectors >= kCount) break;
                copy_async(to + i * kProductPitch, first + at[i / kApart] + channel, wanted);
            }
        }
    };

    __device__ __forceinline__ void copy(int chunk, int buffer, const Source<kRows>& x, const Source<kColumns>& w) {
        const bool wanted = chunk * kChunk + thread % kVectors * kVector < p.inner;
        const int channel = wanted ? chunk * kChunk : 0;
        const uint32_t to = at + buffer * kStage + thread / kVectors * kProductPitch + thread % kVectors * 16;
        x.copy(to, channel, wanted);
        w.copy(to + kRows * kProductPitch, channel, wanted);
    }

    __device__ __forceinline__ int first_m() const { return warp / kTile.warps_n * kTile.tiles_m * 16; }
    __device__ __forceinline__ int first_n() const { return warp % kTile.warps_n * kTile.tiles_n * 8; }

    __device__ __forceinline__ void start(Sums& sums) const {
#pragma unroll
        for (int j = 0; j < kTile.tiles_n; ++j) {
            const int column = first_column + first_n() + j * 8 + lane % 4 * 2;
            const float2 bias =
                column < p.columns ? *reinterpret_cast<const float2*>(p.bias + column) : make_float2(0, 0);
#pragma unroll
            for (int i = 0; i < kTile.tiles_m; ++i) {
                sums[i][j][0] = sums[i][j][2] = bias.x;
                sums[i][j][1] = sums[i][j][3] = bias.y;
            }
        }
    }

    __device__ __forceinline__ void multiply_chunk(int chunk, int buffer, Sums& sums) {
        const uint32_t x = at + buffer * kStage + (first_m() + (lane & 15)) * kProductPitch + (lane >> 4) * 16;
        const uint32_t w = at + buffer * kStage + (kRows + first_n() + (lane & 7) + (lane >> 4) * 8) * kProductPitch +
                           (lane >> 3 & 1) * 16;
#pragma unroll
        for (int step = 0; step < kProductChunk / 32; ++step) {
            if (chunk * kChunk + step * kStep >= p.inner) break;
            Left<Tensor> left[kTile.tiles_m];
#pragma unroll
            for (int i = 0; i < kTile.tiles_m; ++i) left[i].load(x + i * 16 * kProductPitch + step * 32);
#pragma unroll
            for (int j = 0; j < kTile.tiles_n; j += 2) {
                Right<Tensor> right;
                right.load(w + j * 8 * kProductPitch + step * 32);
#pragma unroll
                for (int i = 0; i < kTile.tiles_m; ++i) {
                    multiply<0>(sums[i][j], left[i], right);
                    multiply<1>(sums[i][j + 1], left[i], right);
                }
            }
        }
    }

    // Rows are put together in shared memory, so that global memory is written 16 bytes at a time.
    __device__ __forceinline__ void store(const Sums& sums, int rows, int columns) {
        constexpr int kPitch = kColumns * kBytes + 16;
        const Scalar* shortcut = static_cast<const Scalar*>(p.shortcut);
#pragma unroll
        for (int i = 0; i < kTile.tiles_m; ++i) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int row = first_m() + i * 16 + half * 8 + lane / 4;
                unsigned char* to = smem + row * kPitch + (first_n() + lane % 4 * 2) * kBytes;
                const int64_t position = first_row + min(row, rows - 1);
                const Scalar* from = shortcut + position * p.columns + first_column + first_n() + lane % 4 * 2;
#pragma unroll
                for (int j = 0; j < kTile.tiles_n; ++j) {
                    if (first_n() + j * 8 >= columns) break;
                    float low = sums[i][j][half * 2], high = sums[i][j][half * 2 + 1];
                    if (shortcut != nullptr) {
                        const float2 x = load_pair<Tensor>(from + j * 8);
                        low += x.x, high += x.y;
                    }
                    store_pair<Tensor>(to + j * 8 * kBytes, low, high);
                }
            }
        }
        __syncthreads();
        Scalar* out = static_cast<Scalar*>(p.out) + first_row * p.columns + first_column;
        const int vectors = columns / kVector;
#pragma unroll 1
        for (int row = thread / kVectors; row < rows; row += kApart) {
            uint4* to = reinterpret_cast<uint4*>(out + static_cast<int64_t>(row) * p.columns);
            const uint4* from = reinterpret_cast<const uint4*>(smem + row * kPitch);
#pragma unroll 1
            for (int vector = thread % kVectors; vector < vectors; vector += kVectors) to[vector] = from[vector];
        }
    }

    const ProductParams& p;
    unsigned char* const smem;
    const uint32_t at;
    const int thread, warp, lane;
    int64_t first_row;
    int first_column;
};

}  // namespace mbv2::cuda
