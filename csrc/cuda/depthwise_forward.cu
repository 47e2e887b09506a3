// Training depthwise 3x3: y = conv(relu6(bn(x))), zeros around the activation, with the moments of the rounded y.
//
// A block owns 16 * kSlabs channels and up to kOutputs neighbouring output columns, and walks down a strip of rows.
// Rows of x arrive through cp.async, kAhead of them at a time; every value is normalised, clamped and rounded once, by
// the thread that fetched it, into a ring of activated rows. 16-bit types are multiplied on the tensor cores: a tap is
// a diagonal matrix of eight channels' weights, two taps make one m16n8k16 product of 16 pixels, so that nine
// multiply-adds a value cost 5/4 of an instruction instead of nine. Products are exact and sums float32, as in CUDA
// cores; the price is that a NaN reaches all eight channels of its matrix (0 * NaN). float32 uses CUDA cores.
//
// Statistics: y and (y - origin)^2 are added up, origin one of the warp's first values of each channel; for 16-bit
// types again on the tensor cores, as ones' y and the diagonal of d' d. The difference of two 16-bit values is exact
// where they lie within a factor of two of each other, else it is rounded once. As the origin is one of the values, the
// sum of squares is at most (n + 1) M2, and what the subtraction at the end can lose is n * 2^-24 of M2.
#include "depthwise_device.cuh"

namespace mbv2 {
namespace cuda {
namespace {

template <class T, int kStride, bool kNormalise, int kSlabs>
struct Forward {
    using R = Row<T, kSlabs>;
    static constexpr int kPixels = T::kPacked ? 128 : 64;  // of a row in shared memory, the columns around it included
    static constexpr int kOutputs = kPixels / kStride;
    static constexpr int kLoads = kPixels / R::kPixelsAtOnce;  // of a thread, a row
    static constexpr int kRing = 3 + kStride, kAhead = 2;
    static constexpr int kPeriod = kStride == 1 ? 4 : 5;  // output rows after which both rings are where they were
    static_assert(kPeriod * kStride % kRing == 0 && kPeriod * kStride % kAhead == 0);
    // Three zero pixels behind the others stand for what is not there.
    static constexpr int kRowBytes = (kPixels + 3) * R::kPitch;
    static constexpr int kRawRow = kLoads * R::kThreads * 16;
    static constexpr int kTables = kRing * kRowBytes + kAhead * kRawRow;
    static constexpr int kSharedBytes = kTables + 3 * kOutputs * 4;
    static constexpr int kParts = T::kPacked ? kRowWarps : 8 * kRowWarps;  // of the block's statistics
    static_assert(kParts * (2 * R::kChannels + 1) * 4 <= kRing * kRowBytes, "the statistics fit over the ring");

    // --- what a thread fetches ---
    const char* x_row;
    uint32_t from[kLoads];  // elements from the row's start, or kNowhere
    uint32_t to[kLoads];    // bytes from a ring row's start
    float scale[R::kPerVector], shift[R::kPerVector];

    __device__ __forceinline__ void fetch(uint32_t raw, bool inside) const {
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
            if (inside && from[k] != kNowhere)
                copy_async(raw + k * R::kThreads * 16, x_row + static_cast<int64_t>(from[k]) * R::kItem);
        commit_copies();
    }

    __device__ __forceinline__ uint4 activated(uint4 v) const {
        if constexpr (!kNormalise) {
            return v;
        } else {
            uint32_t* word = reinterpret_cast<uint32_t*>(&v);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                if constexpr (T::kPacked) {
                    const float low = fmaf(T::low(word[i]), scale[2 * i], shift[2 * i]);
                    const float high = fmaf(T::high(word[i]), scale[2 * i + 1], shift[2 * i + 1]);
                    word[i] = T::minimum(T::pack_relu(low, high), T::kSixes);
                } else {
                    word[i] = __float_as_uint(relu6(fmaf(bits_float(word[i]), scale[i], shift[i])));
                }
            }
            return v;
        }
    }

    __device__ __forceinline__ void activate(uint32_t raw, uint32_t ring_row, bool inside) const {
#pragma unroll
        for (int k = 0; k < kLoads; ++k)
            if (from[k] != kNowhere)
                R::put(ring_row + to[k], inside ? activated(load_shared16(raw + k * R::kThreads * 16)) : uint4{});
    }
};

// Sums over pixels of y and of d^2, d = y - origin, of the channels of a warp.
template <class T>
struct Moments {
    // 16-bit types: the origin, twice, of the channel on the lane's diagonal; and those of the lane's own channels,
    // which stand in for pixels that are not there.
    uint32_t origin[2] = {}, filler[2] = {};
    float low[2][4] = {}, high[2][4] = {}, sums[2][4] = {};  // d' d of pixels 0-7 and 8-15, ones' y
    uint32_t ones = kept(T::kOnes);
    float first[4] = {}, total[4] = {}, squares[4] = {};  // float32
    float count = 0;                                      // float32: of the lane
    bool begun = false;                                   // float32

    // The origins are channels' values of `pixel` of a tile.
    __device__ __forceinline__ void begin(const float (&values)[2][4], int pixel, int lane) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t low = T::pack(values[h][0], values[h][1]), high = T::pack(values[h][2], values[h][3]);
            const uint32_t value = pixel < 8 ? low : high;
            filler[h] = __shfl_sync(~0u, value, 4 * (pixel & 7) + (lane & 3));
            const uint32_t pair = __shfl_sync(~0u, value, 4 * (pixel & 7) + (lane >> 3));
            origin[h] = __byte_perm(pair, 0, lane & 4 ? 0x3232 : 0x1010);
        }
    }

    // 16-bit types: y[h][r] is of the two channels 4 j + 2 h + {0, 1} of pixel g + 8 r, lane = 4 g + j.
    __device__ __forceinline__ void add(const uint32_t (&y)[2][2]) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const uint32_t y0 = transposed(y[h][0]), y1 = transposed(y[h][1]);
            const uint32_t d0 = T::subtract(y0, origin[h]), d1 = T::subtract(y1, origin[h]);
            // Rows 0-7 of the one and 8-15 of the other are what is wanted: no register is copied for it.
            T::multiply(low[h], d0, d1, d0);
            T::multiply(high[h], d0, d1, d1);
            T::multiply(sums[h], ones, ones, ones, ones, y0, y1);
        }
    }

    __device__ __forceinline__ void add(const float (&y)[4]) {
        if (!begun) {
            begun = true;
#pragma unroll
            for (int i = 0; i < 4; ++i) first[i] = y[i];
        }
        count += 1;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float d = y[i] - first[i];
            total[i] += d;
            squares[i] = fmaf(d, d, squares[i]);
        }
    }

    // Leaves mean and M2 of the `n` values of each channel of the warp, to which `filled` were added (float32: of the
    // lane).
    __device__ __forceinline__ void leave(float* mean, float* m2, float n, float filled, int lane) const {
        const int g = lane >> 2, j = lane & 3;
        if (n == 0) return;
        if constexpr (T::kPacked) {
            if (j != g >> 1) return;  // the diagonal
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int channel = 4 * j + 2 * h + (g & 1);
                const float o = T::low(origin[h]), m = fmaf(-filled, o, g & 1 ? sums[h][1] : sums[h][0]) / n,
                            off = m - o;
                mean[channel] = m;
                m2[channel] = positive(fmaf(-n * off, off, g & 1 ? low[h][1] + high[h][3] : low[h][0] + high[h][2]));
            }
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float share = total[i] / n;
                mean[4 * j + i] = first[i] + share;
                m2[4 * j + i] = positive(fmaf(-total[i], share, squares[i]));
            }
        }
    }

    static __device__ __forceinline__ float positive(float v) { return v < 0 ? 0.f : v; }
};

template <class T, int kStride, bool kNormalise, int kSlabs>
__device__ __forceinline__ void depthwise(const DepthwiseParams& p) {
    using F = Forward<T, kStride, kNormalise, kSlabs>;
    using R = typename F::R;
    extern __shared__ uint4 shared[];
    const Place at(p.cut, p.n, p.c, p.ho);
    const int tid = threadIdx.x, lane = tid & 31, row_warp = (tid >> 5) % kRowWarps;
    const int slab_warp = tid / (32 * kRowWarps);
    const int channel0 = at.slab * R::kChannels;
    const int64_t image0 = at.image0;
    const unsigned columns = p.cut.columns, wide = (columns - 1) * kStride + 3;
    const uint32_t ring = shared_address(shared), raw = ring + F::kRing * F::kRowBytes + tid * 16;
    // Of every output column of the block: where its columns of taps are in a ring's row, and where it is in an image.
    const uint32_t first = ring + F::kTables, second = first + 4 * F::kOutputs, out = second + 4 * F::kOutputs;

    F f;
    const int q = tid % R::kVectors, channel_q = channel0 + q * R::kPerVector;
    const int odd = p.cut.groups * (columns + 1);  // at stride 2 odd columns lie behind the even ones
#pragma unroll
    for (int k = 0; k < F::kLoads; ++k) {
        const unsigned pixel = tid / R::kVectors + k * R::kPixelsAtOnce, group = pixel / wide, i = pixel - group * wide;
        const int column = at.chunk(group) * columns * kStride - 1 + i;
        const bool inside = group < at.groups && column >= 0 && column < p.w && channel_q < p.c;
        const int position = kStride == 1 ? pixel
                             : i & 1      ? odd + group * columns + i / 2
                                          : group * (columns + 1) + i / 2;
        f.to[k] = position * R::kPitch + R::place(q);
        f.from[k] = kNowhere;
        if (inside) {
            f.from[k] = (at.image(group) * p.h * p.w + column) * p.c + channel_q;
        } else if (group < p.cut.groups) {
            for (int r = 0; r < F::kRing; ++r) R::put(ring + r * F::kRowBytes + f.to[k], uint4{});
        }
    }
    for (int i = tid; i < F::kRing * (3 * R::kPitch / 16); i += R::kThreads) {
        const int r = i / (3 * R::kPitch / 16), place = i % (3 * R::kPitch / 16);
        store_shared16(ring + r * F::kRowBytes + F::kPixels * R::kPitch + 16 * place, uint4{});
    }
    for (int v = tid; v < F::kOutputs; v += R::kThreads) {
        const unsigned group = v / columns, i = v - group * columns;
        const int column = at.chunk(group) * columns + i;
        const bool there = group < at.groups && column < p.wo;
        const unsigned zero = F::kPixels * R::kPitch;
        const uint32_t c0 = !there ? zero : (kStride == 1 ? group * wide + i : group * (columns + 1) + i) * R::kPitch;
        store_shared4(first + 4 * v, c0);
        if (kStride == 2) store_shared4(second + 4 * v, there ? (odd + group * columns + i) * R::kPitch : zero);
        store_shared4(out + 4 * v, there ? (at.image(group) * p.ho * p.wo + column) * p.c : kNowhere);
    }
    if constexpr (kNormalise) {
#pragma unroll
        for (int i = 0; i < R::kPerVector; ++i) {
            const bool there = channel_q + i < p.c;
            f.scale[i] = there ? p.bn[kScale * p.c + channel_q + i] : 0.f;
            f.shift[i] = there ? p.bn[kShift * p.c + channel_q + i] : 0.f;
        }
    }
    const int channel_warp = channel0 + 16 * slab_warp, channel = channel_warp + 4 * (lane & 3);
    Taps<T, kStride, R::kPitch> taps;
    taps.template load<false>(static_cast<const char*>(p.weight) + int64_t{9} * channel_warp * R::kItem, lane,
                              p.c - channel_warp);

    const int64_t row_bytes = static_cast<int64_t>(p.w) * p.c * R::kItem;
    const int above = at.top * kStride - 1, rows_in = (at.bottom - at.top - 1) * kStride + 3;
    const int first_row = above < 0 ? 1 : 0, last_row = min(rows_in, p.h - above);  // of those, the image's
    f.x_row = static_cast<const char*>(p.x) + (image0 * p.h + above) * row_bytes;
    int t = 0;  // the next input row to activate
#pragma unroll
    for (int i = 0; i < F::kAhead; ++i, f.x_row += row_bytes)
        f.fetch(raw + i * F::kRawRow, i >= first_row && i < last_row);
    const auto advance = [&](int row) {  // row: t, or what is left of it after whole periods
        const uint32_t raw_row = raw + row % F::kAhead * F::kRawRow;
        wait_copies<F::kAhead - 1>();
        f.activate(raw_row, ring + row % F::kRing * F::kRowBytes, t >= first_row && t < last_row);
        f.fetch(raw_row, t + F::kAhead < last_row);
        f.x_row += row_bytes;
        ++t;
    };
#pragma unroll
    for (int i = 0; i < 3; ++i) advance(i);

    const int64_t out_bytes = static_cast<int64_t>(p.wo) * p.c * R::kItem;
    char* y_row = static_cast<char*>(p.y) + ((image0 * p.ho + at.top) * p.wo * p.c + channel) * R::kItem;
    const int tiles = (at.groups * columns + 15) / 16;
    const uint32_t slab = ring + 32 * slab_warp;
    Moments<T> moments;
    int pixels = 0, filled = 0;  // of the warp's tiles, those that are there and the others
    __syncthreads();
    if constexpr (T::kPacked) {
#pragma unroll 1
        for (int tile = row_warp; tile < tiles; tile += kRowWarps) {
            const unsigned there =
                __ballot_sync(~0u, load_shared4(out + 64 * tile + 4 * (lane & 15)) != kNowhere) & 0xffff;
            if (there && pixels == 0) {
                const uint32_t rows[3] = {slab, slab + F::kRowBytes, slab + 2 * F::kRowBytes};
                float sums[2][4] = {};
                taps.apply(sums, rows, first + 64 * tile, second + 64 * tile, lane);
                moments.begin(sums, __ffs(there) - 1, lane);
            }
            pixels += __popc(there);
            filled += 16 - __popc(there);
        }
    }
    const bool writes = channel < p.c;
    for (int oh = at.top; oh < at.bottom;) {
#pragma unroll
        for (int phase = 0; phase < F::kPeriod; ++phase) {
            uint32_t rows[3];
#pragma unroll
            for (int i = 0; i < 3; ++i) rows[i] = slab + (phase * kStride + i) % F::kRing * F::kRowBytes;
#pragma unroll 1
            for (int tile = row_warp; tile < tiles; tile += kRowWarps) {
                float sums[2][4] = {};
                taps.apply(sums, rows, first + 64 * tile, second + 64 * tile, lane);
                const uint32_t place = out + 64 * tile + (lane & 28);
                const uint32_t to[2] = {load_shared4(place), load_shared4(place + 32)};
                if constexpr (T::kPacked) {
                    uint32_t y[2][2];
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        // Where a pixel is not there, the origin in its place adds nothing to the squares.
                        const bool there = to[r] != kNowhere;
#pragma unroll
                        for (int h = 0; h < 2; ++h)
                            y[h][r] = there ? T::pack(sums[h][2 * r], sums[h][2 * r + 1]) : moments.filler[h];
                        store_if(there && writes, y_row + uint64_t{2} * to[r], y[0][r], y[1][r]);
                    }
                    moments.add(y);
                } else {
#pragma unroll
                    for (int r = 0; r < 2; ++r) {
                        if (to[r] == kNowhere) continue;
                        const float y[4] = {sums[0][2 * r], sums[0][2 * r + 1], sums[1][2 * r], sums[1][2 * r + 1]};
                        if (writes)
                            *reinterpret_cast<float4*>(y_row + uint64_t{4} * to[r]) =
                                make_float4(y[0], y[1], y[2], y[3]);
                        moments.add(y);
                    }
                }
            }
            if (++oh == at.bottom) break;
            // Into rows that no warp reads any more since the last barrier.
#pragma unroll
            for (int i = 0; i < kStride; ++i) advance(3 + phase * kStride + i);
            y_row += out_bytes;
            __syncthreads();
        }
    }
    wait_copies<0>();
    __syncthreads();

    // The parts of the block, merged in their order.
    float* counts = reinterpret_cast<float*>(shared);
    float *means = counts + F::kParts, *m2s = means + F::kParts * R::kChannels;
    const int part = T::kPacked ? row_warp : row_warp * 8 + (lane >> 2);
    const float n = T::kPacked ? static_cast<float>(pixels * (at.bottom - at.top)) : moments.count;
    const int offset = part * R::kChannels + 16 * slab_warp;
    moments.leave(means + offset, m2s + offset, n, static_cast<float>(filled * (at.bottom - at.top)), lane);
    if ((T::kPacked ? lane : lane & 3) == 0 && slab_warp == 0) counts[part] = n;
    __syncthreads();
    if (tid < R::kChannels && channel0 + tid < p.c) {
        float count = 0, mean = 0, m2 = 0;
        for (int i = 0; i < F::kParts; ++i)
            if (counts[i] > 0)
                merge_moments(count, mean, m2, counts[i], means[i * R::kChannels + tid], m2s[i * R::kChannels + tid]);
        float* moments_out = p.moments + int64_t{3} * at.part * p.c + channel0 + tid;
        moments_out[0] = count, moments_out[p.c] = mean, moments_out[2 * p.c] = m2;
    }
}

}  // namespace

#define MBV2_KERNEL(NAME, T, STRIDE, NORMALISE, SLABS)                            \
    extern "C" __global__ void __launch_bounds__(128 * SLABS, T::kPacked ? 4 : 3) \
        NAME(const __grid_constant__ DepthwiseParams p) {                         \
        MBV2_BODY((depthwise<T, STRIDE, NORMALISE, SLABS>(p));)                   \
    }                                                                             \
    MBV2_SHARED(NAME, (Forward<T, STRIDE, NORMALISE, SLABS>::kSharedBytes))

#define MBV2_KERNELS(KIND, T)                                  \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s1_x1, T, 1, false, 1) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s2_x1, T, 2, false, 1) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s1_bn1, T, 1, true, 1) \
    MBV2_KERNEL(mbv2_depthwise_##KIND##_s2_bn1, T, 2, true, 1)

MBV2_KERNELS(float16, Half)
MBV2_KERNELS(bfloat16, BFloat16)
MBV2_KERNELS(float32, Single)

namespace {

template <class T, int kStride>
const char* launch(const DepthwiseParams& p, const void* normalised, const void* plain, cudaStream_t stream) {
    using F = Forward<T, kStride, true, 1>;
    const void* kernel = p.bn ? normalised : plain;
    const int64_t blocks = depthwise_blocks(p.n, p.c, p.cut);
    if (blocks == 0) return nullptr;
    if (blocks > INT32_MAX) return "more blocks than a launch can have";
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, F::kSharedBytes);
    if (error == cudaSuccess) {
        void* arguments[] = {const_cast<DepthwiseParams*>(&p)};
        error = cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(F::R::kThreads), arguments,
                                 F::kSharedBytes, stream);
    }
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

#define MBV2_LAUNCH(KIND, T)                                                                                  \
    return stride == 1 ? launch<T, 1>(params, reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s1_bn1), \
                                      reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s1_x1), stream)  \
                       : launch<T, 2>(params, reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s2_bn1), \
                                      reinterpret_cast<const void*>(&mbv2_depthwise_##KIND##_s2_x1), stream)

const char* launch_depthwise(const DepthwiseParams& params, DepthwiseType type, int stride, cudaStream_t stream) {
    switch (type) {
        case kFloat16:
            MBV2_LAUNCH(float16, Half);
        case kBFloat16:
            MBV2_LAUNCH(bfloat16, BFloat16);
        default:
            MBV2_LAUNCH(float32, Single);
    }
}

}  // namespace cuda
}  // namespace mbv2
