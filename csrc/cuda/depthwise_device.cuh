// Pieces of the training depthwise kernels: PTX that C++ has no name for, number formats, and how a launch is cut.
#pragma once

#include <stdint.h>

#include "depthwise_kernels.h"

namespace mbv2 {
namespace cuda {

constexpr int kWarps = 4;  // of a block
constexpr int kThreads = 32 * kWarps;
static_assert(kThreads == kDepthwiseThreads);
constexpr int kSlab = 16;           // channels of a block, 16-bit types
constexpr uint32_t kNowhere = ~0u;  // an offset of something outside the image

enum BnRow { kMean, kVar, kRstd, kScale, kShift, kCount };

// --- instructions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Without a branch around it.
__device__ __forceinline__ void copy_async_if(bool wanted, uint32_t shared, uint64_t global) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %2, 0; @p cp.async.cg.shared.global [%0], [%1], 16;}" ::"r"(shared),
                 "l"(global), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

__device__ __forceinline__ uint32_t load_shared4(uint32_t at) {
    uint32_t v;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at));
    return v;
}

__device__ __forceinline__ void store_shared4(uint32_t at, uint32_t v) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}

__device__ __forceinline__ uint4 load_shared16(uint32_t at) {
    uint4 v;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(at));
    return v;
}

__device__ __forceinline__ void store_shared16(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

// Four 8x8 matrices of 16-bit values; lane l gives the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
                 : "r"(at)
                 : "memory");
}

// The same value, in a register: ptxas would compute it, or copy it to where an instruction wants it, at every use.
// What is the same in all lanes it sees through; such constants go through shared memory.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
    uint32_t v;
    asm volatile("{.reg .b32 lane; mov.u32 lane, %%laneid; shfl.sync.idx.b32 %0, %1, lane, 31, -1;}"
                 : "=r"(v)
                 : "r"(value));
    return v;
}
__device__ __forceinline__ float kept(float value) { return __uint_as_float(kept(__float_as_uint(value))); }

// Where a warp stores four 8x8 matrices, two of a tile's first channels and two of the others: addresses of rows as for
// load_matrices.
struct Rows {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    uint32_t at;
    __device__ __forceinline__ explicit Rows(uint32_t at) : at(kept(at)) {}
    __device__ __forceinline__ void store(uint32_t ahead, const uint32_t (&m)[4]) const {
        asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at + ahead), "r"(m[0]),
                     "r"(m[1]), "r"(m[2]), "r"(m[3])
                     : "memory");
    }
#else
    uint32_t at[2];  // of the first two matrices; the others lie 16 bytes further in their rows, see place
    __device__ __forceinline__ explicit Rows(uint32_t row) {
        const int lane = threadIdx.x & 31;
        for (int i = 0; i < 2; ++i) at[i] = __shfl_sync(~0u, row, 8 * i + (lane >> 2)) + 4 * (lane & 3);
    }
    __device__ __forceinline__ void store(uint32_t ahead, const uint32_t (&m)[4]) const {
#pragma unroll
        for (int i = 0; i < 4; ++i) store_shared4((at[i & 1] ^ (i & 2 ? 16 : 0)) + ahead, m[i]);
    }
#endif
};

// A store without a branch around it.
__device__ __forceinline__ void store_if(bool wanted, uint64_t to, uint4 v) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %5, 0; @p st.global.v4.b32 [%0], {%1, %2, %3, %4};}" ::"l"(to),
                 "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

// pointer + elements * two: where the compiler does not know that `two` is 2, the sum stays in one pair of registers.
__device__ __forceinline__ void walk(uint64_t& pointer, uint32_t elements, uint32_t two) {
    asm volatile("mad.wide.u32 %0, %1, %2, %0;" : "+l"(pointer) : "r"(elements), "r"(two));
}

// --- 16-bit types, two values in a register ------------------------------------------------------------------------

struct Half {
    static constexpr uint32_t kOnes = 0x3c003c00u, kSixes = 0x46004600u;
    static constexpr float kLargest = 65504.f;
    static __device__ __forceinline__ float low(uint32_t v) {
        float f;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(f) : "r"(v));
        return f;
    }
    static __device__ __forceinline__ float high(uint32_t v) {
        float f;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(f) : "r"(v));
        return f;
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t v;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    static __device__ __forceinline__ uint32_t pack_relu(float low, float high) {
        uint32_t v;
        asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    // Rounded towards zero: what is below 6 stays below it.
    static __device__ __forceinline__ uint32_t pack_relu_down(float low, float high) {
        uint32_t v;
        asm("cvt.rz.relu.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    // NaN stays NaN.
    static __device__ __forceinline__ uint32_t minimum(uint32_t a, uint32_t b) {
        uint32_t v;
        asm("min.NaN.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
        return v;
    }
    static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
        uint32_t v;
        asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
        return v;
    }
    // All ones in the halves where 0 < a < 6, or a is NaN; of an a that is clamped to [0, 6].
    static __device__ __forceinline__ uint32_t inside(uint32_t a) {
        uint32_t above, below;
        asm("set.gtu.u32.f16x2 %0, %1, %2;" : "=r"(above) : "r"(a), "r"(0));
        asm("set.ltu.u32.f16x2 %0, %1, %2;" : "=r"(below) : "r"(a), "r"(kSixes));
        return above & below;
    }
    // d = a b + c; a is 16 x 16, b 16 x 8.
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1, const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
    // d = a b + c; a is 16 x 8, b 8 x 8.
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                                    const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%7, %8, %9, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
};

struct BFloat16 {
    static constexpr uint32_t kOnes = 0x3f803f80u, kSixes = 0x40c040c0u;
    static constexpr float kLargest = 3.3895314e38f;
    static __device__ __forceinline__ float low(uint32_t v) { return __uint_as_float(v << 16); }
    static __device__ __forceinline__ float high(uint32_t v) { return __uint_as_float(v & 0xffff0000u); }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t v;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    static __device__ __forceinline__ uint32_t pack_relu(float low, float high) {
        uint32_t v;
        asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    // Rounded towards zero: what is below 6 stays below it.
    static __device__ __forceinline__ uint32_t pack_relu_down(float low, float high) {
        uint32_t v;
        asm("cvt.rz.relu.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
        return v;
    }
    // NaN stays NaN.
    static __device__ __forceinline__ uint32_t minimum(uint32_t a, uint32_t b) {
        uint32_t v;
        asm("min.NaN.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
        return v;
    }
    static __device__ __forceinline__ uint32_t subtract(uint32_t a, uint32_t b) {
        uint32_t v;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(v) : "r"(b), "r"(0xbf80bf80u), "r"(a));
        return v;
    }
    // All ones in the halves where 0 < a < 6, or a is NaN; of an a that is clamped to [0, 6].
    static __device__ __forceinline__ uint32_t inside(uint32_t a) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
        uint32_t above, below;
        asm("set.gtu.u32.bf16x2 %0, %1, %2;" : "=r"(above) : "r"(a), "r"(0));
        asm("set.ltu.u32.bf16x2 %0, %1, %2;" : "=r"(below) : "r"(a), "r"(kSixes));
        return above & below;
#else
        const uint32_t low = a & 0xffff, high = a >> 16, six = kSixes & 0xffff;
        return (low != 0 && low != six ? 0xffff : 0) | (high != 0 && high != six ? 0xffff0000 : 0);
#endif
    }
    // d = a b + c; a is 16 x 16, b 16 x 8.
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1, const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
    // d = a b + c; a is 16 x 8, b 8 x 8.
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0,
                                                    const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%7, %8, %9, %10};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
};

// --- matrices in shared memory -------------------------------------------------------------------------------------

// A pixel's 16 channels take 32 bytes. The halves change places with every fourth pixel, so that neither the same half
// of eight neighbouring pixels nor whole pixels meet in a bank.
constexpr int kPixelBytes = 2 * kSlab;

__device__ __forceinline__ uint32_t place(unsigned pixel, unsigned half) {
    return pixel * kPixelBytes + ((half * 16) ^ ((pixel & 4) << 2));
}

// The diagonal 8x8 matrix of value[n], as the second factor of a product: what lane 4 n + n / 2 holds, 0 elsewhere.
__device__ __forceinline__ uint32_t diagonal(uint32_t bits, int lane) {
    const int n = lane >> 2;
    return (lane & 3) != n >> 1 ? 0 : n & 1 ? bits << 16 : bits & 0xffff;
}

// Diagonal matrices of a factor, in two parts of T whose sum is the factor to twice T's precision.
template <class T>
__device__ __forceinline__ void split_diagonal(uint32_t (&d)[2], float factor, int lane) {
    const float bounded = fminf(fmaxf(factor, -T::kLargest), T::kLargest);
    const uint32_t first = T::pack(bounded, 0.f);
    d[0] = diagonal(first, lane);
    d[1] = diagonal(T::pack(fminf(fmaxf(factor - T::low(first), -T::kLargest), T::kLargest), 0.f), lane);
}

// Diagonal matrices of the nine taps of 2 x 8 channels; `weight` [channels, 9], `count` of which are there.
__device__ __forceinline__ void load_taps(uint32_t (&taps)[2][9], const void* weight, int lane, int count, bool flip) {
    const uint16_t* w = static_cast<const uint16_t*>(weight);
    const int n = lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const bool there = (lane & 3) == n >> 1 && 8 * h + n < count;
        const uint16_t* mine = w + (8 * h + n) * 9;
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const uint32_t value = there ? mine[flip ? 8 - t : t] : 0;
            taps[h][t] = value << (16 * (n & 1));
        }
    }
}

// The position of a block in the launch. Group `i` of the block is chunk `chunk(i)` of image `image0 + image(i)`.
struct Place {
    int slab;
    unsigned part;
    int64_t image0;
    int groups;  // of this block
    int top, bottom;
    unsigned chunk0, chunks;

    __device__ __forceinline__ Place(const DepthwiseCut& cut, int n, int c, int rows_of_image) {
        const unsigned slabs = (c + kSlab - 1) / kSlab;
        part = blockIdx.x / slabs;
        slab = static_cast<int>(blockIdx.x - part * slabs);
        const unsigned along = part / cut.strips, strip = part - along * cut.strips;
        const unsigned first_group = along * cut.groups, left = n * cut.chunks - first_group;
        groups = static_cast<int>(min(left, static_cast<unsigned>(cut.groups)));
        chunks = cut.chunks;
        image0 = first_group / chunks;
        chunk0 = first_group % chunks;
        top = strip * cut.rows;
        bottom = min(static_cast<int>(top) + cut.rows, rows_of_image);
    }
    __device__ __forceinline__ unsigned image(unsigned group) const { return (chunk0 + group) / chunks; }
    __device__ __forceinline__ int chunk(unsigned group) const { return (chunk0 + group) % chunks; }
};

// Adds part (n, mean, m2) to a channel's moments, Chan's formula.
__device__ __forceinline__ void merge_moments(float& count, float& mean, float& m2, float n, float m, float s) {
    const float total = count + n;
    const float share = total > 0 ? __fdividef(n, total) : 0.f;
    const float delta = m - mean;
    m2 += s + delta * delta * count * share;
    mean += delta * share;
    count = total;
}

}  // namespace cuda
}  // namespace mbv2

// Older architectures lack cp.async, bfloat16 products and clamps that keep NaN; nothing is launched there.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 800
#define MBV2_BODY(...) __VA_ARGS__
#else
#define MBV2_BODY(...)
#endif

// Tests and the static report, which see no host code, find here what the launcher asks for.
#ifdef MBV2_STATIC_REPORT
#define MBV2_SHARED(NAME, BYTES) extern "C" __device__ int NAME##_shared_bytes = BYTES;
#else
#define MBV2_SHARED(NAME, BYTES)
#endif
