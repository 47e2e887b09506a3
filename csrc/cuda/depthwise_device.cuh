// Pieces of the training depthwise kernels: PTX that C++ has no name for, number formats, and the walk over the input.
#pragma once

#include <stdint.h>

#include "depthwise_params.h"

namespace mbv2 {
namespace cuda {

constexpr int kRowWarps = 4;        // warps of a block that share a slab's columns
constexpr uint32_t kNowhere = ~0u;  // an offset of something outside the image

enum BnRow { kMean, kVar, kRstd, kScale, kShift, kCount };

// --- instructions --------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

__device__ __forceinline__ void copy_async(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
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

__device__ __forceinline__ uint2 load_shared8(uint32_t at) {
    uint2 v;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}

__device__ __forceinline__ void store_shared16(uint32_t at, uint4 v) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
                 : "memory");
}

__device__ __forceinline__ void store_shared8(uint32_t at, uint32_t x, uint32_t y) {
    asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(x), "r"(y) : "memory");
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

__device__ __forceinline__ uint32_t transposed(uint32_t m) {
    uint32_t out;
    asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(out) : "r"(m));
    return out;
}

// A store without a branch around it.
__device__ __forceinline__ void store_if(bool wanted, void* to, uint32_t x, uint32_t y) {
    asm volatile("{.reg .pred p; setp.ne.u32 p, %3, 0; @p st.global.v2.b32 [%0], {%1, %2};}" ::"l"(to), "r"(x), "r"(y),
                 "r"(static_cast<uint32_t>(wanted))
                 : "memory");
}

// A constant that the compiler keeps in a register.
__device__ __forceinline__ uint32_t kept(uint32_t constant) {
    uint32_t v;
    asm volatile("mov.b32 %0, %1;" : "=r"(v) : "r"(constant));
    return v;
}

__device__ __forceinline__ float bits_float(uint32_t bits) { return __uint_as_float(bits); }

// --- 16-bit types, two values in a register ------------------------------------------------------------------------

struct Half {
    static constexpr bool kPacked = true;
    static constexpr uint32_t kOnes = 0x3c003c00u, kSixes = 0x46004600u;
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
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
};

struct BFloat16 {
    static constexpr bool kPacked = true;
    static constexpr uint32_t kOnes = 0x3f803f80u, kSixes = 0x40c040c0u;
    static __device__ __forceinline__ float low(uint32_t v) { return bits_float(v << 16); }
    static __device__ __forceinline__ float high(uint32_t v) { return bits_float(v & 0xffff0000u); }
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
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
    }
    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
};

struct Single {
    static constexpr bool kPacked = false;
    static constexpr uint32_t kOnes = 0;
};

// As torch's relu6 on a GPU: NaN stays NaN.
__device__ __forceinline__ float relu6(float z, float cap = 6.f) {
    float v;
    asm("{.reg .f32 t; max.NaN.f32 t, %1, 0f00000000; min.NaN.f32 %0, t, %2;}" : "=f"(v) : "f"(z), "f"(cap));
    return v;
}

// --- layout of a row in shared memory ------------------------------------------------------------------------------

// Activations (or gradients) of a slab, one pixel after the other. 16-bit types: of each 16 channels, first those that
// are 0 or 1 modulo 4, then the rest, eight each: matrices of the tensor cores in which a lane owns the four
// neighbouring channels that it stores. A pixel's stride is an odd multiple of 16 bytes, so that eight of them lie in
// different banks.
template <class T, int kSlabs>
struct Row {
    static constexpr int kItem = T::kPacked ? 2 : 4;
    static constexpr int kChannels = 16 * kSlabs;
    static constexpr int kPitch = kChannels * kItem + (T::kPacked ? 16 : 0);
    static constexpr int kVectors = kChannels * kItem / 16;  // of 16 bytes, a pixel
    static constexpr int kPerVector = 16 / kItem;
    static constexpr int kThreads = 32 * kRowWarps * kSlabs;
    static constexpr int kPixelsAtOnce = kThreads / kVectors;

    // Where vector `q` of a pixel starts, and where its second half goes for 16-bit types.
    static __device__ __forceinline__ uint32_t place(int q) {
        return T::kPacked ? 32 * (q >> 1) + 8 * (q & 1) : 16 * q;
    }
    static __device__ __forceinline__ void put(uint32_t at, uint4 v) {
        if constexpr (T::kPacked) {
            store_shared8(at, v.x, v.z);
            store_shared8(at + 16, v.y, v.w);
        } else {
            store_shared16(at, v);
        }
    }
};

// The nine taps of a lane's channels, and the convolution of 16 pixels.
template <class T, int kStride, int kPitch>
struct Taps {
    // 16-bit types, by half of the channels: diagonal matrices of taps (0, kw) and (1, kw), of (2, 0) and (2, 1), of
    // (2, 2).
    uint32_t pair[2][4][2], last[2];
    float tap[T::kPacked ? 1 : 9][4];

    // `weight` [channels, 9] of the warp's 16 channels, `count` of which are there; kFlip: the taps in reverse order.
    template <bool kFlip>
    __device__ __forceinline__ void load(const void* weight, int lane, int count) {
        if constexpr (T::kPacked) {
            const uint16_t* w = static_cast<const uint16_t*>(weight);
            const int n = lane >> 2, j = lane & 3;
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int channel = 4 * (n >> 1) + 2 * half + (n & 1);
                const bool there = j == n >> 1 && channel < count;
#pragma unroll
                for (int t = 0; t < 9; ++t) {
                    const uint32_t value = there ? w[channel * 9 + (kFlip ? 8 - t : t)] : 0;
                    const uint32_t placed = n & 1 ? value << 16 : value;
                    if (t < 6)
                        pair[half][t % 3][t / 3] = placed;
                    else if (t < 8)
                        pair[half][3][t - 6] = placed;
                    else
                        last[half] = placed;
                }
            }
        } else {
            const float* w = static_cast<const float*>(weight);
#pragma unroll
            for (int t = 0; t < 9; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int channel = 4 * (lane & 3) + i;
                    tap[t][i] = channel < count ? w[channel * 9 + (kFlip ? 8 - t : t)] : 0.f;
                }
        }
    }

    // The place of a tap's column, where those of column 0 and (stride 2) column 1 are known.
    static __device__ __forceinline__ uint32_t column(int kw, uint32_t c0, uint32_t c1) {
        if (kStride == 1) return c0 + kw * kPitch;
        return kw == 1 ? c1 : c0 + kw / 2 * kPitch;
    }

    // 16-bit types: see apply; c0 and c1 are the places of pixel lane % 16. A matrix product takes two taps: the warp's
    // lower half addresses the first one's pixels, the upper half the second one's.
    __device__ __forceinline__ void convolve(float (&sums)[2][4], const uint32_t (&rows)[3], uint32_t c0, uint32_t c1,
                                             int lane) const {
        const bool upper = lane >= 16;
        const uint32_t two_rows = upper ? rows[1] : rows[0];
        const uint32_t third_row = kStride == 1 ? rows[2] + (upper ? kPitch : 0) + c0 : rows[2] + (upper ? c1 : c0);
        uint32_t a[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int kw = 0; kw < 3; ++kw) {
                load_matrices(a, two_rows + column(kw, c0, c1) + 16 * half);
                T::multiply(sums[half], a[0], a[1], a[2], a[3], pair[half][kw][0], pair[half][kw][1]);
            }
            load_matrices(a, third_row + 16 * half);
            T::multiply(sums[half], a[0], a[1], a[2], a[3], pair[half][3][0], pair[half][3][1]);
        }
        load_matrices(a, rows[2] + (lane & 16) + column(2, c0, c1));
        T::multiply(sums[0], a[0], a[1], last[0]);
        T::multiply(sums[1], a[2], a[3], last[1]);
    }

    // sums[h][2 r + e] += channel 4 j + 2 h + e of pixel g + 8 r, where lane = 4 g + j. `rows` are the three rows in
    // shared memory, from the warp's channels on; `first` and `second` the addresses of the tile's places of columns.
    __device__ __forceinline__ void apply(float (&sums)[2][4], const uint32_t (&rows)[3], uint32_t first,
                                          uint32_t second, int lane) const {
        if constexpr (T::kPacked) {
            const uint32_t c0 = load_shared4(first + 4 * (lane & 15));
            convolve(sums, rows, c0, kStride == 1 ? 0 : load_shared4(second + 4 * (lane & 15)), lane);
        } else {
            const int j = lane & 3, g = lane >> 2;
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const uint32_t c0 = load_shared4(first + 4 * (g + 8 * r)) + 16 * j;
                const uint32_t c1 = kStride == 1 ? 0 : load_shared4(second + 4 * (g + 8 * r)) + 16 * j;
#pragma unroll
                for (int t = 0; t < 9; ++t) {
                    const uint4 v = load_shared16(rows[t / 3] + column(t % 3, c0, c1));
                    sums[0][2 * r] = fmaf(bits_float(v.x), tap[t][0], sums[0][2 * r]);
                    sums[0][2 * r + 1] = fmaf(bits_float(v.y), tap[t][1], sums[0][2 * r + 1]);
                    sums[1][2 * r] = fmaf(bits_float(v.z), tap[t][2], sums[1][2 * r]);
                    sums[1][2 * r + 1] = fmaf(bits_float(v.w), tap[t][3], sums[1][2 * r + 1]);
                }
            }
        }
    }
};

// The position of a block in the launch. Group `i` of the block is chunk `chunk(i)` of image `image0 + image(i)`.
struct Place {
    int slab;
    unsigned part;
    int64_t image0;
    int groups;  // of this block
    int top, bottom;
    unsigned chunk0, chunks;

    __device__ __forceinline__ Place(const DepthwiseCut& cut, int n, int c, int rows_of_image) {
        const unsigned slabs = (c + 16 * cut.slabs - 1) / (16 * cut.slabs);
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
    const float share = total > 0 ? n / total : 0.f;
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
