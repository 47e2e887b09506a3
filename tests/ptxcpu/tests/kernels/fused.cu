// 1x1 expand + ReLU6 -> depthwise 3x3 + ReLU6, NHWC, fp16 in and out, fp32 math on tensor cores.
// One block: an 8x8 halo tile (6x6 outputs) of 32 expanded channels; 4 warps, each one 16-row slice of the 64 halo
// pixels.
#include <cuda_fp16.h>

#include <cstdint>

constexpr int TILE = 8, OUT = 6, CHANNELS = 32, MAX_CI = 64, PAD = 8;

__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], const __half* row) {
    uint32_t address = (uint32_t)__cvta_generic_to_shared(row);
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}
__device__ __forceinline__ void copy16(__half* to, const __half* from, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((uint32_t)__cvta_generic_to_shared(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
}

extern "C" __global__ void __launch_bounds__(128)
    fused(const __half* __restrict__ x, const __half* __restrict__ w1, const float* __restrict__ b1,
          const float* __restrict__ w2, const float* __restrict__ b2, __half* __restrict__ y, int H, int W, int CI,
          int CE) {
    __shared__ __align__(16) __half xs[TILE * TILE][MAX_CI + PAD];
    __shared__ __align__(16) __half ws[CHANNELS][MAX_CI + PAD];
    __shared__ __half2 hidden[TILE * TILE][CHANNELS / 2 + 1];
    const int t = threadIdx.x, lane = t % 32, warp = t / 32, n = blockIdx.z, c0 = blockIdx.y * CHANNELS;
    const int tiles_x = (W + OUT - 1) / OUT, oy0 = blockIdx.x / tiles_x * OUT, ox0 = blockIdx.x % tiles_x * OUT;
    for (int i = t; i < TILE * TILE * (CI / 8); i += 128) {
        int p = i / (CI / 8), c = i % (CI / 8) * 8, iy = oy0 + p / TILE - 1, ix = ox0 + p % TILE - 1;
        bool inside = iy >= 0 && iy < H && ix >= 0 && ix < W;
        copy16(&xs[p][c], x + (inside ? ((size_t)(n * H + iy) * W + ix) * CI + c : 0), inside);
    }
    for (int i = t; i < CHANNELS * (CI / 8); i += 128) {
        int r = i / (CI / 8), c = i % (CI / 8) * 8;
        copy16(&ws[r][c], w1 + (size_t)(c0 + r < CE ? c0 + r : 0) * CI + c, c0 + r < CE);
    }
    asm volatile("cp.async.commit_group;");
#ifndef BUG_NO_WAIT
    asm volatile("cp.async.wait_group 0;" ::: "memory");
#endif
#ifndef BUG_NO_BARRIER
    __syncthreads();
#endif
    float acc[4][4] = {};
    for (int k = 0; k < CI; k += 16) {
        uint32_t a[4];
        load_matrices(a, &xs[warp * 16 + lane % 16][k + lane / 16 * 8]);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            uint32_t b[4];
            load_matrices(b, &ws[j * 8 + lane % 8 + lane / 16 * 8][k + lane / 8 % 2 * 8]);
#pragma unroll
            for (int h = 0; h < 2; h++)
                asm volatile(
                    "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                    "{%0,%1,%2,%3};"
                    : "+f"(acc[j + h][0]), "+f"(acc[j + h][1]), "+f"(acc[j + h][2]), "+f"(acc[j + h][3])
                    : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[2 * h]), "r"(b[2 * h + 1]));
        }
    }
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
            int p = warp * 16 + lane / 4 + half * 8, c = j * 8 + lane % 4 * 2, iy = oy0 + p / TILE - 1,
                ix = ox0 + p % TILE - 1;
            bool inside = iy >= 0 && iy < H && ix >= 0 && ix < W && c0 + c < CE;
            float2 v = make_float2(0.f, 0.f);
            if (inside)
                v = make_float2(fminf(fmaxf(acc[j][half * 2] + b1[c0 + c], 0.f), 6.f),
                                fminf(fmaxf(acc[j][half * 2 + 1] + b1[c0 + c + 1], 0.f), 6.f));
            hidden[p][c / 2] = __float22half2_rn(v);
        }
    __syncthreads();
    const int pair = t % (CHANNELS / 2), c = c0 + pair * 2;
    if (c < CE)
        for (int q = t / (CHANNELS / 2); q < OUT * OUT; q += 8) {
            int qy = q / OUT, qx = q % OUT, oy = oy0 + qy, ox = ox0 + qx;
            if (oy >= H || ox >= W) continue;
            float2 sum = *(const float2*)(b2 + c);
#pragma unroll
            for (int k = 0; k < 9; k++) {
                float2 v = __half22float2(hidden[(qy + k / 3) * TILE + qx + k % 3][pair]),
                       w = *(const float2*)(w2 + k * CE + c);
                sum.x = fmaf(v.x, w.x, sum.x), sum.y = fmaf(v.y, w.y, sum.y);
            }
            *(__half2*)(y + ((size_t)(n * H + oy) * W + ox) * CE + c) =
                __floats2half2_rn(fminf(fmaxf(sum.x, 0.f), 6.f), fminf(fmaxf(sum.y, 0.f), 6.f));
        }
}
