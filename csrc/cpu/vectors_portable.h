// Vectors for any machine: 4 lanes in the vector type of GCC and Clang, which becomes SSE, NEON or plain arithmetic.
#pragma once

#include <cstdint>

#include "formats.h"

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

    typedef uint32_t Bits __attribute__((vector_size(16)));
    typedef uint16_t Halves __attribute__((vector_size(8)));

    // Of each lane a first and a second bfloat16, as float.
    struct Pairs {
        Type first, second;
    };

    static Type load(const Bf16* p) {
        return (Type)(__builtin_convertvector(*reinterpret_cast<const Halves*>(p), Bits) << 16);
    }
    static void store(Bf16* p, Type x) {
        const Bits bits = (Bits)x, number = (bits + 0x7fff + (bits >> 16 & 1)) >> 16, nan = bits >> 16 | 0x40;
        *reinterpret_cast<Halves*>(p) = __builtin_convertvector(x == x ? number : nan, Halves);
    }
    static Pairs load_weights(const Bf16* p) { return pairs(*reinterpret_cast<const Bits*>(p)); }
    static Pairs broadcast(const Bf16* p) {
        uint32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return pairs(Bits{pair, pair, pair, pair});
    }
    static Pairs pairs(Bits bits) {
#if __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__
        return {(Type)(bits << 16), (Type)(bits & 0xffff0000)};
#else
        return {(Type)(bits & 0xffff0000), (Type)(bits << 16)};
#endif
    }
    static Type fma(const Pairs& a, const Pairs& b, Type c) { return a.first * b.first + (a.second * b.second + c); }

    template <int N, class Input, class Weights>
    static void add_products(Type (&sums)[N], const Input* x, const Weights (&weights)[N]) {
        const Weights value = broadcast(x);
        for (int v = 0; v < N; ++v) sums[v] = fma(value, weights[v], sums[v]);
    }
};

}  // namespace
}  // namespace mbv2::cpu
