// The whole network: its shape, the packing of its weights, and its run, in any of the formats of formats.h. The
// templates are made in network_<format>.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace mbv2::cpu {

// One inverted residual block; the first block's hidden channels come from the stem, the others' from a 1x1
// convolution of the block's input.
struct Block {
    int64_t inputs, hidden, outputs, stride;
    bool residual;
};

struct Plan {
    static constexpr int64_t kMostBlocks = 64;

    int64_t classes, last_channels, block_count;
    Block blocks[kMostBlocks];

    // From [classes, last channels, then for each block inputs, hidden, outputs, stride, residual].
    // Throws std::invalid_argument if the numbers make no network.
    Plan(const int64_t* numbers, int64_t count);
};

struct Image {
    const float* data;
    int64_t batch, height, width;
    int64_t batch_stride, channel_stride, row_stride, column_stride;  // column_stride is 1 or 3
};

// Calls body(context, begin, end) on ranges that cover [0, count), on as many threads as there are.
struct Threads {
    int count;
    void (*run)(int64_t count, void* context, void (*body)(void* context, int64_t begin, int64_t end));
};

// Seconds that the parts of a run took, for benchmarks: the blocks in order (the stem is in the first), the head with
// the pooling, the classifier.
struct Times {
    double parts[Plan::kMostBlocks + 2];
};

// How many bytes the packed network has.
template <class F>
int64_t packed_size(const Plan& plan, const Kernels<F>& kernels);

// How many values each of the plain weights has, in order: stem weight [out, 3, 3, 3] and bias; of each block expand
// weight [hidden, in] and bias (not for the first), depthwise weight [hidden, 3, 3] and bias, project weight and
// bias; head weight and bias; classifier weight and bias. A bias is [output_vectors, out].
template <class F>
std::vector<int64_t> weight_sizes(const Plan& plan);

// Packs them into `packed`, which is aligned to 64 bytes.
template <class F>
void pack(const Plan& plan, const Kernels<F>& kernels, const float* const* weights, std::byte* packed);

// Logits [batch, classes] of the pictures. Every output is the result of the same additions in the same order on
// any number of threads. `times` may be given with one thread.
template <class F>
void run(const Plan& plan, const Kernels<F>& kernels, const std::byte* packed, const Image& image,
         const Threads& threads, float* logits, Times* times = nullptr);

}  // namespace mbv2::cpu
