// One small kernel per language feature.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cassert>
#include <cstdio>

__constant__ float table[4] = {1.f, 2.f, 4.f, 8.f};
__device__ int counter = 5;

__device__ __noinline__ int fibonacci(int n) { return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2); }
__device__ __noinline__ float2 scale(float2 v, float by) { return make_float2(v.x * by, v.y * by); }

extern "C" __global__ void functions(int* out, float2* pairs) {
    int i = threadIdx.x;
    out[i] = fibonacci(i % 12) + counter;
    pairs[i] = scale(pairs[i], table[i % 4]);
}
extern "C" __global__ void local_array(int* out, int n) {
    int values[32];
    for (int i = 0; i < 32; i++) values[i] = i * n;
    out[threadIdx.x] = values[out[threadIdx.x]];
}
extern "C" __global__ void print(int n) {
    if (threadIdx.x == 1)
        printf("block %d thread %d %s %.2f %lld\n", blockIdx.x, threadIdx.x, "text", 1.5 * n, 1ll << 40);
}
extern "C" __global__ void asserts(int n) { assert(threadIdx.x < n); }
extern "C" __global__ void traps(int n) {
    if (threadIdx.x == n) __trap();
}
extern "C" __global__ void count(int* out, int limit) {
    out[threadIdx.x] = __syncthreads_count(threadIdx.x < limit) + 1000 * __syncthreads_or(threadIdx.x == 3);
}
extern "C" __global__ void dynamic_shared(float* out, int n) {
    extern __shared__ float buffer[];
    for (int i = threadIdx.x; i < n; i += blockDim.x) buffer[i] = i;
    __syncthreads();
    for (int i = threadIdx.x; i < n; i += blockDim.x) out[i] = buffer[n - 1 - i];
}
extern "C" __global__ void packed(const __half2* a, const __half2* b, __half2* o, const __nv_bfloat162* c,
                                  const __nv_bfloat162* d, __nv_bfloat162* p) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    __half2 clipped = __hmin2(__hmax2(__hfma2(a[i], b[i], a[i]), __float2half2_rn(0.f)), __float2half2_rn(6.f));
    o[i] = __hgt2(a[i], b[i]).x == __half(1.f) ? clipped : __hadd2(a[i], b[i]);
#if __CUDA_ARCH__ >= 800
    p[i] = __hfma2(c[i], d[i], d[i]);
#else
    float2 x = __bfloat1622float2(c[i]), y = __bfloat1622float2(d[i]);
    p[i] = __floats2bfloat162_rn(fmaf(x.x, y.x, y.x), fmaf(x.y, y.y, y.y));
#endif
}
extern "C" __global__ void arithmetic(const long long* a, const long long* b, long long* o, double* r) {
    int i = threadIdx.x;
    o[i] = a[i] / b[i] + a[i] % b[i] * 3 + __mul64hi(a[i], b[i]) + (long long)__umulhi((unsigned)a[i], (unsigned)b[i]) +
           __popcll(a[i]) + __clzll(b[i]);
    r[i] =
        sqrt(fabs((double)a[i])) + sinf((float)i) + expf(-(float)i) + __fdividef((float)i, 3.f) + (double)(float)b[i];
}
struct Shape {
    int rows, cols;
    float factor;
};
extern "C" __global__ void by_value(float* out, Shape s) {
    if (threadIdx.x < s.rows * s.cols) out[threadIdx.x] = s.factor * (threadIdx.x / s.cols);
}
extern "C" __global__ void reduce(const float* x, float* result, float* partial, unsigned* ticket, int n) {
    __shared__ float sums[32];
    __shared__ bool last;
    float v = 0;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) v += x[i];
    for (int d = 16; d; d >>= 1) v += __shfl_down_sync(0xffffffffu, v, d);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = v;
    __syncthreads();
    if (threadIdx.x == 0) {
        for (int w = 1; w < blockDim.x / 32; w++) v += sums[w];
        partial[blockIdx.x] = v;
        __threadfence();
        last = atomicAdd(ticket, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && threadIdx.x == 0) {
        float total = 0;
        for (int b = 0; b < gridDim.x; b++) total += ((volatile float*)partial)[b];
        *result = total;
    }
}
