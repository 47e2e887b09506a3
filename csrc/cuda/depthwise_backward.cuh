// The backward of the training depthwise before and after its loop over rows: what of shared memory is where, tables of
// pixels and positions, the parts of the sums that a block leaves behind. depthwise_backward.cu has the loop.
#pragma once

#include "depthwise_device.cuh"

namespace mbv2 {
namespace cuda {
namespace {

template <int kStride>
struct Backward {
    static constexpr int kTiles = kStride == 1 ? 2 : 1;       // of 16 positions, a warp
    static constexpr int kPixels = 16 * kWarps * kTiles;      // of a row of dy2 in shared memory, halo columns included
    static constexpr int kLead = kStride == 1 ? 2 : 1;        // rows of dy2 that a row of y1 waits for
    static constexpr int kQuad = kStride * kStride;           // positions of y1 for one of dy2
    static constexpr int kRing = 4, kSlots = 2, kPeriod = 4;  // rows of dy2; of copies; after which all is where it was
    // Behind a ring row's pixels: three that are zero, for positions that are not there; one that nobody reads.
    static constexpr int kZero = kPixels, kDump = kPixels + 3;
    static constexpr int kRowBytes = (kPixels + 4) * kPixelBytes, kRawBytes = kPixels * kPixelBytes;
    static constexpr int kTileBytes = 16 * kPixelBytes, kNextTile = kWarps * kTileBytes;
    // Of dz2 and y2, each kSlots rows; of y1 kSlots x kQuad; dz1 on its way out.
    static constexpr int kDz2 = kRing * kRowBytes, kY2 = kDz2 + kSlots * kRawBytes, kY1 = kY2 + kSlots * kRawBytes,
                         kLeaving = kY1 + kSlots * kQuad * kRawBytes, kSharedBytes = kLeaving + kQuad * kRawBytes;
    // Tables of the set-up lie where dz1 leaves later.
    static constexpr int kFrom = kLeaving, kTo = kFrom + 4 * kPixels, kFirst = kTo + 4 * kPixels,
                         kOut = kFirst + 4 * kPixels, kSecond = kOut + 4 * kPixels, kConstants = kSecond + 4 * kPixels;
    static_assert(kConstants + 16 <= kSharedBytes);
    static constexpr int kProducts = 6;  // of the weight's gradient, of half of the channels
    static_assert(kWarps * 11 * kSlab * 4 <= kDz2, "the partial sums fit over the ring");
};

// Thread i looks up where pixel i of a row of dy2 comes from and goes to, and where position i reads and writes; what
// no copy will ever write in shared memory, from `ring` on, is set to zero.
template <int kStride>
__device__ __forceinline__ void look_up(const DepthwiseBackwardParams& p, const Place& at, uint32_t ring,
                                        unsigned columns, unsigned wide) {
    using B = Backward<kStride>;
    const int tid = threadIdx.x;
    if (tid >= B::kPixels) return;
    const unsigned group = tid / wide, i = tid - group * wide;
    const int column = at.chunk(group) * columns + i - (kStride == 1 ? 1 : 0);
    const bool inside = group < at.groups && column >= 0 && column < p.wo;
    store_shared4(ring + B::kFrom + 4 * tid, inside ? (at.image(group) * p.ho * p.wo + column) * p.c : kNowhere);
    store_shared4(ring + B::kTo + 4 * tid, inside ? tid : B::kDump);
    const unsigned own = tid / columns, j = tid - own * columns;
    const int place_of = at.chunk(own) * columns + j;
    const bool there = own < at.groups && place_of < p.wo;
    store_shared4(ring + B::kFirst + 4 * tid, there ? own * wide + j : B::kZero);
    store_shared4(ring + B::kOut + 4 * tid, there ? (at.image(own) * p.h * p.w + place_of * kStride) * p.c : kNowhere);
    store_shared4(ring + B::kSecond + 4 * tid, there && place_of * kStride + 1 < p.w);
    for (int h = 0; h < 2; ++h) {
        if (!inside)
            for (int r = 0; r < B::kRing; ++r) store_shared16(ring + r * B::kRowBytes + place(tid, h), uint4{});
        // What is never copied is zero.
        for (int r = 0; r < (4 + 2 * B::kQuad) * B::kSlots / 2; ++r)
            store_shared16(ring + B::kDz2 + r * B::kRawBytes + tid * kPixelBytes + 16 * h, uint4{});
    }
    if (tid < B::kRing * 6)
        store_shared16(ring + tid / 6 * B::kRowBytes + B::kZero * kPixelBytes + tid % 6 * 16, uint4{});
}

// What a warp adds to the sums goes to `parts` in shared memory: nine taps, then the two sums of dz1, of 16 channels.
template <int kStride>
__device__ __forceinline__ void leave_parts(float* parts, int warp, int lane,
                                            const float (&dw)[2][Backward<kStride>::kProducts][4],
                                            const float (&sums)[2][4]) {
    using B = Backward<kStride>;
    const int n = lane >> 2, e = n & 1;
    if ((lane & 3) == n >> 1) {  // on the diagonal
        constexpr int kTaps2[6][2] = {{4, -1}, {5, 3}, {7, -1}, {1, -1}, {8, 6}, {2, 0}};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float* own = parts + warp * 11 * kSlab + 8 * h + n;
#pragma unroll
            for (int k = 0; k < B::kProducts; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int place_1 = k < 3 ? 3 * k + i : i == h ? 3 * (k - 3) + 2 : 9;
                    const int tap = kStride == 1 ? 8 - place_1 : kTaps2[k][i];
                    if (tap >= 0) own[tap * kSlab] = e ? dw[h][k][2 * i + 1] : dw[h][k][2 * i];
                }
            own[9 * kSlab] = e ? sums[h][3] : sums[h][2];
            own[10 * kSlab] = e ? sums[h][1] : sums[h][0];
        }
    }
}

// The block's parts, added in the warps' order.
template <class T, bool kNormalise>
__device__ __forceinline__ void add_parts(const DepthwiseBackwardParams& p, const Place& at, const float* parts,
                                          int channel0, int channels, bool need_input, bool need_weight) {
    const int tid = threadIdx.x;
    for (int i = tid; i < 9 * kSlab; i += kThreads) {
        const int tap = i % 9, c = channel0 + i / 9;
        if (!need_weight || c >= p.c) continue;
        float total = 0;
        for (int w = 0; w < kWarps; ++w) total += parts[w * 11 * kSlab + tap * kSlab + i / 9];
        p.dweight[(int64_t{1} * at.part * p.c + c) * 9 + tap] = total;
    }
    if (kNormalise && need_input && tid < kSlab && tid < channels) {
        float plain = 0, centred = 0;
        for (int w = 0; w < kWarps; ++w)
            plain += parts[w * 11 * kSlab + 9 * kSlab + tid], centred += parts[w * 11 * kSlab + 10 * kSlab + tid];
        const float mean = p.bn[kMean * p.c + channel0 + tid];
        float* out = p.sums + int64_t{2} * at.part * p.c + channel0 + tid;
        out[0] = plain, out[p.c] = fmaf(T::low(T::pack(mean, mean)) - mean, plain, centred);
    }
}

}  // namespace
}  // namespace cuda
}  // namespace mbv2
