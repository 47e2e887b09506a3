// One inverted residual block for inference in one kernel: expand 1x1, ReLU6, depthwise 3x3, ReLU6, project 1x1.
//
// A thread block makes a tile of outputs (rows x columns of some images, all output channels). The input tile with its
// halo stays in shared memory; then, one chunk of hidden channels after the other:
//
//   expand     a1 = relu6(x W1^T + b1) for the input positions inside the image; the border around them stays zero
//   depthwise  a2 = relu6(a1 * wd + bd)
//   project    sums += a2 W3^T in registers
//
// A tile that does not project writes a2 to memory instead, for product.cuh: the first launch of a pair.
//
// expand of the next chunk and project of this one share a barrier, so there are two barriers a chunk. Weights arrive
// by cp.async one chunk ahead, or during the depthwise phase where shared memory holds them once only. All three
// products are tensor-core instructions, the depthwise one too: a tap is a diagonal 8x8 matrix, and two taps of 8
// channels make the 16 terms of one m16n8k16. That wastes seven eighths of the multiplications and needs a quarter of
// the instructions of multiply-adds in registers, and it is the rate of instructions that bounds the kernel. Columns
// are walked down `walk` outputs at a time, so that a row of a1 is loaded once for the three rows of outputs it is part
// of. float32 walks the same way with multiply-adds.
//
// Rows of 16 in a2 and in the sums are "units", columns of `walk` outputs of the tile: any 16 of them may be together,
// whatever the tile's width, as ldmatrix takes an address for each row.
#pragma once

#include "fused_tile.cuh"

namespace mbv2::cuda {

template <class Tr>
class Block {
    using Tensor = typename Tr::Tensor;
    using Scalar = typename Tr::Scalar;
    static constexpr TileShape kShape = Tr::kShape;
    static constexpr bool kProjects = kShape.projects();
    using Sums = float[kShape.tiles_m][kProjects ? kShape.tiles_n : 1][4];

 public:
    __device__ __forceinline__ Block(const FusedParams& params, unsigned char* memory)
        : p(params),
          smem(memory),
          at(shared_address(memory)),
          thread(threadIdx.x),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          expands(!kProjects || params.w1 != nullptr) {}

    __device__ __forceinline__ void run() {
        const Tile mine(p, Tr::kWalk);
        const int chunks = (p.hidden + Tr::kChunk - 1) / Tr::kChunk;
        const int first = mine.split * p.chunks;
        const int count = min(p.chunks, chunks - first);
        const int channel = first * Tr::kChunk;

        if (thread == 0) shared_tile() = mine;
        fill_tables(mine);
        clear_a1(mine);
        __syncthreads();
        if (expands) copy_x();

        Sums sums;
        if constexpr (kProjects) start(sums);
        // The pass before the first chunk only loads and expands.
#pragma unroll 1
        for (int c = -1; c < count; ++c) {
            const int here = channel + c * Tr::kChunk, next = here + Tr::kChunk, buffer = c & 1;
            if (c < 0 || !p.ahead) copy_weights(here, buffer, c >= 0, c + 1 < count);
            if (c >= 0 && p.stride == 1) depthwise<1>(here, buffer ^ 1);
            if (c >= 0 && p.stride == 2) depthwise<2>(here, buffer ^ 1);
            wait_for_copies();
            __syncthreads();
            if (!expands && c + 1 < count) copy_a1(next);
            if (p.ahead && c + 1 < count) copy_weights(next, buffer ^ 1, true, c + 2 < count);
            if constexpr (kProjects) {
                if (c >= 0) project(here, buffer, sums);
            } else {
                if (c >= 0) store_hidden(here);
            }
            if (expands && c + 1 < count) expand(next, buffer);
            if (!expands) wait_for_copies();
            __syncthreads();
        }
        if constexpr (kProjects) {
            if (p.splits > 1) {
                store_partial(sums);
            } else {
                store(sums);
            }
        }
    }

 private:
    // --- set-up ------------------------------------------------------------------------------------------------

    // Read from shared memory where it is needed, the tile takes no registers of the main loop.
    __device__ __forceinline__ Tile& shared_tile() const { return *reinterpret_cast<Tile*>(smem + p.at_tables); }
    __device__ __forceinline__ int positions() const { return shared_tile().positions; }
    __device__ __forceinline__ Unit* units() const { return reinterpret_cast<Unit*>(smem + p.at_tables + kTileBytes); }
    __device__ __forceinline__ Place* places() const { return reinterpret_cast<Place*>(units() + Tr::kUnits); }
    __device__ __forceinline__ int walks() const { return (p.tile_height + Tr::kWalk - 1) / Tr::kWalk; }
    __device__ __forceinline__ int groups() const { return (p.tile_images * walks() * p.tile_width + 15) / 16; }

    __device__ __forceinline__ void fill_tables(const Tile& tile) {
#pragma unroll 1
        for (int u = thread; u < groups() * 16; u += Tr::kThreads) {
            const int column = u % p.tile_width, walk = u / p.tile_width % walks();
            const int image = u / p.tile_width / walks();
            Unit unit = {0, 0, 0, 0};
            if (image < p.tile_images) {
                const int row = walk * Tr::kWalk;
                const int a1_row = (image * tile.a1_rows + row * p.stride) * tile.a1_columns + column * p.stride;
                unit.a1 = a1_row * Tr::kPitch;
                unit.out = (image * p.out_height + row) * p.out_width + column;
                unit.x = (image * tile.in_rows + row + tile.top - tile.in_top) * tile.in_columns + column + tile.left -
                         tile.in_left;
                const bool inside = image < tile.images && column < tile.columns;
                unit.rows = inside ? min(max(tile.rows - row, 0), Tr::kWalk) : 0;
            }
            units()[u] = unit;
        }
#pragma unroll 1
        for (int i = thread; i < padded(tile.positions); i += Tr::kThreads) {
            Place place = {0, -1};
            if (i < tile.positions) {
                const int column = i % tile.in_columns, row = i / tile.in_columns % tile.in_rows;
                const int image = i / tile.in_columns / tile.in_rows;
                place.source = (image * p.height + tile.in_top + row) * p.width + tile.in_left + column;
                place.a1 = ((image * tile.a1_rows + tile.in_top - tile.a1_top + row) * tile.a1_columns + tile.in_left -
                            tile.a1_left + column) *
                           Tr::kPitch;
            }
            places()[i] = place;
        }
    }

    static __device__ __forceinline__ int padded(int positions) { return (positions + 31) / 32 * 32; }

    // What expand does not write is the zero border of the image.
    __device__ __forceinline__ void clear_a1(const Tile& tile) {
        const int vectors = p.tile_images * tile.a1_rows * tile.a1_columns * (Tr::kPitch / 16);
        uint4* a1 = reinterpret_cast<uint4*>(smem + p.at_a1);
#pragma unroll 1
        for (int i = thread; i < vectors; i += Tr::kThreads) a1[i] = make_uint4(0, 0, 0, 0);
    }

    // --- copies to shared memory -------------------------------------------------------------------------------

    __device__ __forceinline__ const Scalar* images_of(const void* x) const {
        return static_cast<const Scalar*>(x) +
               static_cast<int64_t>(shared_tile().first_image) * p.height * p.width * p.inputs;
    }

    __device__ __forceinline__ void copy_x() {
        const Scalar* x = images_of(p.x);
        const int vectors = p.x_vectors.value;
#pragma unroll 1
        for (int i = thread; i < padded(positions()) * vectors; i += Tr::kThreads) {
            const int position = quotient(i, p.x_vectors), channel = (i - position * vectors) * Tr::kVector;
            const bool wanted = position < shared_tile().positions && channel < p.inputs;
            const int64_t from = static_cast<int64_t>(places()[position].source) * p.inputs + channel;
            copy_async(at + position * p.x_pitch + channel * Tr::kBytes, x + (wanted ? from : 0), wanted);
        }
    }

    // A block without expansion: the chunk's channels of x are a1.
    __device__ __forceinline__ void copy_a1(int first_channel) {
        constexpr int kVectors = kShape.chunk_bytes / 16;
        const Scalar* x = images_of(p.x);
#pragma unroll 1
        for (int i = thread; i < shared_tile().positions * kVectors; i += Tr::kThreads) {
            const int position = i / kVectors, channel = i % kVectors * Tr::kVector;
            const bool wanted = first_channel + channel < p.hidden;
            const int64_t from = static_cast<int64_t>(places()[position].source) * p.inputs + first_channel + channel;
            copy_async(at + p.at_a1 + places()[position].a1 + channel * Tr::kBytes, x + (wanted ? from : 0), wanted);
        }
    }

    // Weights of `project` for a chunk, and of `expand` and `depthwise` for the one after it.
    __device__ __forceinline__ void copy_weights(int first_channel, int buffer, bool this_chunk, bool next_chunk) {
        if (kProjects && this_chunk) copy_project_weights(first_channel, buffer);
        if (next_chunk && expands) copy_expand_weights(first_channel + Tr::kChunk, buffer);
        if (next_chunk) copy_depthwise_weights(first_channel + Tr::kChunk, buffer);
    }

    // Two buffers of taps and both biases, then one or two of W3 and W1.
    static constexpr int kTapsBytes = 9 * kShape.chunk_bytes, kTapsBuffer = kTapsBytes + 8 * Tr::kChunk;
    __device__ __forceinline__ int taps_of(int buffer) const { return p.at_weights + buffer * kTapsBuffer; }
    __device__ __forceinline__ int biases_of(int buffer) const { return taps_of(buffer) + kTapsBytes; }
    __device__ __forceinline__ int w3_of(int buffer) const {
        return p.at_weights + 2 * kTapsBuffer + buffer * p.weights_step;
    }
    __device__ __forceinline__ int w1_of(int buffer) const { return w3_of(buffer) + p.w3_bytes; }

    __device__ __forceinline__ void copy_expand_weights(int first_channel, int buffer) {
        const Scalar* w1 = static_cast<const Scalar*>(p.w1) + static_cast<int64_t>(first_channel) * p.inputs;
        const int vectors = p.x_vectors.value;
        const uint32_t to = at + w1_of(buffer);
#pragma unroll 1
        for (int i = thread; i < Tr::kChunk * vectors; i += Tr::kThreads) {
            const int row = quotient(i, p.x_vectors), channel = (i - row * vectors) * Tr::kVector;
            const bool wanted = first_channel + row < p.hidden && channel < p.inputs;
            copy_async(to + row * p.x_pitch + channel * Tr::kBytes, wanted ? w1 + row * p.inputs + channel : w1,
                       wanted);
        }
    }

    __device__ __forceinline__ void copy_depthwise_weights(int first_channel, int buffer) {
        constexpr int kTaps = 9 * kShape.chunk_bytes / 16, kBiases = Tr::kChunk / 4;
        const Scalar* wd = static_cast<const Scalar*>(p.wd) + static_cast<int64_t>(first_channel) * 9;
        const int left = p.hidden - first_channel;
#pragma unroll 1
        for (int i = thread; i < kTaps; i += Tr::kThreads) {
            const bool wanted = i * Tr::kVector < left * 9;
            copy_async(at + taps_of(buffer) + i * 16, wanted ? wd + i * Tr::kVector : wd, wanted);
        }
#pragma unroll 1
        for (int i = thread; i < 2 * kBiases; i += Tr::kThreads) {
            const float* bias = (i < kBiases ? p.b1 : p.bd);
            const int channel = i % kBiases * 4;
            const bool wanted = channel < left && bias != nullptr;
            copy_async(at + biases_of(buffer) + i * 16, wanted ? bias + first_channel + channel : p.bd, wanted);
        }
    }

    __device__ __forceinline__ void copy_project_weights(int first_channel, int buffer) {
        constexpr int kVectors = kShape.chunk_bytes / 16;
        const Scalar* w3 = static_cast<const Scalar*>(p.w3) + first_channel;
        const int rows = (p.outputs + 15) / 16 * 16;
#pragma unroll 1
        for (int i = thread; i < rows * kVectors; i += Tr::kThreads) {
            const int row = i / kVectors, channel = i % kVectors * Tr::kVector;
            const bool wanted = row < p.outputs && first_channel + channel < p.hidden;
            const int64_t from = static_cast<int64_t>(row) * p.hidden + channel;
            copy_async(at + w3_of(buffer) + row * Tr::kPitch + channel * Tr::kBytes, wanted ? w3 + from : w3, wanted);
        }
    }

    // --- stages: fused_stages.cuh ------------------------------------------------------------------------------

    __device__ __forceinline__ void expand(int first_channel, int buffer);
    template <int kStride>
    __device__ __forceinline__ void depthwise(int first_channel, int buffer);
    template <int kStride>
    __device__ __forceinline__ void depthwise_by_diagonals(int group, int step, int buffer);

    // A row of a1 under three neighbouring columns of taps, for 16 units and two times 8 channels. What one ldmatrix
    // loads is one operand, as it must lie in neighbouring registers: the first two columns of 8 channels, and the
    // third column of all 16.
    struct Row {
        struct Source {
            uint32_t first_two, third;
        };
        uint32_t first_two[2][4], third[4];

        __device__ __forceinline__ void load(Source& from, uint32_t down) {
            load_matrices(first_two[0], from.first_two);
            load_matrices(first_two[1], from.first_two + 16);
            load_matrices(third, from.third);
            from.first_two += down, from.third += down;
        }
        // d = c + this row times taps kTap, kTap + 1 and kTap + 2.
        template <int kTap>
        __device__ __forceinline__ void add(float (&d)[4], int q, const uint32_t (&taps)[9],
                                            const float (&c)[4]) const {
            const uint32_t (&a)[4] = first_two[q];
            Tensor::multiply(d, a[0], a[1], a[2], a[3], taps[kTap], taps[kTap + 1], c);
            Tensor::multiply_half(d, third[2 * q], third[2 * q + 1], taps[kTap + 2]);
        }
    };

    template <int kStride>
    __device__ __forceinline__ void depthwise_by_multiply_adds(int group, int step, int buffer);

    static __device__ __forceinline__ void load_row(float2 (&row)[3], const unsigned char* from) {
#pragma unroll
        for (int s = 0; s < 3; ++s) row[s] = *reinterpret_cast<const float2*>(from + s * Tr::kPitch);
    }

    __device__ __forceinline__ int first_m() const { return warp / kShape.warps_n * kShape.tiles_m; }
    __device__ __forceinline__ int first_n() const { return warp % kShape.warps_n * kShape.tiles_n; }

    __device__ __forceinline__ void project(int first_channel, int buffer, Sums& sums);

    // --- results: fused_results.cuh ----------------------------------------------------------------------------

    __device__ __forceinline__ int64_t first_output() const {
        return (static_cast<int64_t>(shared_tile().first_image) * p.out_height + shared_tile().top) * p.out_width +
               shared_tile().left;
    }
    __device__ __forceinline__ Unit unit_of_row(int row) const {
        return units()[row / (16 * Tr::kWalk) * 16 + row % 16];
    }

    __device__ __forceinline__ void store_hidden(int first_channel);
    __device__ __forceinline__ void start(Sums& sums) const;
    __device__ __forceinline__ void store_partial(const Sums& sums);
    __device__ __forceinline__ void store(const Sums& sums);
    __device__ __forceinline__ void stage_alone(const Sums& sums, unsigned char* stage, int pitch);
    __device__ __forceinline__ void stage_with_shortcut(const Sums& sums, unsigned char* stage, int pitch);
    __device__ __forceinline__ const Scalar* shortcut(const Unit& unit, int walked) const;
    template <class Use>
    __device__ __forceinline__ void each_row(const Use& use);
    template <class Use>
    __device__ __forceinline__ void each_pair(const Use& use);

    const FusedParams& p;
    unsigned char* const smem;
    const uint32_t at;
    const int thread, warp, lane;
    const bool expands;
};

}  // namespace mbv2::cuda

#include "fused_results.cuh"
#include "fused_stages.cuh"
