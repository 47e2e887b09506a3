// Training depthwise 3x3, 16-bit types: y = conv(relu6(bn(x))), zeros around the activation, and the moments of the
// rounded y. depthwise_single.cu has float32.
//
// A block owns 16 channels and up to kPixels neighbouring input columns, and walks down a strip of rows. Rows of x
// arrive through cp.async; each is normalised, clamped and rounded once into a ring of activated rows, from which
// ldmatrix takes it with the columns to the left and right. Everything that multiplies is a product of the tensor cores
// whose second factor is diagonal: the normalisation (scale as a sum of two values of the type, shift in float32) and
// the taps, so that nine multiply-adds a value cost half of an instruction. A row is loaded once and adds to the (up to
// three) rows of outputs it is a tap of. Products are exact and sums float32, as in CUDA cores; the price is that a NaN
// (and with it an infinity) reaches all eight channels of its matrix, as 0 * NaN.
//
// Outputs leave through shared memory, where the statistics find them transposed: with d = y - origin, origin one of
// the warp's first values of each channel, one product of [d; ones] with d' adds up d^2 (its diagonal) and d. The
// difference of two 16-bit values is exact where they lie within a factor of two of each other, else it is rounded
// once. As the origin is one of the values, the sum of squares is at most (n + 1) M2, and what the subtraction at the
// end can lose is n * 2^-24 of M2.
#include "depthwise_device.cuh"
#include "depthwise_kernels.h"

namespace mbv2 {
namespace cuda {
namespace {

template <int kStride>
struct Forward {
    static constexpr int kPixels = 128;  // of a row in shared memory, the columns around it included
    static constexpr int kOutputs = kPixels / kStride;
    static constexpr int kTiles = kOutputs / (16 * kWarps);  // of 16 outputs, a warp
    static constexpr int kLag = kStride == 1 ? 3 : 2;  // steps from a row of outputs' first input row to its storing
    static constexpr int kPeriod = kLag;               // steps after which everything is where it was
    static constexpr int kRing = kStride == 1 ? 3 : 4;
    static constexpr int kAhead = kStride == 1 ? 2 : 1;  // steps that copies are ahead of the ring
    static constexpr int kRaw = kStride * (kAhead + 1);  // rows of copies
    static_assert(kPeriod * kStride % kRing == 0 && kPeriod * kStride % kRaw == 0);
    // Behind a ring row's pixels: three that are zero, for outputs that are not there; one that nobody reads.
    static constexpr int kZero = kPixels, kDump = kPixels + 3;
    static constexpr int kRowBytes = (kPixels + 4) * kPixelBytes, kRawBytes = kPixels * kPixelBytes;
    static constexpr int kCopies = kRing * kRowBytes, kLeaving = kCopies + kRaw * kRawBytes;
    static constexpr int kPresent = kLeaving + kOutputs * kPixelBytes;
    static constexpr int kSharedBytes = kPresent + 16 * kThreads;
    // Tables of the set-up lie where outputs leave later: of inputs and of outputs.
    static constexpr int kFrom = kLeaving, kTo = kFrom + 4 * kPixels, kFirst = kTo + 4 * kPixels,
                         kSecond = kFirst + 4 * kOutputs, kOut = kSecond + 4 * kOutputs,
                         kConstants = kOut + 4 * kOutputs;
    static_assert(kConstants + 32 <= kPresent);
};

template <class T, int kStride, bool kNormalise>
__device__ __forceinline__ void depthwise(const DepthwiseParams& p) {
    using F = Forward<kStride>;
    extern __shared__ __align__(32) uint4 shared[];
    const Place at(p.cut, p.n, p.c, p.ho);
    const int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    const int channel0 = at.slab * kSlab, channels = p.c - channel0;
    const unsigned columns = p.cut.columns, wide = (columns - 1) * kStride + 3;
    const uint32_t ring = shared_address(shared), copies = ring + F::kCopies + warp * 16 * kPixelBytes;
    const int rows = at.bottom - at.top, rows_in = (rows - 1) * kStride + 3, above = at.top * kStride - 1;

    // --- where things are: thread i looks it up for input i and for output i ---
    {
        const unsigned group = tid / wide, i = tid - group * wide;
        const int column = at.chunk(group) * columns * kStride - 1 + i;
        const bool inside = group < at.groups && column >= 0 && column < p.w;
        const unsigned odd = p.cut.groups * (columns + 1);  // at stride 2 odd columns lie behind the even ones
        const unsigned position = kStride == 1 ? tid
                                  : i & 1      ? odd + group * columns + i / 2
                                               : group * (columns + 1) + i / 2;
        store_shared4(ring + F::kFrom + 4 * tid, inside ? (at.image(group) * p.h * p.w + column) * p.c : kNowhere);
        store_shared4(ring + F::kTo + 4 * tid, inside ? position : F::kDump);
        if (!inside && group < p.cut.groups)
            for (int r = 0; r < F::kRing; ++r)
                for (int h = 0; h < 2; ++h) store_shared16(ring + r * F::kRowBytes + place(position, h), uint4{});
        // What is never copied is zero, and (stride 2) a row that the shortest strip does not have.
        for (int r = 0; r < F::kRaw; ++r)
            if (!inside || channels < kSlab || r == 3)
                for (int h = 0; h < 2; ++h)
                    store_shared16(ring + F::kCopies + r * F::kRawBytes + tid * kPixelBytes + 16 * h, uint4{});
        if (tid < F::kRing * 6)
            store_shared16(ring + tid / 6 * F::kRowBytes + F::kZero * kPixelBytes + tid % 6 * 16, uint4{});
    }
    if (tid < F::kOutputs) {
        const unsigned group = tid / columns, i = tid - group * columns;
        const int column = at.chunk(group) * columns + i;
        const bool there = group < at.groups && column < p.wo;
        const unsigned first = kStride == 1 ? group * wide + i : group * (columns + 1) + i;
        store_shared4(ring + F::kFirst + 4 * tid, there ? first : F::kZero);
        store_shared4(ring + F::kSecond + 4 * tid, !there         ? F::kZero
                                                   : kStride == 1 ? first + 1
                                                                  : p.cut.groups * (columns + 1) + group * columns + i);
        store_shared4(ring + F::kOut + 4 * tid, there ? (at.image(group) * p.ho * p.wo + column) * p.c : kNowhere);
    }
    if (tid == 0) {
        store_shared16(ring + F::kConstants, make_uint4(T::kOnes, T::kOnes, T::kOnes, T::kOnes));
        store_shared16(ring + F::kConstants + 16, make_uint4(2, 2, 2, 2));
    }
    __syncthreads();
    const uint4 ones = load_shared16(ring + F::kConstants), twos = load_shared16(ring + F::kConstants + 16);
    const int half = lane & 1;  // of the pixel lane / 2 of a tile: what a lane copies and stores
    const bool has_half = 8 * half < channels;
    uint64_t from[2];
    int last_copy[2];  // rows a lane copies
    uint32_t to_ring[2];
#pragma unroll
    for (int t = 0; t < 2; ++t) {
        const uint32_t tile = 4 * 16 * (warp + kWarps * t);
        const uint32_t element = load_shared4(ring + F::kFrom + tile + 4 * (lane >> 1));
        last_copy[t] = element != kNowhere && has_half ? rows_in : 0;
        from[t] = reinterpret_cast<uint64_t>(p.x) +
                  2 * ((at.image0 * p.h + max(above, 0)) * p.w * p.c + channel0 + element + 8 * half);
        to_ring[t] = place(load_shared4(ring + F::kTo + tile + 4 * (lane & 15)), lane >> 4);
    }
    const Rows enter[2] = {Rows(ring + to_ring[0]), Rows(ring + to_ring[1])};
    uint32_t left[F::kTiles][2], right[F::kTiles];
    int pixels = 0, pixel = 0;  // of the warp's tiles those that are there, and one of the first tile
    // Of the pixels that a lane holds of a transposed tile, all ones where a pixel is there; elsewhere y is zero.
    uint32_t present[2][2] = {};
    uint64_t to[F::kTiles];
    bool stored[F::kTiles];
#pragma unroll
    for (int t = 0; t < F::kTiles; ++t) {
        const uint32_t tile = 4 * 16 * (warp + kWarps * t), mine = tile + 4 * (lane & 15);
        const uint32_t first = load_shared4(ring + F::kFirst + mine);
        const uint32_t place_0 = place(lane < 16 ? first : load_shared4(ring + F::kSecond + mine), 0);
        left[t][0] = kept(ring + place_0), left[t][1] = kept(ring + (place_0 ^ 16));
        right[t] = kept(ring + place(first + (kStride == 1 ? 2 : 1), lane >> 4));
        const uint32_t element = load_shared4(ring + F::kOut + tile + 4 * (lane >> 1));
        stored[t] = element != kNowhere && has_half;
        to[t] = reinterpret_cast<uint64_t>(p.y) +
                2 * ((at.image0 * p.ho + at.top) * p.wo * p.c + channel0 + element + 8 * half);
        const uint32_t there = __ballot_sync(~0u, load_shared4(ring + F::kOut + mine) != kNowhere) & 0xffff;
        pixels += __popc(there);
        if (t == 0) pixel = max(__ffs(there) - 1, 0);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const uint32_t two = there >> (2 * (lane & 3) + 8 * r);
            present[t][r] = (two & 1 ? 0xffff : 0) | (two & 2 ? 0xffff0000 : 0);
        }
    }
    // Registers are scarce.
    const uint32_t present_at = ring + F::kPresent + 16 * tid;
    store_shared16(present_at, make_uint4(present[0][0], present[0][1], present[1][0], present[1][1]));
    // Of a warp's first tiles nothing is left out where they are not there: it is zero.
    const bool second_in = 16 * (warp + kWarps) < p.cut.groups * wide;
    const bool second_out = F::kTiles > 1 && 16 * (warp + kWarps) < at.groups * columns;

    // --- factors ---
    uint32_t taps[2][9], scale[2][2];
    float shift[2][4];
    load_taps(taps, static_cast<const char*>(p.weight) + int64_t{18} * channel0, lane, channels, false);
#pragma unroll
    for (int h = 0; h < 2; ++h)
        if constexpr (kNormalise) {
            const int n = 8 * h + (lane >> 2);
            split_diagonal<T>(scale[h], n < channels ? p.bn[kScale * p.c + channel0 + n] : 0.f, lane);
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int j = 8 * h + 2 * (lane & 3) + i;
                shift[h][i] = kept(j < channels ? p.bn[kShift * p.c + channel0 + j] : 0.f);
                shift[h][i + 2] = kept(shift[h][i]);
            }
        }

    // --- rows of input: copied, then activated ---
    const uint32_t in_row = p.w * p.c;
    const unsigned outside = above < 0 ? 1 : 0, inside_rows = p.h - max(above, 0);
    int ahead = 0;  // the next row to copy
    const uint32_t copy_to = kept(copies + place(lane >> 1, half));
    const auto copy = [&](int slot) {
#pragma unroll
        for (int r = 0; r < kStride; ++r, ++ahead) {
            // A row outside the image is its neighbour in the image, all of it clamped to zero later.
            const uint32_t step = ahead - outside < inside_rows - 1 ? in_row : 0;
#pragma unroll
            for (int t = 0; t < 2; ++t) {
                copy_async_if(ahead < last_copy[t],
                              copy_to + (slot * kStride + r) * F::kRawBytes + t * kWarps * 16 * kPixelBytes, from[t]);
                walk(from[t], step, t ? twos.x : twos.y);
            }
        }
        commit_copies();
    };
    const uint32_t place_0 = place(lane & 15, kNormalise ? 0 : lane >> 4);
    const uint32_t raw[2] = {kept(copies + place_0), kept(copies + (place_0 ^ 16))};
    const auto activate = [&](int row, int slot, int ring_row) {
        const bool inside = row - outside < inside_rows;
        const uint32_t cap = inside ? kNormalise ? T::kSixes : ~0u : 0;
#pragma unroll
        for (int t = 0; t < 2; ++t) {
            if (t == 1 && !second_in) break;
            const uint32_t here = slot * F::kRawBytes + t * kWarps * 16 * kPixelBytes;
            uint32_t z[4];
            if constexpr (kNormalise) {
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    uint32_t m[4];
                    float sums[4];
                    // The half's pixels twice, for the two parts of the scale.
                    load_matrices(m, raw[h] + here);
                    T::multiply(sums, m[0], m[1], m[2], m[3], scale[h][0], scale[h][1], shift[h]);
                    z[2 * h] = T::minimum(T::pack_relu(sums[0], sums[1]), cap);
                    z[2 * h + 1] = T::minimum(T::pack_relu(sums[2], sums[3]), cap);
                }
            } else {
                load_matrices(z, raw[0] + here);
#pragma unroll
                for (int i = 0; i < 4; ++i) z[i] &= cap;
            }
            enter[t].store(ring_row * F::kRowBytes, z);
        }
    };
    const auto advance = [&](int step, int phase) {  // phase: step modulo kPeriod
        wait_copies<F::kAhead - 1>();
        __syncwarp();
#pragma unroll
        for (int r = 0; r < kStride; ++r)
            activate(step * kStride + r, (phase * kStride + r) % F::kRaw, (phase * kStride + r) % F::kRing);
        copy((phase + F::kAhead) % (F::kAhead + 1));
    };

    // --- rows of output ---
    float sums[F::kTiles][F::kLag][2][4] = {};
    float low[2][4] = {}, high[2][4] = {}, plain[2][4] = {};  // d' d of pixels 0-7 and 8-15, ones' d
    uint32_t origin[2] = {}, origins[F::kTiles][2][2];
    const uint32_t out_row = p.wo * p.c;
    const uint32_t leaving = ring + F::kLeaving + warp * 16 * kPixelBytes;
    const Rows leave(leaving + place(lane & 15, lane >> 4));
    const uint32_t leaving_out = kept(leaving + place(lane >> 1, half)),
                   leaving_t = kept(leaving + place(lane & 15, lane >> 4));

    const auto add_row = [&](int t, int ring_row, int fresh, int second, int third) {
        // Into which sums the row goes as first, second, third row of taps; -1: into none.
        const uint32_t row = ring_row * F::kRowBytes;
        uint32_t side[4];
        load_matrices(side, right[t] + row);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            uint32_t pair[4];
            load_matrices(pair, left[t][h] + row);
#pragma unroll
            for (int kh = 2; kh >= 0; --kh) {
                const int into = kh == 0 ? fresh : kh == 1 ? second : third;
                if (into < 0) continue;
                float (&sum)[4] = sums[t][into][h];
                if (kh == 0) sum[0] = sum[1] = sum[2] = sum[3] = 0;
                T::multiply(sum, pair[0], pair[1], pair[2], pair[3], taps[h][3 * kh], taps[h][3 * kh + 1], sum);
                T::multiply(sum, side[2 * h], side[2 * h + 1], taps[h][3 * kh + 2], sum);
            }
        }
    };
    const auto store = [&](int t, int which) {
        const float (&sum)[2][4] = sums[t][which];
        const uint32_t y[4] = {T::pack(sum[0][0], sum[0][1]), T::pack(sum[0][2], sum[0][3]),
                               T::pack(sum[1][0], sum[1][1]), T::pack(sum[1][2], sum[1][3])};
        const int here = t * kWarps * 16 * kPixelBytes;
        leave.store(here, y);
        __syncwarp();
        uint32_t m[4];
        load_transposed(m, leaving_t + here);
        store_if(stored[t], to[t], load_shared16(leaving_out + here));
        walk(to[t], out_row, t ? twos.z : twos.w);
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t d0 = T::subtract(m[2 * h], origins[t][h][0]),
                           d1 = T::subtract(m[2 * h + 1], origins[t][h][1]);
            // Rows 0-7 of the one and 8-15 of the other are what is wanted: no register is copied for it.
            T::multiply(low[h], d0, d1, d0, low[h]);
            T::multiply(high[h], d0, d1, d1, high[h]);
            T::multiply(plain[h], ones.x, ones.y, ones.z, ones.w, d0, d1, plain[h]);
        }
    };

#pragma unroll
    for (int i = 0; i < F::kAhead; ++i) copy(i);
    const int last = rows + F::kLag - 1;
    // The first row of outputs is complete after one period; it gives the origins, and none is stored before.
    int step = 0, stop = kept(uint32_t{F::kPeriod});
    for (bool done = false; !done;) {
#pragma unroll 1
        do {
#pragma unroll
            for (int phase = 0; phase < F::kPeriod; ++phase) {
                if (step >= F::kLag) {
                    store(0, phase);
                    if (second_out) store(F::kTiles - 1, phase);
                    if (step == last) {
                        done = true;
                        break;
                    }
                }
                advance(step, phase);
                // Writes the ring's row that was read before the last barrier at the latest.
                __syncthreads();
#pragma unroll
                for (int t = 0; t < F::kTiles; ++t) {
                    if (t == 1 && !second_out) break;
                    if constexpr (kStride == 1) {
                        add_row(t, phase, phase, (phase + 2) % 3, (phase + 1) % 3);
                    } else {
                        add_row(t, 2 * phase, phase, -1, (phase + 1) % 2);
                        add_row(t, 2 * phase + 1, -1, phase, -1);
                    }
                }
                ++step;
            }
        } while (!done && step != stop);
        if (step == stop) {
            stop = -1;
            const uint4 both = load_shared16(present_at);
            const uint32_t present[2][2] = {{both.x, both.y}, {both.z, both.w}};
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const float (&sum)[4] = sums[0][0][h];
                const uint32_t value = pixel < 8 ? T::pack(sum[0], sum[1]) : T::pack(sum[2], sum[3]);
                const uint32_t pair = __shfl_sync(~0u, value, 4 * (pixel & 7) + (lane >> 3));
                origin[h] = __byte_perm(pair, 0, lane & 4 ? 0x3232 : 0x1010);
#pragma unroll
                for (int t = 0; t < F::kTiles; ++t)
#pragma unroll
                    for (int r = 0; r < 2; ++r) origins[t][h][r] = origin[h] & present[t][r];
            }
        }
    }
    wait_copies<0>();
    __syncthreads();

    // The warps' parts, merged in their order.
    float* counts = reinterpret_cast<float*>(shared);
    float *means = counts + kWarps, *m2s = means + kWarps * kSlab;
    const float n = static_cast<float>(pixels * rows);
    if (lane == 0) counts[warp] = n;
    if (const int g = lane >> 2; (lane & 3) == g >> 1) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const float total = g & 1 ? plain[h][1] : plain[h][0],
                        squares = g & 1 ? low[h][1] + high[h][3] : low[h][0] + high[h][2];
            const float share = n > 0 ? __fdividef(total, n) : 0.f, m2 = fmaf(-total, share, squares);
            means[warp * kSlab + 8 * h + g] = T::low(origin[h]) + share;
            m2s[warp * kSlab + 8 * h + g] = m2 < 0 ? 0.f : m2;
        }
    }
    __syncthreads();
    if (tid < kSlab && tid < channels) {
        float count = 0, mean = 0, m2 = 0;
        for (int i = 0; i < kWarps; ++i)
            if (counts[i] > 0) merge_moments(count, mean, m2, counts[i], means[i * kSlab + tid], m2s[i * kSlab + tid]);
        float* moments = p.moments + int64_t{3} * at.part * p.c + channel0 + tid;
        moments[0] = count, moments[p.c] = mean, moments[2 * p.c] = m2;
    }
}

}  // namespace

#define MBV2_KERNEL(NAME, T, STRIDE, NORMALISE)                                                                 \
    extern "C" __global__ void __launch_bounds__(kThreads, 3) NAME(const __grid_constant__ DepthwiseParams p) { \
        MBV2_BODY((depthwise<T, STRIDE, NORMALISE>(p));)                                                        \
    }                                                                                                           \
    MBV2_SHARED(NAME, Forward<STRIDE>::kSharedBytes)

#define MBV2_KERNELS(KIND, T)                              \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s1_x, T, 1, false) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s2_x, T, 2, false) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s1_bn, T, 1, true) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s2_bn, T, 2, true)

MBV2_KERNELS(float16, Half)
MBV2_KERNELS(bfloat16, BFloat16)

// By bn or not.
#define MBV2_CHOICE(KIND, STRIDE)                                                       \
    {normalise ? reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s##STRIDE##_bn) \
               : reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s##STRIDE##_x), \
     Forward<STRIDE>::kSharedBytes}

DepthwiseKernel depthwise_kernel(DepthwiseType type, int stride, bool normalise) {
    if (type == kFloat16) {
        if (stride == 1) return MBV2_CHOICE(float16, 1);
        return MBV2_CHOICE(float16, 2);
    }
    if (stride == 1) return MBV2_CHOICE(bfloat16, 1);
    return MBV2_CHOICE(bfloat16, 2);
}

}  // namespace cuda
}  // namespace mbv2
