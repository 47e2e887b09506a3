// Backward of the training depthwise 3x3, 16-bit types: dy2 = A dz2 + B y2 + C; dz1 = relu6'(bn1(y1)) conv^T(dy2) with
// its sums; parts of the weight's gradient. One pass: dz2, y2, y1 in, dz1 out. depthwise_single.cu has float32.
//
// Cut like the forward pass, over the positions of dy2: a block owns 16 channels and walks down a strip of rows; each
// of its warps works on 16 columns at a time. Every dy2 is computed and rounded once into a ring of rows. As in the
// forward pass everything that multiplies is a product of the tensor cores: dy2 and bn1(y1), whose factors are sums of
// two values of the type; the transposed convolution, with diagonal matrices of the taps; the weight's gradient as the
// diagonals of dy2' a1, where one product takes two taps (two shifted dy2, one above the other) against 16 pixels of
// a1; the sums of dz1 as [y1 - o; ones] dz1'. At stride 2 a position of dy2 stands for a 2x2 quad of y1's, which 1, 2,
// 2 and 4 of the taps reach. A NaN (and with it an infinity) of dz2, y2 or y1 reaches the eight channels of its matrix.
//
// The mask is that of bn1(y1) in float32, but for values below the type's smallest, which it takes for zero. sums: of
// dz1, and of dz1 (y1 - o) with o the mean rounded to the activations' type, which is put right at the end.
#include "depthwise_backward.cuh"
#include "depthwise_kernels.h"

namespace mbv2 {
namespace cuda {
namespace {

template <class T, int kStride, bool kNormalise>
__device__ __forceinline__ void depthwise_backward(const DepthwiseBackwardParams& p) {
    using B = Backward<kStride>;
    extern __shared__ __align__(32) uint4 shared[];
    const Place at(p.cut, p.n, p.c, p.ho);
    const int tid = threadIdx.x, lane = tid & 31, warp = __shfl_sync(~0u, tid >> 5, 0);
    const int channel0 = at.slab * kSlab, channels = p.c - channel0;
    const unsigned columns = p.cut.columns, wide = columns + (kStride == 1 ? 2 : 1);
    const uint32_t ring = shared_address(shared), mine = ring + warp * B::kTileBytes;
    const bool need_input = kept(uint32_t{p.dz1 != nullptr}), need_weight = kept(uint32_t{p.dweight != nullptr});
    const int rows = at.bottom - at.top, above = kStride == 1 ? at.top - 1 : at.top;

    look_up<kStride>(p, at, ring, columns, wide);
    if (tid == 0) store_shared16(ring + B::kConstants, make_uint4(T::kOnes, T::kOnes, T::kOnes, T::kOnes));
    __syncthreads();
    const uint4 ones = load_shared16(ring + B::kConstants);
    const int half = lane & 1;  // of the pixel lane / 2 of a tile: what a lane copies and stores
    const bool has_half = 8 * half < channels;
    const unsigned first_row = above < 0 ? 1 : 0;  // of dy2's rows, the image's
    const unsigned dy_rows = min(rows + B::kLead, p.ho - above) - first_row;
    const unsigned rows_below = min(rows, (p.h - 2 * at.top) / 2);  // stride 2: second rows of quads
    uint64_t dz2_from[B::kTiles], y2_from[B::kTiles], y1_from[B::kTiles], dz1_to[B::kTiles];
    unsigned dy_copies[B::kTiles], y1_copies[B::kTiles][kStride];
    uint32_t pair[B::kTiles][2], side[B::kTiles], pair_t[B::kTiles][2], side_t[B::kTiles];
    uint32_t cap[B::kTiles][kStride][2], enter_at[B::kTiles];
#pragma unroll
    for (int t = 0; t < B::kTiles; ++t) {
        const uint32_t tile = 4 * 16 * (warp + kWarps * t);
        const uint32_t dy = load_shared4(ring + B::kFrom + tile + 4 * (lane >> 1));
        dy_copies[t] = dy != kNowhere && has_half ? dy_rows : 0;
        const int64_t dy_at = 2 * ((at.image0 * p.ho + above) * p.wo * p.c + channel0 + dy + 8 * half);
        dz2_from[t] = reinterpret_cast<uint64_t>(p.dz2) + dy_at;
        y2_from[t] = reinterpret_cast<uint64_t>(p.y2) + dy_at;
        enter_at[t] = ring + place(load_shared4(ring + B::kTo + tile + 4 * (lane & 15)), lane >> 4);
        const uint32_t y1 = load_shared4(ring + B::kOut + tile + 4 * (lane >> 1));
        const bool there = y1 != kNowhere && has_half;
        const int64_t y1_at = 2 * ((at.image0 * p.h + at.top * kStride) * p.w * p.c + channel0 + y1 + 8 * half);
        y1_from[t] = reinterpret_cast<uint64_t>(p.y1) + y1_at;
        dz1_to[t] = reinterpret_cast<uint64_t>(p.dz1) + y1_at;
#pragma unroll
        for (int b = 0; b < kStride; ++b) {
            const uint32_t second = ring + B::kSecond + tile;
            y1_copies[t][b] = there && (b == 0 || load_shared4(second + 4 * (lane >> 1))) ? rows : 0;
#pragma unroll
            for (int r = 0; r < 2; ++r)
                // Beside the image activations are zero.
                cap[t][b][r] = b == 0 || load_shared4(second + 4 * (lane / 4 + 8 * r)) ? T::kSixes : 0;
        }
        // Rows of matrices of pixels (see load_matrices), and of transposed ones, of which the second lies below.
        const uint32_t first = load_shared4(ring + B::kFirst + tile + 4 * (lane & 15));
        const uint32_t first_t = load_shared4(ring + B::kFirst + tile + 4 * ((lane & 7) + (lane >> 4) * 8));
        const unsigned upper = lane >> 4, second = lane >> 3 & 1;
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            pair[t][h] = kept(ring + place(first + upper, h));
            pair_t[t][h] = kept(ring + place(first_t + second, h));
        }
        side[t] = kept(ring + place(first + (kStride == 1 ? 2 : 0), upper));
        side_t[t] = kept(ring + place(first_t + (kStride == 1 ? 2 : 0), second));
    }
    const Rows enter[2] = {Rows(enter_at[0]), Rows(enter_at[B::kTiles - 1])};
    const bool second_in = B::kTiles > 1 && 16 * (warp + kWarps) < p.cut.groups * wide;
    const bool second_out = B::kTiles > 1 && 16 * (warp + kWarps) < at.groups * columns;

    // --- factors ---
    uint32_t taps[2][9], scale[2][2] = {}, dy_factor[2][2], y_factor[2][2], centre[2] = {};
    float shift[2][4] = {}, constant[2][4];
    // B is small beside y2 where gradients are; in float16 it is multiplied as B / unit, between 1 and 2. The unit is a
    // power of two, and so is its inverse.
    constexpr bool kSplitB = T::kLargest < 1e5f;
    float y_unit[2][2];
    const auto unit = [](float factor) {
        return __uint_as_float(min(max(__float_as_uint(factor) & 0x7f800000u, 0x01000000u), 0x7e000000u));
    };
    load_taps(taps, static_cast<const char*>(p.weight) + int64_t{18} * channel0, lane, channels, kStride == 1);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int n = 8 * h + (lane >> 2), channel = channel0 + n;
        const bool there = n < channels;
        split_diagonal<T>(dy_factor[h], there ? p.coef[channel] : 0.f, lane);
        const float y = there ? p.coef[p.c + channel] : 0.f;
        split_diagonal<T>(y_factor[h], kSplitB ? y * __uint_as_float(0x7f000000u - __float_as_uint(unit(y))) : y, lane);
        if constexpr (kNormalise) {
            split_diagonal<T>(scale[h], there ? p.bn[kScale * p.c + channel] : 0.f, lane);
            const float mean = there ? p.bn[kMean * p.c + channel] : 0.f;
            centre[h] = kept(T::pack(mean, mean));
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int j = 8 * h + 2 * (lane & 3) + i;
            constant[h][i] = kept(j < channels ? p.coef[2 * p.c + channel0 + j] : 0.f);
            constant[h][i + 2] = kept(constant[h][i]);
            y_unit[h][i] = unit(j < channels ? p.coef[p.c + channel0 + j] : 0.f);
            if constexpr (kNormalise) {
                shift[h][i] = kept(j < channels ? p.bn[kShift * p.c + channel0 + j] : 0.f);
                shift[h][i + 2] = kept(shift[h][i]);
            }
        }
    }

    // --- copies of a row of dz2 and y2, and of the row of y1 that waits for it ---
    const uint64_t dy_bytes = uint64_t{2} * p.wo * p.c, y1_bytes = uint64_t{2} * p.w * p.c,
                   y1_beside = uint64_t{2} * p.c;
    const uint32_t copy_to = kept(mine + place(lane >> 1, half));
    const bool read = need_weight || kNormalise;
    const auto copy = [&](int row, int slot) {
        const int y1_at = row - B::kLead;
#pragma unroll
        for (int t = 0; t < B::kTiles; ++t) {
            const uint32_t to = copy_to + slot * B::kRawBytes + t * B::kNextTile;
            const bool wanted = row - first_row < dy_copies[t];
            copy_async_if(wanted, to + B::kDz2, dz2_from[t]);
            copy_async_if(wanted, to + B::kY2, y2_from[t]);
            dz2_from[t] += dy_bytes;
            y2_from[t] += dy_bytes;
        }
        if (y1_at >= 0) {
#pragma unroll
            for (int t = 0; t < B::kTiles; ++t) {
#pragma unroll
                for (int k = 0; k < B::kQuad; ++k) {
                    const uint32_t to = copy_to + B::kY1 + (slot * B::kQuad + k) * B::kRawBytes + t * B::kNextTile;
                    const unsigned count = y1_copies[t][k % kStride];
                    copy_async_if(read && y1_at < (k < kStride ? count : min(count, rows_below)), to,
                                  y1_from[t] + (k / kStride ? y1_bytes : 0) + (k % kStride ? y1_beside : 0));
                }
                y1_from[t] += kStride * y1_bytes;
            }
        }
        commit_copies();
    };
    // Half h of the pixels of dz2, then the same of y2; float16: of dz2 twice, of y2 twice.
    uint32_t raw_dz2[2], raw_y2[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const uint32_t here = mine + place(lane & 15, h);
        raw_dz2[h] = kept(here + (kSplitB || lane < 16 ? B::kDz2 : B::kY2));
        raw_y2[h] = kept(here + B::kY2);
    }
    const auto compute_dy = [&](int row, int slot, int ring_row) {
        const bool inside = row - first_row < dy_rows;
#pragma unroll
        for (int t = 0; t < B::kTiles; ++t) {
            if (t == 1 && !second_in) break;
            uint32_t dy[4] = {};
            if (inside) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    uint32_t m[4];
                    float sums[4];
                    load_matrices(m, raw_dz2[h] + slot * B::kRawBytes + t * B::kNextTile);
                    if constexpr (kSplitB) {
                        constexpr float kNone[4] = {};
                        float times_y[4];
                        T::multiply(sums, m[0], m[1], m[2], m[3], dy_factor[h][0], dy_factor[h][1], constant[h]);
                        load_matrices(m, raw_y2[h] + slot * B::kRawBytes + t * B::kNextTile);
                        T::multiply(times_y, m[0], m[1], m[2], m[3], y_factor[h][0], y_factor[h][1], kNone);
#pragma unroll
                        for (int i = 0; i < 4; ++i) sums[i] = fmaf(times_y[i], y_unit[h][i % 2], sums[i]);
                    } else {
                        T::multiply(sums, m[0], m[1], m[2], m[3], dy_factor[h][1], y_factor[h][1], constant[h]);
                        T::multiply(sums, m[0], m[1], m[2], m[3], dy_factor[h][0], y_factor[h][0], sums);
                    }
                    dy[2 * h] = T::pack(sums[0], sums[1]);
                    dy[2 * h + 1] = T::pack(sums[2], sums[3]);
                }
            }
            enter[t].store(ring_row * B::kRowBytes, dy);
        }
    };

    // --- the gradients ---
    float dw[2][B::kProducts][4] = {};
    float sums[2][4] = {};                                 // rows 0-7: dz1 (y1 - o) on the diagonal, rows 8-15: dz1
    const uint32_t tile_at = place(lane & 15, lane >> 4);  // of pixels' halves, four matrices in a tile
    const uint32_t raw_y1[2] = {kept(mine + B::kY1 + (kNormalise ? place(lane & 15, 0) : tile_at)),
                                kept(mine + B::kY1 + place(lane & 15, 1))};
    const Rows keep(mine + B::kY1 + tile_at), leave(mine + B::kLeaving + tile_at);
    const uint32_t a_at = kept(mine + B::kY1 + tile_at), leaving_t = kept(mine + B::kLeaving + tile_at),
                   leaving_out = kept(mine + B::kLeaving + place(lane >> 1, half));

    // From da at 16 positions: dz1, stored, its sums, and a1 transposed. `k`: of the quad.
    const auto finish = [&](const float (&da)[2][4], int t, int k, int slot, bool stored, uint64_t to,
                            uint32_t (&a_t)[4]) {
        const uint32_t here = (slot * B::kQuad + k) * B::kRawBytes + t * B::kNextTile,
                       out = k * B::kRawBytes + t * B::kNextTile;
        uint32_t a[4], dz[4], y1_t[4], mask[4];
        if constexpr (kNormalise) {
            load_transposed(y1_t, a_at + here);
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t m[4];
                float z[4];
                load_matrices(m, raw_y1[h] + here);
                T::multiply(z, m[0], m[1], m[2], m[3], scale[h][0], scale[h][1], shift[h]);
#pragma unroll
                for (int r = 0; r < 2; ++r) {
                    const uint32_t most = cap[t][k % kStride][r];
                    a[2 * h + r] = T::minimum(T::pack_relu(z[2 * r], z[2 * r + 1]), most);
                    mask[2 * h + r] = T::inside(T::minimum(T::pack_relu_down(z[2 * r], z[2 * r + 1]), most));
                }
            }
        }
        if (need_input) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                dz[i] = T::pack(da[i / 2][i % 2 * 2], da[i / 2][i % 2 * 2 + 1]);
                if constexpr (kNormalise) dz[i] &= mask[i];
            }
            leave.store(out, dz);
        }
        if constexpr (kNormalise) keep.store(here, a);
        __syncwarp();
        if (need_weight) load_transposed(a_t, a_at + here);
        if (!need_input) return;
        store_if(stored, to, load_shared16(leaving_out + out));
        if constexpr (kNormalise) {
            uint32_t dz_t[4];
            load_transposed(dz_t, leaving_t + out);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                T::multiply(sums[h], T::subtract(y1_t[2 * h], centre[h]), ones.x,
                            T::subtract(y1_t[2 * h + 1], centre[h]), ones.y, dz_t[2 * h], dz_t[2 * h + 1], sums[h]);
        }
    };

    // The window's places (row, 0 | 1) and (row, 2), tap 8 - place.
    const auto work_1 = [&](int t, int phase, int row) {
        uint32_t m[4], a_t[4];
        float da[2][4];
        int lines[3];
#pragma unroll
        for (int i = 0; i < 3; ++i) lines[i] = (phase + 2 + i) % B::kRing * B::kRowBytes;
        if (need_input) {
#pragma unroll
            for (int i = 0; i < 8; ++i) da[i / 4][i % 4] = 0;
#pragma unroll
            for (int i = 0; i < 3; ++i) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    load_matrices(m, pair[t][h] + lines[i]);
                    T::multiply(da[h], m[0], m[1], m[2], m[3], taps[h][3 * i], taps[h][3 * i + 1], da[h]);
                }
                load_matrices(m, side[t] + lines[i]);
                T::multiply(da[0], m[0], m[1], taps[0][3 * i + 2], da[0]);
                T::multiply(da[1], m[2], m[3], taps[1][3 * i + 2], da[1]);
            }
        }
        finish(da, t, 0, phase % B::kSlots, row < y1_copies[t][0], dz1_to[t], a_t);
        if (!need_weight) return;
#pragma unroll
        for (int i = 0; i < 3; ++i) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                load_transposed(m, pair_t[t][h] + lines[i]);
                T::multiply(dw[h][i], m[0], m[1], m[2], m[3], a_t[2 * h], a_t[2 * h + 1], dw[h][i]);
            }
            // Rows 0-7 are of the first half of the channels, rows 8-15 of the second.
            load_transposed(m, side_t[t] + lines[i]);
#pragma unroll
            for (int h = 0; h < 2; ++h)
                T::multiply(dw[h][3 + i], m[0], m[1], m[2], m[3], a_t[2 * h], a_t[2 * h + 1], dw[h][3 + i]);
        }
    };

    // Position (a, b) of a quad: dy2 of this row and the next, of this column and the next, through taps
    //   (0, 0): 11.  (0, 1): 12, 10 of the next column.  (1, 0): 21, 01 of the next row.
    //   (1, 1): 22, 20 of the next column, 02 of the next row, 00 of both.
    const auto work_2 = [&](int phase, int row) {
        const int level = (phase + 3) % B::kRing * B::kRowBytes, next = phase * B::kRowBytes;
        float da[4][2][4];
        if (need_input) {
#pragma unroll
            for (int i = 0; i < 32; ++i) da[i / 8][i / 4 % 2][i % 4] = 0;
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t (&w)[9] = taps[h];
                uint32_t m[4], n[4];
                load_matrices(m, pair[0][h] + level);
                load_matrices(n, pair[0][h] + next);
                T::multiply(da[0][h], m[0], m[1], w[4], da[0][h]);
                T::multiply(da[1][h], m[0], m[1], m[2], m[3], w[5], w[3], da[1][h]);
                T::multiply(da[2][h], m[0], m[1], w[7], da[2][h]);
                T::multiply(da[2][h], n[0], n[1], w[1], da[2][h]);
                T::multiply(da[3][h], m[0], m[1], m[2], m[3], w[8], w[6], da[3][h]);
                T::multiply(da[3][h], n[0], n[1], n[2], n[3], w[2], w[0], da[3][h]);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k == 2 && row >= rows_below) return;
            uint32_t a_t[4], m[4];
            finish(da[k], 0, k, phase % B::kSlots, row < y1_copies[0][k % 2],
                   dz1_to[0] + (k / 2 ? y1_bytes : 0) + (k % 2 ? y1_beside : 0), a_t);
            if (!need_weight) continue;
            // Products 0: 11 | -, 1: 12 | 10, 2: 21 | -, 3: 01 | -, 4: 22 | 20, 5: 02 | 00.
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                load_transposed(m, pair_t[0][h] + level);
                const int into = k == 3 ? 4 : k;
                T::multiply(dw[h][into], m[0], m[1], m[2], m[3], a_t[2 * h], a_t[2 * h + 1], dw[h][into]);
                if (k < 2) continue;
                load_transposed(m, pair_t[0][h] + next);
                const int too = k == 3 ? 5 : 3;
                T::multiply(dw[h][too], m[0], m[1], m[2], m[3], a_t[2 * h], a_t[2 * h + 1], dw[h][too]);
            }
        }
    };

    copy(0, 0);
    const int last = rows + B::kLead;
    for (int row = 0; row < last;) {  // of dy2
#pragma unroll
        for (int phase = 0; phase < B::kPeriod; ++phase) {
            wait_copies<0>();
            __syncwarp();
            compute_dy(row, phase % B::kSlots, phase);
            copy(row + 1, (phase + 1) % B::kSlots);
            // Writes the ring's row that was read before the last barrier at the latest.
            __syncthreads();
            if (row >= B::kLead) {
                if constexpr (kStride == 1) {
                    work_1(0, phase, row - B::kLead);
                    if (second_out) work_1(B::kTiles - 1, phase, row - B::kLead);
                } else {
                    work_2(phase, row - B::kLead);
                }
#pragma unroll
                for (int t = 0; t < B::kTiles; ++t) dz1_to[t] += kStride * y1_bytes;
            }
            if (++row == last) break;
        }
    }
    wait_copies<0>();
    __syncthreads();

    float* parts = reinterpret_cast<float*>(shared);
    leave_parts<kStride>(parts, warp, lane, dw, sums);
    __syncthreads();
    add_parts<T, kNormalise>(p, at, parts, channel0, channels, need_input, need_weight);
}

}  // namespace

#define MBV2_KERNEL(NAME, T, STRIDE, NORMALISE)                   \
    extern "C" __global__ void __launch_bounds__(kThreads, 2)     \
        NAME(const __grid_constant__ DepthwiseBackwardParams p) { \
        MBV2_BODY((depthwise_backward<T, STRIDE, NORMALISE>(p));) \
    }                                                             \
    MBV2_SHARED(NAME, Backward<STRIDE>::kSharedBytes)

#define MBV2_KERNELS(KIND, T)                                       \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s1_x, T, 1, false) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s2_x, T, 2, false) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s1_bn, T, 1, true) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s2_bn, T, 2, true)

MBV2_KERNELS(float16, Half)
MBV2_KERNELS(bfloat16, BFloat16)

// By bn or not.
#define MBV2_CHOICE(KIND, STRIDE)                                                                \
    {normalise ? reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s##STRIDE##_bn) \
               : reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s##STRIDE##_x), \
     Backward<STRIDE>::kSharedBytes}

DepthwiseKernel depthwise_backward_kernel(DepthwiseType type, int stride, bool normalise) {
    if (type == kFloat16) {
        if (stride == 1) return MBV2_CHOICE(float16, 1);
        return MBV2_CHOICE(float16, 2);
    }
    if (stride == 1) return MBV2_CHOICE(bfloat16, 1);
    return MBV2_CHOICE(bfloat16, 2);
}

}  // namespace cuda
}  // namespace mbv2
