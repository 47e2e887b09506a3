// Training on any machine: 4 lanes in the vector type of GCC and Clang, which becomes SSE, NEON or plain arithmetic.
#include "train_table.h"

namespace mbv2::cpu::train {
namespace {

struct Portable {
    typedef float Type __attribute__((vector_size(16)));
    typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
    typedef uint32_t Bits __attribute__((vector_size(16)));
    static constexpr int lanes = 4;
    static constexpr int rows[3] = {8, 5, 3};

    static Type zero() { return Type{}; }
    static Type set(float x) { return Type{x, x, x, x}; }
    static Type broadcast(const float* p) { return set(*p); }
    static Type fma(Type a, Type b, Type c) { return a * b + c; }
    static Type add(Type a, Type b) { return a + b; }
    static Type sub(Type a, Type b) { return a - b; }
    static Type mul(Type a, Type b) { return a * b; }
    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        const Type value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
    static Type relu6(Type x) {
        const Type least = {}, most = least + 6.0f;
        x = x < least ? least : x;
        return x > most ? most : x;
    }
    static Type inside(Type x, Type z) {
        const Type least = {}, most = least + 6.0f;
        return (z <= least) | (z >= most) ? least : x;
    }

    static Type load(const float* p) { return *reinterpret_cast<const Unaligned*>(p); }
    static void store(float* p, Type x) { *reinterpret_cast<Unaligned*>(p) = x; }
    // No portable way past the caches.
    template <class T>
    static void stream(T* p, Type x) {
        store(p, x);
    }
    static void fence() {}
    static Type load_part(const float* p, int64_t n) {
        Type all = {};
        for (int64_t i = 0; i < n; ++i) all[i] = p[i];
        return all;
    }
    static void store_part(float* p, Type x, int64_t n) {
        for (int64_t i = 0; i < n; ++i) p[i] = x[i];
    }

    // To the nearest bfloat16, ties to even, in the upper halves; a NaN stays one.
    static Bits rounded(Type x) {
        const Bits bits = __builtin_bit_cast(Bits, x);
        const Bits up = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
        return x != x ? Bits{} + 0x7fc00000u : up;
    }
    static Type load(const bf16* p) {
        return __builtin_bit_cast(Type, Bits{p[0].bits, p[1].bits, p[2].bits, p[3].bits} << 16);
    }
    static void store(bf16* p, Type x) { store_part(p, x, lanes); }
    static Type load_part(const bf16* p, int64_t n) {
        Bits all = {};
        for (int64_t i = 0; i < n; ++i) all[i] = p[i].bits;
        return __builtin_bit_cast(Type, all << 16);
    }
    static void store_part(bf16* p, Type x, int64_t n) {
        const Bits all = rounded(x) >> 16;
        for (int64_t i = 0; i < n; ++i) p[i].bits = static_cast<uint16_t>(all[i]);
    }
    template <class T>
    static Type round(Type x) {
        if constexpr (sizeof(T) == sizeof(float)) return x;
        return __builtin_bit_cast(Type, rounded(x));
    }
};

constexpr Kernels kKernels = kernels_of<Portable>("portable");

}  // namespace

const Kernels* portable_kernels() { return &kKernels; }

}  // namespace mbv2::cpu::train
