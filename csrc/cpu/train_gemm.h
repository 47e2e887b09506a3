// The matrix product of the training kernels: a tile in registers, rows broadcast, a panel of the other side loaded.
//
// Like microkernels.h this is compiled once for each instruction set; everything is in an unnamed namespace and uses
// nothing of the standard library. V has: lanes; Type; rows[n - 1], how many rows of n accumulators fit the
// registers; zero, load, store, broadcast, set, fma, add, sub, mul, relu6 (NaN passes), inside(x, z) = x where
// 0 < z < 6 or z is NaN, else 0; load and store also of bf16; round<T>, to the values that T has; load_part,
// store_part of the first n lanes; add_products, sums += a value times a row of weights; stream, a store past the
// caches, and fence after a run of them.
#pragma once

#include "train.h"

#define MBV2_UNROLL _Pragma("GCC unroll 64")

namespace mbv2::cpu::train {
namespace {

// Length of a run of products before the sums go back to memory: a panel's share stays in L1.
constexpr int64_t kRun = 256;
constexpr int64_t kLine = 64;  // bytes of a cache line

inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// Rows of one matrix, or of two of one shape, that are read or written soon: a few lines of them are fetched into the
// second cache before each tile of a product, so that memory works while the arithmetic does.
class Ahead {
 public:
    Ahead() = default;
    // `values` of each of `rows` rows, which are `stride` values apart, over `tiles` tiles; `two` may be null.
    template <class T>
    Ahead(const T* one, const T* two, int64_t rows, int64_t values, int64_t stride, int64_t tiles)
        : one_(reinterpret_cast<const char*>(one)),
          two_(reinterpret_cast<const char*>(two)),
          rows_(rows),
          bytes_(values * static_cast<int64_t>(sizeof(T))),
          stride_(stride * static_cast<int64_t>(sizeof(T))),
          each_(ceil_div(rows * ceil_div(bytes_, kLine), tiles)) {}
    template <class T>
    Ahead(const T* one, int64_t rows, int64_t values, int64_t stride, int64_t tiles)
        : Ahead(one, static_cast<const T*>(nullptr), rows, values, stride, tiles) {}
    // `values` side by side, as two halves: memory answers two runs of addresses faster than one.
    template <class T>
    Ahead(const T* from, int64_t values, int64_t tiles)
        : Ahead(from, from + values / 2, 1, ceil_div(values, int64_t{2}), 0, tiles) {}
    void fetch() {
        for (int64_t i = 0; i < each_ && rows_ > 0; ++i) {
            __builtin_prefetch(one_ + at_, 0, 2);
            if (two_ != nullptr) __builtin_prefetch(two_ + at_, 0, 2);
            at_ += kLine;
            if (at_ < bytes_) continue;
            at_ = 0;
            --rows_;
            one_ += stride_;
            if (two_ != nullptr) two_ += stride_;
        }
    }

 private:
    const char *one_ = nullptr, *two_ = nullptr;
    int64_t rows_ = 0, bytes_ = 0, stride_ = 0, each_ = 0, at_ = 0;
};

// Tiles of a product of `rows` rows, for an even pace of Ahead.
template <class V>
int64_t tiles_of(int64_t rows) {
    return ceil_div(rows, V::rows[1]);
}

// c[M][panel] (+)= a * b. Transposed false: a[m * stride + k]; true: a[k * stride + m].
template <class V, int M, int Vectors, bool Transposed>
void gemm_tile(const float* a, int64_t stride, const float* b, int64_t length, float* c, bool accumulate) {
    constexpr int kWidth = Vectors * V::lanes;
    typename V::Type acc[M][Vectors];
    MBV2_UNROLL for (int m = 0; m < M; ++m) {
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) {
            acc[m][v] = accumulate ? V::load(c + m * kWidth + v * V::lanes) : V::zero();
        }
    }
    // What lies `stride` apart, by threes: a pointer, and a multiple that x86 adds to it within the instruction.
    constexpr int kSteps = 4, kPointers = ((Transposed ? kSteps : M) + 2) / 3;
    const float* at[kPointers];
    MBV2_UNROLL for (int i = 0; i < kPointers; ++i) at[i] = a + 3 * i * stride;
    const auto step = [&](int k) __attribute__((always_inline)) {
        typename V::Type weights[Vectors];
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) weights[v] = V::load(b + (k * Vectors + v) * V::lanes);
        MBV2_UNROLL for (int m = 0; m < M; ++m) {
            const int far = Transposed ? k : m, near = Transposed ? m : k;
            V::add_products(acc[m], at[far / 3] + far % 3 * stride + near, weights);
        }
    };
    const auto advance = [&](int64_t steps) __attribute__((always_inline)) {
        b += steps * kWidth;
        MBV2_UNROLL for (int i = 0; i < kPointers; ++i) {
            at[i] += steps * (Transposed ? stride : 1);
            asm("" : "+r"(at[i]));  // GCC would otherwise make an offset of each row, and reload most of them.
        }
    };
    int64_t k = 0;
    for (; k + kSteps <= length; k += kSteps, advance(kSteps)) {
        MBV2_UNROLL for (int u = 0; u < kSteps; ++u) step(u);
    }
    for (; k < length; ++k, advance(1)) step(0);
    MBV2_UNROLL for (int m = 0; m < M; ++m) {
        MBV2_UNROLL for (int v = 0; v < Vectors; ++v) V::store(c + m * kWidth + v * V::lanes, acc[m][v]);
    }
}

using GemmTile = void (*)(const float*, int64_t, const float*, int64_t, float*, bool);

// Entry [rows - 1] for every number of rows that fits the registers.
template <class V, int Vectors, bool Transposed, int... Less>
struct GemmTiles;
template <class V, int Vectors, bool Transposed, int Rows, int... Less>
struct GemmTiles<V, Vectors, Transposed, Rows, Less...> : GemmTiles<V, Vectors, Transposed, Rows - 1, Rows, Less...> {};
template <class V, int Vectors, bool Transposed, int... Less>
struct GemmTiles<V, Vectors, Transposed, 0, Less...> {
    static constexpr GemmTile entries[] = {gemm_tile<V, Less, Vectors, Transposed>...};
};

template <class V, int Vectors, bool Transposed>
void gemm_panel(const float* a, int64_t stride, int64_t rows, int64_t length, const float* b, float* c, bool accumulate,
                Ahead& ahead) {
    constexpr int kMost = V::rows[Vectors - 1], kWidth = Vectors * V::lanes;
    // Tiles of nearly equal height: a last tile of one row would run at the latency of its additions.
    const int64_t count = ceil_div(rows, kMost), height = rows / count, higher = rows % count;
    for (int64_t begin = 0; begin < length; begin += kRun) {
        const int64_t run = length - begin < kRun ? length - begin : kRun;
        int64_t row = 0;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t m = height + (i < higher);
            ahead.fetch();
            const float* from = Transposed ? a + begin * stride + row : a + row * stride + begin;
            GemmTiles<V, Vectors, Transposed, kMost>::entries[m - 1](from, stride, b + begin * kWidth, run,
                                                                     c + row * kWidth, accumulate || begin > 0);
            row += m;
        }
    }
}

// c[rows][panel] (+)= a[rows][length] * b[length][panel]; Transposed: a is [length][rows]. `stride` is a's. `ahead` is
// fetched meanwhile.
template <class V, bool Transposed>
void gemm(const float* a, int64_t stride, int64_t rows, int64_t length, const float* b, int64_t vectors, float* c,
          bool accumulate, Ahead& ahead) {
    switch (vectors) {
        case 1:
            return gemm_panel<V, 1, Transposed>(a, stride, rows, length, b, c, accumulate, ahead);
        case 2:
            return gemm_panel<V, 2, Transposed>(a, stride, rows, length, b, c, accumulate, ahead);
        default:
            return gemm_panel<V, 3, Transposed>(a, stride, rows, length, b, c, accumulate, ahead);
    }
}

}  // namespace
}  // namespace mbv2::cpu::train
