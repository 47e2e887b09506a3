// What differs between half, bfloat16 and float: tensor-core products, rounding, the clamp of ReLU6.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mbv2::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Four 8x8 matrices of 16-bit values (or 8x4 of 32-bit ones); each lane gives the address of one row of 16 bytes.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(address));
}

// 16 bytes from global to shared memory, or 16 zeros.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool wanted) {
    const int bytes = wanted ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }

// max and min as torch's clamp: NaN stays NaN.
__device__ __forceinline__ float relu6(float value) {
    asm("max.NaN.f32 %0, %0, 0f00000000;" : "+f"(value));
    asm("min.NaN.f32 %0, %0, 0f40C00000;" : "+f"(value));
    return value;
}

struct HalfTensor {
    using Scalar = __half;
    static constexpr bool kPacked = true;

    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1, const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
    static __device__ __forceinline__ void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
    // Rounding before the upper clamp is the same as after it, as 6 is a number of the type.
    static __device__ __forceinline__ uint32_t pack_relu6(float low, float high) {
        uint32_t packed;
        asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        asm("min.NaN.f16x2 %0, %0, %1;" : "+r"(packed) : "r"(0x46004600u));
        return packed;
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t packed;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float2 unpack(uint32_t packed) {
        return __half22float2(*reinterpret_cast<const __half2*>(&packed));
    }
};

struct Bfloat16Tensor {
    using Scalar = __nv_bfloat16;
    static constexpr bool kPacked = true;

    static __device__ __forceinline__ void multiply(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3,
                                                    uint32_t b0, uint32_t b1, const float (&c)[4]) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%10, %11, %12, %13};"
            : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
            : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1), "f"(c[0]), "f"(c[1]), "f"(c[2]), "f"(c[3]));
    }
    static __device__ __forceinline__ void multiply_half(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a0), "r"(a1), "r"(b0));
    }
    static __device__ __forceinline__ uint32_t pack_relu6(float low, float high) {
        uint32_t packed;
        asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        asm("min.NaN.bf16x2 %0, %0, %1;" : "+r"(packed) : "r"(0x40C040C0u));
        return packed;
    }
    static __device__ __forceinline__ uint32_t pack(float low, float high) {
        uint32_t packed;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
        return packed;
    }
    static __device__ __forceinline__ float2 unpack(uint32_t packed) {
        return make_float2(__uint_as_float(packed << 16), __uint_as_float(packed & 0xFFFF0000u));
    }
};

// Products of float32 on tensor cores as three of tf32 (Markidis et al. 2018, arXiv 1803.04014): the low halves keep
// what tf32 cuts off, and only their product with each other, 2^-22 of the result, is left out.
struct FloatTensor {
    using Scalar = float;
    static constexpr bool kPacked = false;

    static __device__ __forceinline__ void split(uint32_t word, uint32_t& high, uint32_t& low) {
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(high) : "f"(__uint_as_float(word)));
        asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(low) : "f"(__uint_as_float(word) - __uint_as_float(high)));
    }
    static __device__ __forceinline__ void multiply_tf32(float (&d)[4], const uint32_t (&a)[4],
                                                         const uint32_t (&b)[2]) {
        asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
};

// Operands of one step of 32 bytes of channels: 16 rows of the left matrix, 16 columns (two tiles of 8) of the right.
template <class Tensor>
struct Left {
    uint32_t word[4];

    __device__ __forceinline__ void load(uint32_t address) { load_matrices(word, address); }
};
template <class Tensor>
struct Right {
    uint32_t word[4];

    __device__ __forceinline__ void load(uint32_t address) { load_matrices(word, address); }
};
template <>
struct Left<FloatTensor> {
    uint32_t high[4], low[4];

    __device__ __forceinline__ void load(uint32_t address) {
        uint32_t word[4];
        load_matrices(word, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) FloatTensor::split(word[i], high[i], low[i]);
    }
};
template <>
struct Right<FloatTensor> {
    uint32_t high[4], low[4];

    __device__ __forceinline__ void load(uint32_t address) {
        uint32_t word[4];
        load_matrices(word, address);
#pragma unroll
        for (int i = 0; i < 4; ++i) FloatTensor::split(word[i], high[i], low[i]);
    }
};

// sums += left * right's tile of 8 columns number kTile (0 or 1).
template <int kTile, class Tensor>
__device__ __forceinline__ void multiply(float (&sums)[4], const Left<Tensor>& left, const Right<Tensor>& right) {
    if constexpr (Tensor::kPacked) {
        Tensor::multiply(sums, left.word[0], left.word[1], left.word[2], left.word[3], right.word[2 * kTile],
                         right.word[2 * kTile + 1], sums);
    } else {
        const uint32_t high[2] = {right.high[2 * kTile], right.high[2 * kTile + 1]};
        const uint32_t low[2] = {right.low[2 * kTile], right.low[2 * kTile + 1]};
        Tensor::multiply_tf32(sums, left.low, high);
        Tensor::multiply_tf32(sums, left.high, low);
        Tensor::multiply_tf32(sums, left.high, high);
    }
}

// Two neighbouring channels in memory.
template <class Tensor>
__device__ __forceinline__ void store_relu6(void* to, float low, float high) {
    if constexpr (Tensor::kPacked) {
        *static_cast<uint32_t*>(to) = Tensor::pack_relu6(low, high);
    } else {
        *static_cast<float2*>(to) = make_float2(relu6(low), relu6(high));
    }
}
template <class Tensor>
__device__ __forceinline__ void store_pair(void* to, float low, float high) {
    if constexpr (Tensor::kPacked) {
        *static_cast<uint32_t*>(to) = Tensor::pack(low, high);
    } else {
        *static_cast<float2*>(to) = make_float2(low, high);
    }
}
template <class Tensor>
__device__ __forceinline__ float2 load_pair(const void* from) {
    if constexpr (Tensor::kPacked) {
        return Tensor::unpack(*static_cast<const uint32_t*>(from));
    } else {
        return *static_cast<const float2*>(from);
    }
}

}  // namespace mbv2::cuda
