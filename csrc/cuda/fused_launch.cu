#include <cuda_runtime.h>

#include "fused_launch.h"

namespace mbv2::cuda {

// In the file of each element type: its kernels by tile, the one that adds partial sums as number kTiles.
const void* half_kernel(int index);
const void* bfloat16_kernel(int index);
const void* float_kernel(int index);

// Likewise the products by tile.
const void* half_product(int index);
const void* bfloat16_product(int index);
const void* float_product(int index);

namespace {

constexpr int kSumThreads = 256;  // each makes four channels of a position

using Table = const void* (*)(int);

template <class Params>
cudaError_t launch(const void* kernel, int64_t blocks, int threads, int shared_bytes, const Params& params,
                   cudaStream_t stream) {
    Params copy = params;
    void* arguments[] = {&copy};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(threads), arguments, shared_bytes,
                            stream);
}

// Above 48 KB a kernel must be allowed its shared memory; the call is cheap, and legal while a graph is captured.
cudaError_t allow_shared(const void* kernel, int bytes) {
    return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
}

const char* words(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

const char* launch_fused(Element element, int tile, int64_t blocks, int shared_bytes, const FusedParams& params,
                         void* stream_handle) {
    constexpr Table kTables[] = {half_kernel, bfloat16_kernel, float_kernel};
    const Table table = kTables[static_cast<int>(element)];
    const auto stream = static_cast<cudaStream_t>(stream_handle);
    const void* kernel = table(tile);
    cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error == cudaSuccess) {
        error = launch(kernel, blocks, kTileShapes[tile].threads(), shared_bytes, params, stream);
    }
    if (error == cudaSuccess && kTileShapes[tile].projects() && params.splits > 1) {
        const int64_t quads = params.out_positions * params.outputs / 4;
        error = launch(table(kTiles), (quads + kSumThreads - 1) / kSumThreads, kSumThreads, 0, params, stream);
    }
    return words(error);
}

const char* launch_product(Element element, int tile, int64_t blocks, int shared_bytes, const ProductParams& params,
                           void* stream) {
    constexpr Table kTables[] = {half_product, bfloat16_product, float_product};
    const void* kernel = kTables[static_cast<int>(element)](tile);
    cudaError_t error = allow_shared(kernel, shared_bytes);
    if (error == cudaSuccess) {
        error = launch(kernel, blocks, kProductTiles[tile].threads(), shared_bytes, params,
                       static_cast<cudaStream_t>(stream));
    }
    return words(error);
}

}  // namespace mbv2::cuda
