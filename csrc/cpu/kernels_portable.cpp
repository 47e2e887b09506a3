// Any machine: 4 lanes in the vector type of GCC and Clang, which becomes SSE, NEON or plain arithmetic.
#include "microkernels.h"

namespace mbv2::cpu {
namespace {

struct Portable {
    typedef float Type __attribute__((vector_size(16)));
    static constexpr int lanes = 4;
    static constexpr int panel = 2;
    static constexpr int rows[3] = {8, 5, 3};
    static constexpr int unroll = 4;
    static constexpr int lines_ahead = 0;

    static Type zero() { return Type{}; }
    static Type load(const float* p) { return *reinterpret_cast<const Type*>(p); }
    static Type load_weights(const float* p) { return load(p); }
    static void store(float* p, Type x) { *reinterpret_cast<Type*>(p) = x; }
    static Type broadcast(const float* p) { return Type{*p, *p, *p, *p}; }
    static Type fma(Type a, Type b, Type c) { return a * b + c; }
    static Type add(Type a, Type b) { return a + b; }
    static Type scale(Type a, float b) { return a * b; }
    static Type relu6(Type x) {
        const Type least = {}, most = least + 6.0f;
        x = x < least ? least : x;
        return x > most ? most : x;
    }

    template <int N>
    static void add_products(Type (&sums)[N], const float* x, const Type (&weights)[N]) {
        const Type value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
};

constexpr Kernels<Float32> kKernels = kernels_of<Portable, Float32>("portable");

}  // namespace

const Kernels<Float32>* portable_kernels() { return &kKernels; }

}  // namespace mbv2::cpu
