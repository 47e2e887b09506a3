// One inverted residual block for inference in one kernel: expand 1x1, ReLU6, depthwise 3x3, ReLU6, project 1x1.
//
// A thread block makes a tile of outputs (rows x columns of some images, all output channels). The input tile with its
// halo stays in shared memory; then, one chunk of hidden channels after the other:
//
//   expand     a1 = relu6(x W1^T + b1) for the input positions inside the image; the border around them stays zero
//   depthwise  a2 = relu6(a1 * wd + bd)
//   project    sums += a2 W3^T in registers
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

template <class Tr>
class Block {
    using Tensor = typename Tr::Tensor;
    using Scalar = typename Tr::Scalar;
    static constexpr TileShape kShape = Tr::kShape;

 public:
    __device__ __forceinline__ Block(const FusedParams& params, unsigned char* memory)
        : p(params),
          smem(memory),
          at(shared_address(memory)),
          thread(threadIdx.x),
          warp(threadIdx.x / 32),
          lane(threadIdx.x % 32),
          expands(params.w1 != nullptr) {}

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

        float sums[kShape.tiles_m][kShape.tiles_n][4];
        start(sums);
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
            if (c >= 0) project(here, buffer, sums);
            if (expands && c + 1 < count) expand(next, buffer);
            if (!expands) wait_for_copies();
            __syncthreads();
        }
        if (p.splits > 1) {
            store_partial(sums);
        } else {
            store(sums);
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
        if (this_chunk) copy_project_weights(first_channel, buffer);
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

    // --- stages ------------------------------------------------------------------------------------------------

    // An item is 32 positions x 64 bytes of hidden channels.
    __device__ __forceinline__ void expand(int first_channel, int buffer) {
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
    template <int kStride>
    __device__ __forceinline__ void depthwise(int first_channel, int buffer) {
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

    template <int kStride>
    __device__ __forceinline__ void depthwise_by_diagonals(int group, int step, int buffer) {
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
        unsigned char* to =
            smem + p.at_a2 + (group * Tr::kWalk * 16 + lane / 4) * Tr::kPitch + step * 32 + lane % 4 * 4;
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
    __device__ __forceinline__ void depthwise_by_multiply_adds(int group, int step, int buffer) {
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

    static __device__ __forceinline__ void load_row(float2 (&row)[3], const unsigned char* from) {
#pragma unroll
        for (int s = 0; s < 3; ++s) row[s] = *reinterpret_cast<const float2*>(from + s * Tr::kPitch);
    }

    __device__ __forceinline__ int first_m() const { return warp / kShape.warps_n * kShape.tiles_m; }
    __device__ __forceinline__ int first_n() const { return warp % kShape.warps_n * kShape.tiles_n; }

    __device__ __forceinline__ void project(int first_channel, int buffer,
                                            float (&sums)[kShape.tiles_m][kShape.tiles_n][4]) {
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

    // The bias of the projection, or nothing where `add_partials` adds it.
    __device__ __forceinline__ void start(float (&sums)[kShape.tiles_m][kShape.tiles_n][4]) const {
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

    // --- results -----------------------------------------------------------------------------------------------

    __device__ __forceinline__ int64_t first_output() const {
        return (static_cast<int64_t>(shared_tile().first_image) * p.out_height + shared_tile().top) * p.out_width +
               shared_tile().left;
    }
    __device__ __forceinline__ Unit unit_of_row(int row) const {
        return units()[row / (16 * Tr::kWalk) * 16 + row % 16];
    }

    // Sums of this split's hidden channels; `add_partials` adds them up.
    __device__ __forceinline__ void store_partial(const float (&sums)[kShape.tiles_m][kShape.tiles_n][4]) {
        float* out =
            p.partial + (static_cast<int64_t>(shared_tile().split) * p.out_positions + first_output()) * p.outputs;
        each_row([&](int i, int half, int row, const Unit& unit, int walked) {
            float* to = out + static_cast<int64_t>(unit.out + walked * p.out_width) * p.outputs;
            each_pair([&](int j, int channel) {
                const float* pair = sums[i][j] + half * 2;
                *reinterpret_cast<float2*>(to + channel) = make_float2(pair[0], pair[1]);
            });
        });
    }

    // Rows are put together in shared memory, so that global memory is written 16 bytes at a time.
    __device__ __forceinline__ void store(const float (&sums)[kShape.tiles_m][kShape.tiles_n][4]) {
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

    __device__ __forceinline__ void stage_alone(const float (&sums)[kShape.tiles_m][kShape.tiles_n][4],
                                                unsigned char* stage, int pitch) {
        each_row([&](int i, int half, int row, const Unit& unit, int walked) {
            unsigned char* to = stage + row * pitch;
            each_pair([&](int j, int channel) {
                const float* pair = sums[i][j] + half * 2;
                store_pair<Tensor>(to + channel * Tr::kBytes, pair[0], pair[1]);
            });
        });
    }

    __device__ __forceinline__ void stage_with_shortcut(const float (&sums)[kShape.tiles_m][kShape.tiles_n][4],
                                                        unsigned char* stage, int pitch) {
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
    __device__ __forceinline__ const Scalar* shortcut(const Unit& unit, int walked) const {
        if (expands) {
            const int position = unit.x + walked * shared_tile().in_columns;
            return reinterpret_cast<const Scalar*>(smem + position * p.x_pitch);
        }
        return static_cast<const Scalar*>(p.x) + (first_output() + unit.out + walked * p.out_width) * p.inputs;
    }

    // Calls use(tile, half, row, unit, walked) for every row of sums of this lane whose output exists.
    template <class Use>
    __device__ __forceinline__ void each_row(const Use& use) {
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

    template <class Use>
    __device__ __forceinline__ void each_pair(const Use& use) {
        int first = first_n() * 8 + lane % 4 * 2;
        // Found anew, or the compiler keeps what `start` made of it in registers of the main loop.
        asm volatile("" : "+r"(first));
#pragma unroll
        for (int j = 0; j < kShape.tiles_n; ++j) {
            if (first + j * 8 >= p.outputs) break;
            use(j, first + j * 8);
        }
    }

    const FusedParams& p;
    unsigned char* const smem;
    const uint32_t at;
    const int thread, warp, lane;
    const bool expands;
};

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
