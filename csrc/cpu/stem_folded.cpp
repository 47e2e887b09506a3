#include "stem_folded.h"

#include <algorithm>
#include <cstdint>

#include "isa.h"
#include "network_block.h"
#include "network_pack.h"

namespace mbv2::cpu {
namespace {

// Planes [vectors][pixels][lanes] -> [pixels][outputs].
void interleave(const float* planes, int64_t pixels, int64_t lanes, int64_t outputs, float* y) {
    for (int64_t x = 0; x < pixels; ++x, planes += lanes, y += outputs) {
        for (int64_t c = 0; c < outputs; c += lanes) {
            std::copy_n(planes + c * pixels, std::min(lanes, outputs - c), y + c);
        }
    }
}

}  // namespace

void stem_folded(const char* isa, const Threads& threads, const Image& image, const float* weight, const float* bias,
                 int64_t outputs, float* y) {
    const Kernels<Float32>& all = kernels<Float32>(isa);
    const int64_t out_height = ceil_div(image.height, 2), out_width = ceil_div(image.width, 2);
    const int64_t rows = image.batch * out_height, plane = out_width * all.lanes;

    Sections<Float32> size(all, nullptr);
    size.pointwise<float>(kStemInputs, outputs, 1);
    std::byte* packed = scratch.shared.get<std::byte>(size.taken());
    std::fill_n(packed, size.taken(), std::byte{0});
    const auto conv = Sections<Float32>(all, packed).pointwise<float>(kStemInputs, outputs, 1);
    pack_stem<Float32>(conv, all.lanes, outputs, weight, bias);

    constexpr int64_t kLeast = 1 << 20;  // multiply-adds for which a second thread is worth waking
    const Threads workers = rows * out_width * kStemInputs * outputs < kLeast ? Threads{1, nullptr} : threads;
    // Where vectors of outputs are whole, the kernel's planes may lie inside each other.
    const bool direct = outputs % all.lanes == 0 && reinterpret_cast<uintptr_t>(y) % 64 == 0;
    parallel(workers, rows, [&](int64_t begin, int64_t end) {
        float* planes = scratch.hidden.get<float>(direct ? 0 : conv.panels.vectors * plane);
        for (int64_t i = begin; i < end; ++i) {
            const Stem stem = {conv,
                               image.data + i / out_height * image.batch_stride,
                               image.channel_stride,
                               image.row_stride,
                               image.column_stride,
                               image.height,
                               image.width};
            float* row = y + i * out_width * outputs;
            for (int64_t p = 0; p < conv.panels.count; ++p) {
                const int64_t vector = conv.panels.first(p);
                if (direct) {
                    all.stem(stem, p, i % out_height, row + vector * all.lanes, outputs, all.lanes);
                } else {
                    all.stem(stem, p, i % out_height, planes + vector * plane, all.lanes, plane);
                }
            }
            if (!direct) interleave(planes, out_width, all.lanes, outputs, row);
        }
    });
}

}  // namespace mbv2::cpu
