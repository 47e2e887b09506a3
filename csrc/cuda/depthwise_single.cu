// Training depthwise 3x3 in float32, forward and backward (see depthwise_forward.cu and depthwise_backward.cu for what
// they compute). Tensor cores have no product of float32 that is exact enough, and the multiply-adds, 9 or 18 a value,
// are most of the instructions: a thread owns two channels of kColumns neighbouring columns in registers and walks down
// a strip of rows, so that no value is exchanged between threads and the columns around its own come from L1.
#include "depthwise_device.cuh"
#include "depthwise_kernels.h"

namespace mbv2 {
namespace cuda {
namespace {

constexpr int kColumns = 4, kLanes = kSlab / 2, kGroups = kThreads / kLanes;

// As torch's relu6 on a GPU: NaN stays NaN.
__device__ __forceinline__ float relu6(float z, float cap) {
    float v;
    asm("{.reg .f32 t; max.NaN.f32 t, %1, 0f00000000; min.NaN.f32 %0, t, %2;}" : "=f"(v) : "f"(z), "f"(cap));
    return v;
}

// What a thread works on: its group of columns (`column` is the first), its channels, and where they are.
struct Thread {
    int lane, group, channel, column;
    bool works;
    int64_t image;

    __device__ __forceinline__ Thread(const Place& at, int c)
        : lane(threadIdx.x % kLanes), group(threadIdx.x / kLanes), channel(at.slab * kSlab + 2 * lane) {
        works = group < at.groups && channel < c;
        column = at.chunk(group) * kColumns;
        image = at.image0 + at.image(group);
    }
};

__device__ __forceinline__ float2 load_pair(const float* from, bool there) {
    return there ? *reinterpret_cast<const float2*>(from) : make_float2(0.f, 0.f);
}

__device__ __forceinline__ void load_pair(float (&v)[2], const float* from, bool there) {
    const float2 both = load_pair(from, there);
    v[0] = both.x, v[1] = both.y;
}

template <bool kNormalise>
struct BatchNorm {
    float scale[2] = {}, shift[2] = {}, mean[2] = {};
    __device__ __forceinline__ BatchNorm(const float* bn, int c, int channel, bool there) {
        if constexpr (!kNormalise) return;
        load_pair(scale, bn + kScale * c + channel, there);
        load_pair(shift, bn + kShift * c + channel, there);
        load_pair(mean, bn + kMean * c + channel, there);
    }
    __device__ __forceinline__ float normalised(float v, int e) const { return fmaf(v, scale[e], shift[e]); }
    __device__ __forceinline__ float activated(float v, int e, bool there) const {
        return kNormalise ? relu6(normalised(v, e), there ? 6.f : 0.f) : v;
    }
};

__device__ __forceinline__ void load_weights(float (&taps)[9][2], const void* weight, int channel, bool there) {
    const float* w = static_cast<const float*>(weight) + 9 * channel;
#pragma unroll
    for (int t = 0; t < 9; ++t)
#pragma unroll
        for (int e = 0; e < 2; ++e) taps[t][e] = there ? w[9 * e + t] : 0.f;
}

template <int kStride, bool kNormalise>
__device__ __forceinline__ void forward(const DepthwiseParams& p) {
    constexpr int kWide = kStride * (kColumns - 1) + 3, kPeriod = kStride == 1 ? 3 : 2;
    const Place at(p.cut, p.n, p.c, p.ho);
    const Thread mine(at, p.c);
    const BatchNorm<kNormalise> bn(p.bn, p.c, mine.channel, mine.works);
    float taps[9][2];
    load_weights(taps, p.weight, mine.channel, mine.works);
    const int rows = at.bottom - at.top, above = at.top * kStride - 1, first = mine.column * kStride - 1;
    bool there[kWide], stored[kColumns];
#pragma unroll
    for (int j = 0; j < kWide; ++j) there[j] = mine.works && first + j >= 0 && first + j < p.w;
#pragma unroll
    for (int j = 0; j < kColumns; ++j) stored[j] = mine.works && mine.column + j < p.wo;
    const float* x = static_cast<const float*>(p.x) + ((mine.image * p.h + above) * p.w + first) * p.c + mine.channel;
    float* y = static_cast<float*>(p.y) + ((mine.image * p.ho + at.top) * p.wo + mine.column) * p.c + mine.channel;
    const int64_t x_row = int64_t{1} * p.w * p.c, y_row = int64_t{1} * p.wo * p.c;

    float raw[kWide][2];  // of the next row
    int next = 0;
    const auto load = [&] {
        const bool inside = above + next >= 0 && above + next < p.h && next < (rows - 1) * kStride + 3;
#pragma unroll
        for (int j = 0; j < kWide; ++j) load_pair(raw[j], x + int64_t{j} * p.c, inside && there[j]);
        x += x_row, ++next;
    };
    float value[kWide][2];
    const auto activate = [&] {  // and load the row after it
        const bool inside = above + next - 1 >= 0 && above + next - 1 < p.h;
#pragma unroll
        for (int j = 0; j < kWide; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) value[j][e] = bn.activated(raw[j][e], e, inside && there[j]);
        load();
    };
    float sums[kPeriod][kColumns][2] = {};
    const auto add = [&](int into, int kh) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j)
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                float sum = kh == 0 ? 0.f : sums[into][j][e];
#pragma unroll
                for (int kw = 0; kw < 3; ++kw) sum = fmaf(value[kStride * j + kw][e], taps[3 * kh + kw][e], sum);
                sums[into][j][e] = sum;
            }
    };
    // Of the thread's values y, with the first of them as origin.
    float origin[2] = {}, total[2] = {}, squares[2] = {};
    const auto store = [&](int which, bool begins) {
#pragma unroll
        for (int e = 0; e < 2; ++e)
            if (begins) origin[e] = sums[which][0][e];
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
            const float (&sum)[2] = sums[which][j];
            if (stored[j]) *reinterpret_cast<float2*>(y + int64_t{j} * p.c) = make_float2(sum[0], sum[1]);
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                const float d = stored[j] ? sum[e] - origin[e] : 0.f;
                total[e] += d;
                squares[e] = fmaf(d, d, squares[e]);
            }
        }
        y += y_row;
    };

    load();
    for (int step = 0, last = rows + (kStride == 1 ? 2 : 1); step < last;) {
#pragma unroll
        for (int phase = 0; phase < kPeriod; ++phase) {
            activate();
            if constexpr (kStride == 1) {
                add((phase + 1) % 3, 2);
                add((phase + 2) % 3, 1);
                add(phase, 0);
                if (step >= 2) store((phase + 1) % 3, step == 2);
            } else {
                add((phase + 1) % 2, 2);
                add(phase, 0);
                if (step >= 1) store((phase + 1) % 2, step == 1);
                activate();
                add(phase, 1);
            }
            if (++step == last) break;
        }
    }

    __shared__ float counts[kGroups], means[kGroups][kSlab], m2s[kGroups][kSlab];
    const float n = mine.group < at.groups ? static_cast<float>(min(p.wo - mine.column, kColumns) * rows) : 0.f;
    if (mine.lane == 0) counts[mine.group] = n;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const float share = n > 0 ? total[e] / n : 0.f, m2 = fmaf(-total[e], share, squares[e]);
        means[mine.group][2 * mine.lane + e] = origin[e] + share;
        m2s[mine.group][2 * mine.lane + e] = m2 < 0 ? 0.f : m2;
    }
    __syncthreads();
    const int i = threadIdx.x, channel = at.slab * kSlab + i;
    if (i < kSlab && channel < p.c) {
        float count = 0, mean = 0, m2 = 0;
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g)
            if (counts[g] > 0) merge_moments(count, mean, m2, counts[g], means[g][i], m2s[g][i]);
        float* moments = p.moments + int64_t{3} * at.part * p.c + channel;
        moments[0] = count, moments[p.c] = mean, moments[2 * p.c] = m2;
    }
}

template <int kStride, bool kNormalise>
__device__ __forceinline__ void backward(const DepthwiseBackwardParams& p) {
    constexpr int kLead = kStride == 1 ? 2 : 1;                   // rows of dy2 that a row of y1 waits for
    constexpr int kPeriod = kLead + 1, kWide = kColumns + kLead;  // rows and columns of dy2 in registers
    const Place at(p.cut, p.n, p.c, p.ho);
    const Thread mine(at, p.c);
    const BatchNorm<kNormalise> bn(p.bn, p.c, mine.channel, mine.works);
    float taps[9][2], coef[3][2];
    load_weights(taps, p.weight, mine.channel, mine.works);
#pragma unroll
    for (int k = 0; k < 3; ++k) load_pair(coef[k], p.coef + k * p.c + mine.channel, mine.works);
    const int rows = at.bottom - at.top, above = at.top + 1 - kLead, first = mine.column + 1 - kLead;
    const int64_t dy_at = ((mine.image * p.ho + above) * p.wo + first) * p.c + mine.channel;
    const float *dz2 = static_cast<const float*>(p.dz2) + dy_at, *y2 = static_cast<const float*>(p.y2) + dy_at;
    const int64_t y1_at = ((mine.image * p.h + at.top * kStride) * p.w + mine.column * kStride) * p.c + mine.channel;
    const float* y1 = static_cast<const float*>(p.y1) + y1_at;
    float* dz1 = static_cast<float*>(p.dz1) + y1_at;
    const int64_t dy_row = int64_t{1} * p.wo * p.c, y1_row = int64_t{1} * p.w * p.c;
    const bool need_input = p.dz1 != nullptr, need_weight = p.dweight != nullptr;
    bool there[kWide];
#pragma unroll
    for (int j = 0; j < kWide; ++j) there[j] = mine.works && first + j >= 0 && first + j < p.wo;

    float dy[kPeriod][kWide][2];
    const auto load = [&](int row, int into) {
        const bool inside = above + row >= 0 && above + row < p.ho;
#pragma unroll
        for (int j = 0; j < kWide; ++j) {
            const bool wanted = inside && there[j];
            const float2 g = load_pair(dz2 + int64_t{j} * p.c, wanted), y = load_pair(y2 + int64_t{j} * p.c, wanted);
            dy[into][j][0] = wanted ? fmaf(g.x, coef[0][0], fmaf(y.x, coef[1][0], coef[2][0])) : 0.f;
            dy[into][j][1] = wanted ? fmaf(g.y, coef[0][1], fmaf(y.y, coef[1][1], coef[2][1])) : 0.f;
        }
        dz2 += dy_row, y2 += dy_row;
    };
    float dw[9][2] = {}, plain[2] = {}, centred[2] = {};
    // Position (a, b) of a quad (stride 1: the only one) of column j: tap (kh, kw) leads to the dy2 at an offset.
    const auto work = [&](int phase, int a, int b, int j) {
        const int64_t ahead = a * y1_row + int64_t{kStride * j + b} * p.c;
        const bool inside = mine.works && mine.column + j < p.wo && (mine.column + j) * kStride + b < p.w;
        float value[2] = {};
        if (need_weight || kNormalise) load_pair(value, y1 + ahead, inside);
        float out[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            const float act = bn.activated(value[e], e, inside);
            float da = 0;
#pragma unroll
            for (int kh = 0; kh < 3; ++kh) {
                if ((a + 1 - kh) % kStride) continue;
#pragma unroll
                for (int kw = 0; kw < 3; ++kw) {
                    if ((b + 1 - kw) % kStride) continue;
                    // Rows and columns of the window: from the one before (stride 1), or the position's own, on.
                    const int line = (a + 1 - kh) / kStride + kLead - 1, place = (b + 1 - kw) / kStride + kLead - 1;
                    const float d = dy[(phase + 1 + line) % kPeriod][j + place][e];
                    da = fmaf(d, taps[3 * kh + kw][e], da);
                    if (need_weight) dw[3 * kh + kw][e] = fmaf(act, d, dw[3 * kh + kw][e]);
                }
            }
            if constexpr (kNormalise) {
                const float z = bn.normalised(value[e], e);
                // As torch's hardtanh_backward on a GPU: a NaN lets the gradient through.
                if (z <= 0.f || z >= 6.f || !inside) da = 0;
                plain[e] += da;
                centred[e] = fmaf(da, value[e] - bn.mean[e], centred[e]);
            }
            out[e] = da;
        }
        if (need_input && inside) *reinterpret_cast<float2*>(dz1 + ahead) = make_float2(out[0], out[1]);
    };

    for (int row = 0, last = rows + kLead; row < last;) {
#pragma unroll
        for (int phase = 0; phase < kPeriod; ++phase) {
            load(row, phase);
            if (row >= kLead) {
#pragma unroll
                for (int a = 0; a < kStride; ++a) {
                    if (a == 1 && 2 * (at.top + row - kLead) + 1 >= p.h) break;
#pragma unroll
                    for (int j = 0; j < kColumns; ++j)
#pragma unroll
                        for (int b = 0; b < kStride; ++b) work(phase, a, b, j);
                }
                y1 += kStride * y1_row, dz1 += kStride * y1_row;
            }
            if (++row == last) break;
        }
    }

    // Parts of the block, added in the groups' order: nine taps, then the two sums.
    __shared__ float parts[kGroups][11][kSlab];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
        const int i = 2 * mine.lane + e;
#pragma unroll
        for (int t = 0; t < 9; ++t) parts[mine.group][t][i] = dw[t][e];
        parts[mine.group][9][i] = plain[e], parts[mine.group][10][i] = centred[e];
    }
    __syncthreads();
    for (int i = threadIdx.x; i < 11 * kSlab; i += kThreads) {
        const int row = i / kSlab, channel = at.slab * kSlab + i % kSlab;
        if (channel >= p.c) continue;
        float sum = 0;
#pragma unroll 1
        for (int g = 0; g < kGroups; ++g) sum += parts[g][row][i % kSlab];
        if (row >= 9) {
            if (kNormalise && need_input) p.sums[(int64_t{2} * at.part + row - 9) * p.c + channel] = sum;
        } else if (need_weight) {
            p.dweight[(int64_t{1} * at.part * p.c + channel) * 9 + row] = sum;
        }
    }
}

}  // namespace

#define MBV2_KERNEL(NAME, BODY, PARAMS)                                                                \
    extern "C" __global__ void __launch_bounds__(kThreads, 3) NAME(const __grid_constant__ PARAMS p) { \
        MBV2_BODY(BODY(p);)                                                                            \
    }                                                                                                  \
    MBV2_SHARED(NAME, 0)

#define MBV2_KERNELS(STRIDE, SUFFIX, NORMALISE)                                                             \
    MBV2_KERNEL(mbv2_depthwise_float32_s##STRIDE##_##SUFFIX, (forward<STRIDE, NORMALISE>), DepthwiseParams) \
    MBV2_KERNEL(mbv2_depthwise_backward_float32_s##STRIDE##_##SUFFIX, (backward<STRIDE, NORMALISE>),        \
                DepthwiseBackwardParams)

MBV2_KERNELS(1, x, false)
MBV2_KERNELS(2, x, false)
MBV2_KERNELS(1, bn, true)
MBV2_KERNELS(2, bn, true)

#define MBV2_CHOICE(STAGE, STRIDE)                                                     \
    {normalise ? reinterpret_cast<const void*>(&mbv2_##STAGE##_float32_s##STRIDE##_bn) \
               : reinterpret_cast<const void*>(&mbv2_##STAGE##_float32_s##STRIDE##_x), \
     0}

DepthwiseKernel depthwise_single_kernel(int stride, bool normalise) {
    if (stride == 1) return MBV2_CHOICE(depthwise, 1);
    return MBV2_CHOICE(depthwise, 2);
}

DepthwiseKernel depthwise_backward_single_kernel(int stride, bool normalise) {
    if (stride == 1) return MBV2_CHOICE(depthwise_backward, 1);
    return MBV2_CHOICE(depthwise_backward, 2);
}

}  // namespace cuda
}  // namespace mbv2
