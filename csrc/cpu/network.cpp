#include "network.h"

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "layout.h"

namespace mbv2::cpu {
namespace {

// Floats of hidden activations that one thread keeps between the convolutions of a block, about half of a 1 MiB L2.
constexpr int64_t kTileBudget = 128 * 1024;
// The same when the whole picture is one tile: no row is held for the next tile, so more may spill.
constexpr int64_t kPictureBudget = 224 * 1024;

// Memory that grows to the largest request and is kept for the thread's life.
class Buffer {
 public:
    float* get(int64_t floats) {
        if (floats > size_) {
            memory_.reset();
            size_ = 0;
            const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) + 63) / 64 * 64;
            memory_.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
            if (memory_ == nullptr) throw std::bad_alloc();
            size_ = floats;
        }
        return memory_.get();
    }

 private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };
    std::unique_ptr<float, Free> memory_;
    int64_t size_ = 0;
};

// `hidden` and `tile` are of the thread that works, the others of the thread that called.
struct Scratch {
    Buffer activations[2], shared, pooled, logits, hidden, tile;
};
thread_local Scratch scratch;

int64_t halved(int64_t size) { return (size + 1) / 2; }

// One block on one picture: its input is planes, or for the first block (`in` null) the picture through the stem.
struct BlockRun {
    const Kernels& kernels;
    const Pointwise& expand;
    const float* depthwise_weights;
    const Pointwise& project;
    const Stem* stem;
    const float* in;
    float* out;
    int64_t height, width, stride;
    bool residual;

    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
    int64_t lanes() const { return kernels.lanes; }
    int64_t channels() const { return expand.panels.vectors * lanes(); }

    // Whether the shortcut is the stem's output, which is nowhere but in the hidden rows.
    bool adds_stem() const { return residual && stem != nullptr; }

    // Whether a tile of this many output rows has all its hidden rows made at once, panel by panel.
    bool fits_whole(int64_t rows) const {
        if (adds_stem()) return false;
        const int64_t hidden_rows = std::min(height, (rows - 1) * stride + 3);
        return 3 * lanes() * hidden_rows * width + channels() * rows * out_width() <= kPictureBudget;
    }

    // Output rows of a tile when hidden rows are held for the next one.
    int64_t tile_rows() const {
        const int64_t row = channels() * (stride * width + out_width());
        return std::max<int64_t>((kTileBudget - 2 * channels() * width) / row, 1);
    }

    // Hidden rows [first, last) of one panel; row r goes to `hidden` + r % ring rows.
    void make_hidden(int64_t panel, int64_t first, int64_t last, int64_t ring, float* hidden) const {
        const int64_t plane = ring * width * lanes();
        for (int64_t row = first; row < last;) {
            const int64_t rows = std::min(last - row, ring - row % ring);
            float* to = hidden + row % ring * width * lanes();
            if (stem != nullptr) {
                for (int64_t r = 0; r < rows; ++r) {
                    kernels.stem(*stem, panel, row + r, to + r * width * lanes(), plane);
                }
            } else {
                kernels.pointwise(expand, panel, in + row * width * lanes(), height * width * lanes(), rows * width, to,
                                  plane, nullptr, 0);
            }
            row += rows;
        }
    }

    // Output rows [first, last) of the depthwise convolution of one panel; the first goes to the start of `to`.
    void convolve(int64_t panel, int64_t first, int64_t last, int64_t ring, const float* hidden, float* to,
                  int64_t to_plane) const {
        const Depthwise conv = {depthwise_weights, stride, height, width, out_width(), ring};
        for (int64_t v = 0; v < expand.panels.size(panel); ++v) {
            const float* plane = hidden + v * ring * width * lanes();
            kernels.depthwise(conv, expand.panels.first(panel) + v, plane, first, last, to + v * to_plane);
        }
    }

    // Pixels [first, last) of one panel of the block's output; `tile` holds pixels from `tile_first` on.
    void finish(int64_t panel, int64_t first, int64_t last, const float* tile, int64_t tile_first,
                int64_t tile_plane) const {
        const int64_t plane = out_height() * out_width() * lanes();
        const int64_t offset = project.panels.first(panel) * plane + first * lanes();
        kernels.pointwise(project, panel, tile + (first - tile_first) * lanes(), tile_plane, last - first, out + offset,
                          plane, residual ? in + offset : nullptr, plane);
    }

    // The same for one row of the first block with a shortcut.
    void finish_on_stem(int64_t panel, int64_t y, const float* tile, int64_t tile_plane, const float* hidden,
                        int64_t ring) const {
        const int64_t row = width * lanes(), plane = height * row, vector = project.panels.first(panel);
        kernels.pointwise(project, panel, tile, tile_plane, width, out + vector * plane + y * row, plane,
                          hidden + vector * ring * row + y % ring * row, ring * row);
    }

    // Output rows [begin, end), tile by tile.
    void rows(int64_t begin, int64_t end) const {
        const bool whole = fits_whole(end - begin);
        const int64_t step = whole ? end - begin : std::min(tile_rows(), end - begin);
        const int64_t ring = std::min(height, (step - 1) * stride + 3);
        const int64_t tile_plane = step * out_width() * lanes();
        float* hidden = scratch.hidden.get((whole ? 3 * lanes() : channels()) * ring * width);
        float* tile = scratch.tile.get(expand.panels.vectors * tile_plane);
        int64_t done = std::max<int64_t>(0, begin * stride - 1);
        for (int64_t y = begin; y < end; y += step) {
            const int64_t last = std::min(y + step, end), needed = std::min(height, (last - 1) * stride + 2);
            for (int64_t p = 0; p < expand.panels.count; ++p) {
                const int64_t vector = expand.panels.first(p);
                float* held = whole ? hidden : hidden + vector * ring * width * lanes();
                make_hidden(p, done, needed, ring, held);
                convolve(p, y, last, ring, held, tile + vector * tile_plane, tile_plane);
            }
            done = needed;
            for (int64_t p = 0; p < project.panels.count; ++p) {
                if (adds_stem()) {
                    for (int64_t row = y; row < last; ++row) {
                        finish_on_stem(p, row, tile + (row - y) * width * lanes(), tile_plane, hidden, ring);
                    }
                } else {
                    finish(p, y * out_width(), last * out_width(), tile, y * out_width(), tile_plane);
                }
            }
        }
    }
};

// Adds the time since it was made or last asked to a part.
class Watch {
 public:
    explicit Watch(Times* times) : times_(times) {
        if (times_ != nullptr) start_ = Clock::now();
    }

    void part(int64_t index) {
        if (times_ == nullptr) return;
        const Clock::time_point now = Clock::now();
        times_->parts[index] += std::chrono::duration<double>(now - start_).count();
        start_ = now;
    }

 private:
    using Clock = std::chrono::steady_clock;
    Times* times_;
    Clock::time_point start_;
};

template <class Body>
void parallel(const Threads& threads, int64_t count, const Body& body) {
    if (threads.count == 1 || count == 1) return body(int64_t{0}, count);
    const auto call = [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
    };
    threads.run(count, const_cast<Body*>(&body), call);
}

// Shares the work of one block between threads: bands of rows of a large picture; of a small one, whose bands would
// repeat too many rows at their seams, first the hidden panels and then pieces of the output.
void run_block(const BlockRun& block, const Threads& threads) {
    const int64_t height = block.out_height();
    if (threads.count == 1 || !block.fits_whole(height)) {
        return parallel(threads, height, [&](int64_t begin, int64_t end) { block.rows(begin, end); });
    }
    const int64_t pixels = height * block.out_width(), plane = pixels * block.lanes();
    float* tile = scratch.shared.get(block.expand.panels.vectors * plane);
    parallel(threads, block.expand.panels.count, [&](int64_t begin, int64_t end) {
        float* hidden = scratch.hidden.get(3 * block.lanes() * block.height * block.width);
        for (int64_t p = begin; p < end; ++p) {
            block.make_hidden(p, 0, block.height, block.height, hidden);
            block.convolve(p, 0, height, block.height, hidden, tile + block.expand.panels.first(p) * plane, plane);
        }
    });
    const int64_t pieces = std::min<int64_t>(threads.count, ceil_div(pixels, 8));
    parallel(threads, block.project.panels.count * pieces, [&](int64_t begin, int64_t end) {
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t piece = unit % pieces;
            block.finish(unit / pieces, pixels * piece / pieces, pixels * (piece + 1) / pieces, tile, 0, plane);
        }
    });
}

int64_t activation_size(const Plan& plan, int64_t lanes, int64_t height, int64_t width) {
    int64_t most = 0;
    for (int64_t i = 0; i < plan.block_count; ++i) {
        const Block& block = plan.blocks[i];
        height = (height - 1) / block.stride + 1;
        width = (width - 1) / block.stride + 1;
        most = std::max(most, ceil_div(block.outputs, lanes) * lanes * height * width);
    }
    return most;
}

// Everything up to the pooled features of picture `n`, into planes [last channels / lanes][batch][lanes].
void features(const Plan& plan, const Network& network, const Kernels& kernels, const Image& image, int64_t n,
              const Threads& threads, float* pooled, Watch& watch) {
    const int64_t lanes = kernels.lanes;
    int64_t height = halved(image.height), width = halved(image.width);
    const int64_t size = activation_size(plan, lanes, height, width);
    float* in = scratch.activations[0].get(size);
    float* out = scratch.activations[1].get(size);
    const Pointwise& first = network.expand[0];
    const Stem stem = {first.weights,        first.bias,       first.panels,        image.data + n * image.batch_stride,
                       image.channel_stride, image.row_stride, image.column_stride, image.height,
                       image.width};
    for (int64_t i = 0; i < plan.block_count; ++i) {
        const BlockRun block = {kernels,
                                network.expand[i],
                                network.depthwise[i],
                                network.project[i],
                                i == 0 ? &stem : nullptr,
                                i == 0 ? nullptr : in,
                                out,
                                height,
                                width,
                                plan.blocks[i].stride,
                                plan.blocks[i].residual};
        run_block(block, threads);
        watch.part(i);
        height = block.out_height();
        width = block.out_width();
        std::swap(in, out);
    }
    const int64_t pixels = height * width;
    parallel(threads, network.head.panels.count, [&](int64_t begin, int64_t end) {
        float* hidden = scratch.hidden.get(3 * lanes * pixels);
        for (int64_t p = begin; p < end; ++p) {
            kernels.pointwise(network.head, p, in, pixels * lanes, pixels, hidden, pixels * lanes, nullptr, 0);
            for (int64_t v = 0; v < network.head.panels.size(p); ++v) {
                kernels.mean(hidden + v * pixels * lanes, pixels,
                             pooled + ((network.head.panels.first(p) + v) * image.batch + n) * lanes);
            }
        }
    });
    watch.part(plan.block_count);
}

void classify(const Plan& plan, const Network& network, const Kernels& kernels, const float* pooled, int64_t batch,
              const Threads& threads, float* logits) {
    const int64_t lanes = kernels.lanes;
    float* planes = scratch.logits.get(network.classifier.panels.vectors * lanes * batch);
    parallel(threads, network.classifier.panels.count, [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p) {
            float* to = planes + network.classifier.panels.first(p) * batch * lanes;
            kernels.pointwise(network.classifier, p, pooled, batch * lanes, batch, to, batch * lanes, nullptr, 0);
        }
    });
    for (int64_t n = 0; n < batch; ++n) {
        for (int64_t c = 0; c < plan.classes; c += lanes) {
            std::memcpy(logits + n * plan.classes + c, planes + (c * batch + n * lanes),
                        static_cast<size_t>(std::min(lanes, plan.classes - c)) * sizeof(float));
        }
    }
}

}  // namespace

void run(const Plan& plan, const Kernels& kernels, const float* packed, const Image& image, const Threads& threads,
         float* logits, Times* times) {
    const Network network(plan, kernels, packed);
    float* pooled = scratch.pooled.get(network.head.panels.vectors * kernels.lanes * image.batch);
    // As many pictures as divide evenly go one to a thread; the rest are each shared between all threads.
    const int64_t apart = threads.count == 1 ? image.batch : image.batch / threads.count * threads.count;
    if (apart > 0) {
        const Threads alone = {1, nullptr};
        parallel(threads, apart, [&](int64_t begin, int64_t end) {
            Watch watch(times);
            for (int64_t n = begin; n < end; ++n) features(plan, network, kernels, image, n, alone, pooled, watch);
        });
    }
    Watch watch(times);
    for (int64_t n = apart; n < image.batch; ++n) features(plan, network, kernels, image, n, threads, pooled, watch);
    classify(plan, network, kernels, pooled, image.batch, threads, logits);
    watch.part(plan.block_count + 1);
}

}  // namespace mbv2::cpu
