// Backward of the training depthwise 3x3, 16-bit types: dy2 = A dz2 + B y2 + C; dz1 = relu6'(bn1(y1)) conv^T(dy2) with
// its sums; parts of the weight's gradient. One pass: dy2, y1 in, dz1 out.
//
// Cut like the forward pass, over the positions of dy2: a block owns 16 channels and walks down a strip of rows, each
// of its four warps 16 columns. Every dy2 is computed and rounded once, by the thread that fetched dz2 and y2, into a
// ring of rows. Both gradients are products of the tensor cores: the transposed convolution as in the forward pass,
// with diagonal matrices of the taps; the weight's as the diagonals of dy2' a1, where one product takes two taps (two
// shifted dy2, one above the other) against 16 pixels of a1. At stride 2 a position of dy2 stands for a 2x2 quad of
// y1's, which 1, 2, 2 and 4 of the taps reach. The mask is decided in float32 from y1 itself. As in the forward pass, a
// NaN of dy2 or a1 reaches the eight channels of its matrix.
//
// sums: of dz1, and of dz1 (y1 - o) with o the mean rounded to the activations' type, which is put right at the end.
#include "depthwise_device.cuh"

namespace mbv2 {
namespace cuda {
namespace {

template <class T, int kStride>
struct Backward {
    using R = Row<T, 1>;
    static constexpr int kPixels = 64;                  // of a row of dy2 in shared memory, halo columns included
    static constexpr int kLead = kStride == 1 ? 2 : 1;  // rows of dy2 that a row of y1 waits for
    static constexpr int kRing = kLead + 2, kAhead = kStride == 1 ? 2 : 1;
    static constexpr int kPositions = kStride * kStride;  // of y1 for one of dy2
    static constexpr int kSlots = kAhead + 2;             // of rows of y1: in use, arrived, on their way
    static constexpr int kPeriod = kRing;                 // rows after which everything is where it was
    static_assert(kSlots == kRing && kRing % kAhead == 0 && R::kPixelsAtOnce == kPixels);
    static constexpr int kRowBytes =
        (kPixels + 3) * R::kPitch;  // zero pixels behind the others, as in the forward pass
    static constexpr int kVectorRow = R::kThreads * 16;
    static constexpr int kRaw = kRing * kRowBytes, kY1 = kRaw + kAhead * 2 * kVectorRow;
    static constexpr int kSharedBytes = kY1 + kSlots * kPositions * kVectorRow;
    static_assert(kRowWarps * 11 * 16 * 4 <= kRaw, "the partial sums fit over the ring");
};

// What is added up over the positions of a warp.
struct Sums {
    float low[2][4] = {}, high[2][4] = {}, plain[2][4] = {};  // dz (y1 - o) of pixels 0-7 and 8-15, dz
};

// Per lane 4 g + j: channels 4 j ... 4 j + 3 of pixels g and g + 8.
template <class T, bool kNormalise>
struct Ending {
    float scale[4], shift[4];
    uint32_t centre[2], ones;

    // From da at 16 positions: dz1, masked and stored, its sums, and a1 transposed. y1: the address of the lane's first
    // position; there: whether the positions are in the image.
    template <bool kRagged>
    __device__ __forceinline__ void finish(const float (&da)[2][4], uint32_t y1, const bool (&there)[2],
                                           const bool (&writes)[2], char* (&to)[2], bool need_input, bool read,
                                           Sums& sums, uint32_t (&a)[2][2]) const {
        uint32_t dz[2][2], centred[2][2];  // [h][r]
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint2 both = read ? load_shared8(y1 + 8 * r * 32) : make_uint2(0, 0);
            const uint32_t y[2] = {both.x, both.y};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float low = da[h][2 * r], high = da[h][2 * r + 1];
                if constexpr (kNormalise) {
                    const float z0 = fmaf(T::low(y[h]), scale[2 * h], shift[2 * h]);
                    const float z1 = fmaf(T::high(y[h]), scale[2 * h + 1], shift[2 * h + 1]);
                    // As torch's hardtanh_backward on a GPU: a NaN lets the gradient through.
                    if (z0 <= 0.f || z0 >= 6.f) low = 0.f;
                    if (z1 <= 0.f || z1 >= 6.f) high = 0.f;
                    a[h][r] = T::minimum(T::pack_relu(z0, z1), T::kSixes);
                    centred[h][r] = T::subtract(y[h], centre[h]);
                } else {
                    a[h][r] = y[h];
                }
                dz[h][r] = T::pack(low, high);
                if (kRagged && !there[r]) dz[h][r] = a[h][r] = 0;
            }
            if (need_input) store_if(writes[r], to[r], dz[0][r], dz[1][r]);
        }
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            a[h][0] = transposed(a[h][0]), a[h][1] = transposed(a[h][1]);
            if constexpr (kNormalise) {
                if (!need_input) continue;
                const uint32_t c0 = transposed(centred[h][0]), c1 = transposed(centred[h][1]);
                const uint32_t d0 = transposed(dz[h][0]), d1 = transposed(dz[h][1]);
                T::multiply(sums.low[h], c0, c1, d0);
                T::multiply(sums.high[h], c0, c1, d1);
                T::multiply(sums.plain[h], ones, ones, ones, ones, d0, d1);
            }
        }
    }
};

// Nine weights of the lane's diagonals, by half: weight(t) of channel 4 (n / 2) + 2 h + n % 2, n = lane / 4.
__device__ __forceinline__ void load_diagonals(uint32_t (&d)[2][9], const void* weight, int lane, int count) {
    const uint16_t* w = static_cast<const uint16_t*>(weight);
    const int n = lane >> 2;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const int channel = 4 * (n >> 1) + 2 * h + (n & 1);
        const bool there = (lane & 3) == n >> 1 && channel < count;
#pragma unroll
        for (int t = 0; t < 9; ++t) {
            const uint32_t value = there ? w[channel * 9 + t] : 0;
            d[h][t] = n & 1 ? value << 16 : value;
        }
    }
}

template <class T, int kStride, bool kNormalise>
__device__ __forceinline__ void depthwise_backward(const DepthwiseBackwardParams& p) {
    using B = Backward<T, kStride>;
    using R = typename B::R;
    constexpr int kPitch = R::kPitch;
    extern __shared__ uint4 shared[];
    const Place at(p.cut, p.n, p.c, p.ho);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int channel0 = at.slab * 16, q = tid & 1, channel_q = channel0 + 8 * q;
    const unsigned columns = p.cut.columns, wide = columns + (kStride == 1 ? 2 : 1);
    const uint32_t ring = shared_address(shared), raw = ring + B::kRaw + tid * 16, y1s = ring + B::kY1;
    const bool need_input = p.dz1 != nullptr, need_weight = p.dweight != nullptr;
    const bool read = need_weight || kNormalise;

    // --- what the thread fetches: a vector of dz2 and y2 a row, and of y1 for each position of a quad ---
    uint32_t dy_from = kNowhere, y1_from[B::kPositions];
    const uint32_t dy_to = (tid >> 1) * kPitch + R::place(q);
    {
        const unsigned pixel = tid >> 1, group = pixel / wide, i = pixel - group * wide;
        const int column = at.chunk(group) * columns + i - (kStride == 1 ? 1 : 0);
        if (group < at.groups && column >= 0 && column < p.wo && channel_q < p.c)
            dy_from = (at.image(group) * p.ho * p.wo + column) * p.c + channel_q;
        else
            for (int r = 0; r < B::kRing; ++r) R::put(ring + r * B::kRowBytes + dy_to, uint4{});
        const unsigned own = pixel / columns, j = pixel - own * columns;
#pragma unroll
        for (int k = 0; k < B::kPositions; ++k) {
            const int x = (at.chunk(own) * columns + j) * kStride + k % kStride;
            const bool there = own < at.groups && at.chunk(own) * columns + j < p.wo && x < p.w && channel_q < p.c;
            y1_from[k] = there ? (at.image(own) * p.h * p.w + k / kStride * p.w + x) * p.c + channel_q : kNowhere;
            if (!there)
                for (int s = 0; s < B::kSlots; ++s)
                    store_shared16(y1s + (s * B::kPositions + k) * B::kVectorRow + tid * 16, uint4{});
        }
    }
    for (int i = tid; i < B::kRing * (3 * kPitch / 16); i += R::kThreads)
        store_shared16(ring + i / (3 * kPitch / 16) * B::kRowBytes + B::kPixels * kPitch + i % (3 * kPitch / 16) * 16,
                       uint4{});
    float coef[3][8];
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int k = 0; k < 3; ++k) coef[k][i] = channel_q < p.c ? p.coef[k * p.c + channel_q + i] : 0.f;

    const int64_t dy_bytes = int64_t{2} * p.wo * p.c, y1_bytes = int64_t{2} * p.w * p.c;
    const int above = kStride == 1 ? at.top - 1 : at.top, steps = at.bottom - at.top;
    const int first_row = above < 0 ? 1 : 0, last_row = min(steps + B::kLead, p.ho - above);  // of those, the image's
    const int64_t dy_start = (at.image0 * p.ho + above) * dy_bytes;
    const char *dz2_row = static_cast<const char*>(p.dz2) + dy_start,
               *y2_row = static_cast<const char*>(p.y2) + dy_start;
    const char* y1_row = static_cast<const char*>(p.y1) + (at.image0 * p.h + at.top * kStride) * y1_bytes;
    int t = 0;  // the next row of dy2 to compute
    // Row t of dz2 and y2 and the row of y1 that needs it, into the slots of `row` (t, or t but for whole periods).
    const auto fetch = [&](int t, int row) {
        if (t >= first_row && t < last_row && dy_from != kNowhere) {
            const uint32_t to = raw + row % B::kAhead * 2 * B::kVectorRow;
            copy_async(to, dz2_row + uint64_t{2} * dy_from);
            copy_async(to + B::kVectorRow, y2_row + uint64_t{2} * dy_from);
        }
        dz2_row += dy_bytes, y2_row += dy_bytes;
        if (t >= B::kLead) {
            const uint32_t to = y1s + (row - B::kLead) % B::kSlots * B::kPositions * B::kVectorRow + tid * 16;
            const int below = (at.top + t - B::kLead) * kStride + 1;  // a quad's second row
#pragma unroll
            for (int k = 0; k < B::kPositions; ++k)
                if (read && t < steps + B::kLead && y1_from[k] != kNowhere && (k < kStride || below < p.h))
                    copy_async(to + k * B::kVectorRow, y1_row + uint64_t{2} * y1_from[k]);
            y1_row += kStride * y1_bytes;
        }
        commit_copies();
    };
    const auto advance = [&](int row) {
        wait_copies<B::kAhead - 1>();
        const uint32_t from = raw + row % B::kAhead * 2 * B::kVectorRow;
        if (dy_from != kNowhere) {
            uint4 v = {};
            if (t >= first_row && t < last_row) {
                const uint4 dz = load_shared16(from), y = load_shared16(from + B::kVectorRow);
                const uint32_t dzs[4] = {dz.x, dz.y, dz.z, dz.w}, ys[4] = {y.x, y.y, y.z, y.w};
                uint32_t* out = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float low = fmaf(T::low(ys[i]), coef[1][2 * i], coef[2][2 * i]);
                    const float high = fmaf(T::high(ys[i]), coef[1][2 * i + 1], coef[2][2 * i + 1]);
                    out[i] = T::pack(fmaf(T::low(dzs[i]), coef[0][2 * i], low),
                                     fmaf(T::high(dzs[i]), coef[0][2 * i + 1], high));
                }
            }
            R::put(ring + row % B::kRing * B::kRowBytes + dy_to, v);
        }
        fetch(t + B::kAhead, row + B::kAhead);
        ++t;
    };
#pragma unroll
    for (int i = 0; i < B::kAhead; ++i) fetch(i, i);

    // --- what the lane computes: its warp's 16 positions ---
    const int channel = channel0 + 4 * (lane & 3);
    const unsigned zero = B::kPixels * kPitch;
    const auto place = [&](unsigned v) {  // of a position's first column of dy2
        const unsigned group = v / columns, j = v - group * columns;
        return group < at.groups && at.chunk(group) * columns + j < p.wo ? (group * wide + j) * kPitch : zero;
    };
    const uint32_t c0 = place(16 * warp + (lane & 15));                              // its row of matrices of pixels
    const uint32_t c0_transposed = place(16 * warp + (lane & 7) + (lane >> 4) * 8);  // of transposed ones
    uint32_t to[2];
    bool second[2] = {};  // whether the quad's second column is there
#pragma unroll
    for (int r = 0; r < 2; ++r) {
        const unsigned v = 16 * warp + (lane >> 2) + 8 * r, group = v / columns, j = v - group * columns;
        const int column = at.chunk(group) * columns + j;
        const bool there = group < at.groups && column < p.wo;
        to[r] = there && channel < p.c ? (at.image(group) * p.h * p.w + column * kStride) * p.c + channel : kNowhere;
        second[r] = there && column * kStride + 1 < p.w;
    }
    Ending<T, kNormalise> ending;
    ending.ones = kept(T::kOnes);
    if constexpr (kNormalise) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            ending.scale[i] = channel < p.c ? p.bn[kScale * p.c + channel + i] : 0.f;
            ending.shift[i] = channel < p.c ? p.bn[kShift * p.c + channel + i] : 0.f;
        }
#pragma unroll
        for (int h = 0; h < 2; ++h)
            ending.centre[h] =
                channel < p.c ? T::pack(p.bn[kMean * p.c + channel + 2 * h], p.bn[kMean * p.c + channel + 2 * h + 1])
                              : 0;
    }
    const char* weight = static_cast<const char*>(p.weight) + int64_t{18} * channel0;
    Taps<T, 1, kPitch> taps;  // stride 1
    uint32_t diagonal[2][9];  // stride 2
    if constexpr (kStride == 1)
        taps.template load<true>(weight, lane, p.c - channel0);
    else
        load_diagonals(diagonal, weight, lane, p.c - channel0);
    // Stride 1: the window's places (0 | 1, k), (2, 0 | 1), (2, 2), tap 8 - place. Stride 2: see below.
    constexpr int kProducts = kStride == 1 ? 5 : 6;
    float dw[2][kProducts][4] = {};
    Sums sums;
    const bool works = 16 * warp < at.groups * columns;
    char* dz1_row = static_cast<char*>(p.dz1) + (at.image0 * p.h + at.top * kStride) * y1_bytes;
    const uint32_t y1_lane = y1s + (16 * warp + (lane >> 2)) * 32 + 8 * (lane & 3);

    const auto step_1 = [&](int phase) {
        uint32_t rows[3], a[2][2];
#pragma unroll
        for (int i = 0; i < 3; ++i) rows[i] = ring + (phase + i) % B::kRing * B::kRowBytes;
        float da[2][4] = {};
        if (need_input) taps.convolve(da, rows, c0, 0, lane);
        char* pixels[2] = {dz1_row + uint64_t{2} * to[0], dz1_row + uint64_t{2} * to[1]};
        const bool all[2] = {true, true}, writes[2] = {to[0] != kNowhere, to[1] != kNowhere};
        ending.template finish<false>(da, y1_lane + phase % B::kSlots * B::kVectorRow, all, writes, pixels, need_input,
                                      read, sums, a);
        if (!need_weight) return;
        const bool second_tap = lane & 8;
        const uint32_t two_rows = (second_tap ? rows[1] : rows[0]) + c0_transposed;
        const uint32_t third_row = rows[2] + c0_transposed;
        uint32_t m[4];
#pragma unroll
        for (int h = 0; h < 2; ++h)
#pragma unroll
            for (int k = 0; k < 5; ++k) {
                const uint32_t from = k < 3 ? two_rows + k * kPitch
                                            : third_row + (k == 4       ? 2 * kPitch
                                                           : second_tap ? kPitch
                                                                        : 0);
                load_transposed(m, from + 16 * h);
                T::multiply(dw[h][k], m[0], m[1], m[2], m[3], a[h][0], a[h][1]);
            }
    };

    // Position (a, b) of a quad: dy2 of this row and the next, of this column and the next, through taps
    //   (0, 0): 11.  (0, 1): 12, 10 of the next column.  (1, 0): 21, 01 of the next row.
    //   (1, 1): 22, 20 of the next column, 02 of the next row, 00 of both.
    const auto step_2 = [&](int phase, bool below) {
        const uint32_t level = ring + phase % B::kRing * B::kRowBytes,
                       next = ring + (phase + 1) % B::kRing * B::kRowBytes;
        const uint32_t across = lane >= 16 ? kPitch : 0;
        const uint32_t level_t = level + c0_transposed + (lane & 8 ? kPitch : 0);
        const uint32_t next_t = next + c0_transposed + (lane & 8 ? kPitch : 0);
        const uint32_t y1_here = y1_lane + phase % B::kSlots * B::kPositions * B::kVectorRow;
        float da[4][2][4] = {};
        if (need_input) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const uint32_t (&w)[9] = diagonal[h];
                uint32_t m[4];
                load_matrices(m, level + c0 + across + 16 * h);
                T::multiply(da[0][h], m[0], m[1], w[4]);
                T::multiply(da[1][h], m[0], m[1], m[2], m[3], w[5], w[3]);
                T::multiply(da[3][h], m[0], m[1], m[2], m[3], w[8], w[6]);
                load_matrices(m, next + c0 + across + 16 * h);
                T::multiply(da[3][h], m[0], m[1], m[2], m[3], w[2], w[0]);
                load_matrices(m, (lane >= 16 ? next : level) + c0 + 16 * h);
                T::multiply(da[2][h], m[0], m[1], m[2], m[3], w[7], w[1]);
            }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
            if (k >= 2 && !below) return;
            const int64_t ahead = (k / 2) * y1_bytes + (k % 2) * 2 * p.c;
            char* pixels[2] = {dz1_row + ahead + uint64_t{2} * to[0], dz1_row + ahead + uint64_t{2} * to[1]};
            const bool writes[2] = {to[0] != kNowhere && (k % 2 == 0 || second[0]),
                                    to[1] != kNowhere && (k % 2 == 0 || second[1])};
            uint32_t a[2][2];
            const uint32_t y1_at = y1_here + k * B::kVectorRow;
            if (k % 2)
                ending.template finish<true>(da[k], y1_at, second, writes, pixels, need_input, read, sums, a);
            else
                ending.template finish<false>(da[k], y1_at, second, writes, pixels, need_input, read, sums, a);
            if (!need_weight) continue;
            // Products 0: 11 | -, 1: 12 | 10, 2: 21 | -, 3: 01 | -, 4: 22 | 20, 5: 02 | 00.
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                uint32_t m[4];
                load_transposed(m, level_t + 16 * h);
                T::multiply(dw[h][k == 3 ? 4 : k], m[0], m[1], m[2], m[3], a[h][0], a[h][1]);
                if (k < 2) continue;
                load_transposed(m, next_t + 16 * h);
                T::multiply(dw[h][k == 3 ? 5 : 3], m[0], m[1], m[2], m[3], a[h][0], a[h][1]);
            }
        }
    };

#pragma unroll
    for (int i = 0; i <= B::kLead; ++i) advance(i);
    __syncthreads();
    for (int s = 0; s < steps;) {
#pragma unroll
        for (int phase = 0; phase < B::kPeriod; ++phase) {
            if (works) {
                if constexpr (kStride == 1)
                    step_1(phase);
                else
                    step_2(phase, 2 * (at.top + s) + 1 < p.h);
            }
            if (++s == steps) break;
            advance(phase + B::kLead + 1);
            dz1_row += kStride * y1_bytes;
            __syncthreads();
        }
    }
    wait_copies<0>();
    __syncthreads();

    // --- parts of the block, added in the warps' order: per warp nine taps, then the two sums, of 16 channels ---
    float* parts = reinterpret_cast<float*>(shared);
    const int n = lane >> 2, e = n & 1;
    if ((lane & 3) == n >> 1) {  // on the diagonal
        constexpr int kTaps1[5][2] = {{8, 5}, {7, 4}, {6, 3}, {2, 1}, {0, -1}};
        constexpr int kTaps2[6][2] = {{4, -1}, {5, 3}, {7, -1}, {1, -1}, {8, 6}, {2, 0}};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float* mine = parts + warp * 11 * 16 + 4 * (n >> 1) + 2 * h + e;
#pragma unroll
            for (int k = 0; k < kProducts; ++k)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    const int tap = kStride == 1 ? kTaps1[k % 5][i] : kTaps2[k][i];
                    if (tap >= 0) mine[tap * 16] = e ? dw[h][k][2 * i + 1] : dw[h][k][2 * i];
                }
            mine[9 * 16] = e ? sums.plain[h][1] : sums.plain[h][0];
            mine[10 * 16] = e ? sums.low[h][1] + sums.high[h][3] : sums.low[h][0] + sums.high[h][2];
        }
    }
    __syncthreads();
    for (int i = tid; i < 9 * 16; i += R::kThreads) {
        const int tap = i % 9, c = channel0 + i / 9;
        if (!need_weight || c >= p.c) continue;
        float total = 0;
        for (int w = 0; w < kRowWarps; ++w) total += parts[w * 11 * 16 + tap * 16 + i / 9];
        p.dweight[(int64_t{1} * at.part * p.c + c) * 9 + tap] = total;
    }
    if (kNormalise && need_input && tid < 16 && channel0 + tid < p.c) {
        float plain = 0, centred = 0;
        for (int w = 0; w < kRowWarps; ++w)
            plain += parts[w * 11 * 16 + 9 * 16 + tid], centred += parts[w * 11 * 16 + 10 * 16 + tid];
        const float mean = p.bn[kMean * p.c + channel0 + tid];
        float* out = p.sums + int64_t{2} * at.part * p.c + channel0 + tid;
        out[0] = plain, out[p.c] = fmaf(T::low(T::pack(mean, mean)) - mean, plain, centred);
    }
}

}  // namespace

#define MBV2_KERNEL(NAME, T, STRIDE, NORMALISE)                                                                    \
    extern "C" __global__ void __launch_bounds__(128, 2) NAME(const __grid_constant__ DepthwiseBackwardParams p) { \
        MBV2_BODY((depthwise_backward<T, STRIDE, NORMALISE>(p));)                                                  \
    }                                                                                                              \
    MBV2_SHARED(NAME, (Backward<T, STRIDE>::kSharedBytes))

#define MBV2_KERNELS(KIND, T)                                        \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s1_x1, T, 1, false) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s2_x1, T, 2, false) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s1_bn1, T, 1, true) \
    MBV2_KERNEL(mbv2_depthwise_backward_##KIND##_s2_bn1, T, 2, true)

MBV2_KERNELS(float16, Half)
MBV2_KERNELS(bfloat16, BFloat16)

#define MBV2_CHOICE(KIND)                                                                         \
    (stride == 1 ? p.bn ? reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s1_bn1) \
                        : reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s1_x1)  \
     : p.bn      ? reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s2_bn1)        \
                 : reinterpret_cast<const void*>(&mbv2_depthwise_backward_##KIND##_s2_x1))

const char* launch_depthwise_backward(const DepthwiseBackwardParams& p, DepthwiseType type, int stride,
                                      cudaStream_t stream) {
    if (type == kFloat32) return "there is no float32 kernel";
    const void* kernel = type == kFloat16 ? MBV2_CHOICE(float16) : MBV2_CHOICE(bfloat16);
    const int bytes = stride == 1 ? Backward<Half, 1>::kSharedBytes : Backward<Half, 2>::kSharedBytes;
    const int64_t blocks = depthwise_blocks(p.n, p.c, p.cut);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "more blocks than a launch can have";
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<DepthwiseBackwardParams*>(&p)};
        error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(128), arguments, bytes, stream);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace cuda
}  // namespace mbv2
