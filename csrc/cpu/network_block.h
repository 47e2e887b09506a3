// One block of the network on one picture, and how threads share it.
#pragma once

#include <algorithm>

#include "layout.h"
#include "scratch.h"

namespace mbv2::cpu {

// Bytes of hidden activations that one thread keeps between the convolutions of a block, about half of a 1 MiB L2.
constexpr int64_t kTileBudget = 512 * 1024;
// The same when the whole picture is one tile: no row is held for the next tile, so more may spill.
constexpr int64_t kPictureBudget = 896 * 1024;

// One block on one picture: its input is planes, or for the first block (`stem` not null) the picture through the stem.
template <class F>
struct BlockRun {
    using Activation = typename F::Activation;
    using Hidden = typename F::Hidden;
    using Conv = Pointwise<typename F::Weight>;

    const Kernels<F>& kernels;
    const Conv& expand;
    const DepthwiseWeights<typename F::Tap>& depthwise;
    const Conv& project;
    const Stem* stem;
    const Activation* in;
    Activation* out;
    int64_t height, width, stride;
    bool residual;

    const Panels& panels() const { return stem == nullptr ? expand.panels : stem->conv.panels; }  // of hidden channels
    int64_t out_height() const { return (height - 1) / stride + 1; }
    int64_t out_width() const { return (width - 1) / stride + 1; }
    int64_t lanes() const { return kernels.lanes; }
    int64_t channels() const { return panels().vectors * lanes(); }

    // Bytes of one pixel of hidden channels before and after the depthwise convolution.
    static constexpr int64_t before(int64_t channels) { return channels * static_cast<int64_t>(sizeof(Hidden)); }
    static constexpr int64_t after(int64_t channels) { return channels * static_cast<int64_t>(sizeof(Activation)); }

    // Whether the shortcut is the stem's output, which is nowhere but in the hidden rows.
    bool adds_stem() const { return residual && stem != nullptr; }

    // Whether a tile of this many output rows has all its hidden rows made at once, panel by panel.
    bool fits_whole(int64_t rows) const {
        if (adds_stem()) return false;
        const int64_t hidden_rows = std::min(height, (rows - 1) * stride + 3);
        return before(3 * lanes()) * hidden_rows * width + after(channels()) * rows * out_width() <= kPictureBudget;
    }

    // Output rows of a tile when hidden rows are held for the next one.
    int64_t tile_rows() const {
        const int64_t row = before(channels()) * stride * width + after(channels()) * out_width();
        return std::max<int64_t>((kTileBudget - 2 * before(channels()) * width) / row, 1);
    }

    // Hidden rows [first, last) of one panel; row r goes to `hidden` + r % ring rows.
    void make_hidden(int64_t panel, int64_t first, int64_t last, int64_t ring, Hidden* hidden) const {
        const int64_t plane = ring * width * lanes();
        for (int64_t row = first; row < last;) {
            const int64_t rows = std::min(last - row, ring - row % ring);
            Hidden* to = hidden + row % ring * width * lanes();
            if (stem != nullptr) {
                for (int64_t r = 0; r < rows; ++r) {
                    kernels.stem(*stem, panel, row + r, to + r * width * lanes(), lanes(), plane);
                }
            } else {
                kernels.expand(expand, panel, in + row * width * lanes(), height * width * lanes(), rows * width, to,
                               plane);
            }
            row += rows;
        }
    }

    // Output rows [first, last) of the depthwise convolution of one panel; the first goes to the start of `to`.
    void convolve(int64_t panel, int64_t first, int64_t last, int64_t ring, const Hidden* hidden, Activation* to,
                  int64_t to_plane) const {
        const Depthwise<typename F::Tap> conv = {depthwise, stride, height, width, out_width(), ring};
        for (int64_t v = 0; v < panels().size(panel); ++v) {
            const Hidden* plane = hidden + v * ring * width * lanes();
            kernels.depthwise(conv, panels().first(panel) + v, plane, first, last, to + v * to_plane);
        }
    }

    // Pixels [first, last) of one panel of the block's output; `tile` holds pixels from `tile_first` on.
    void finish(int64_t panel, int64_t first, int64_t last, const Activation* tile, int64_t tile_first,
                int64_t tile_plane) const {
        const int64_t plane = out_height() * out_width() * lanes();
        const int64_t offset = project.panels.first(panel) * plane + first * lanes();
        kernels.project(project, panel, tile + (first - tile_first) * lanes(), tile_plane, last - first, out + offset,
                        plane, residual ? in + offset : nullptr, plane);
    }

    // The same for one row of the first block with a shortcut.
    void finish_on_stem(int64_t panel, int64_t y, const Activation* tile, int64_t tile_plane, const Hidden* hidden,
                        int64_t ring) const {
        const int64_t row = width * lanes(), plane = height * row, vector = project.panels.first(panel);
        kernels.project_on_hidden(project, panel, tile, tile_plane, width, out + vector * plane + y * row, plane,
                                  hidden + vector * ring * row + y % ring * row, ring * row);
    }

    // Output rows [begin, end), tile by tile.
    void rows(int64_t begin, int64_t end) const {
        const bool whole = fits_whole(end - begin);
        const int64_t step = whole ? end - begin : std::min(tile_rows(), end - begin);
        const int64_t ring = std::min(height, (step - 1) * stride + 3);
        const int64_t tile_plane = step * out_width() * lanes();
        Hidden* hidden = scratch.hidden.get<Hidden>((whole ? 3 * lanes() : channels()) * ring * width);
        Activation* tile = scratch.tile.get<Activation>(panels().vectors * tile_plane);
        int64_t done = std::max<int64_t>(0, begin * stride - 1);
        for (int64_t y = begin; y < end; y += step) {
            const int64_t last = std::min(y + step, end), needed = std::min(height, (last - 1) * stride + 2);
            for (int64_t p = 0; p < panels().count; ++p) {
                const int64_t vector = panels().first(p);
                Hidden* held = whole ? hidden : hidden + vector * ring * width * lanes();
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
template <class F>
void run_block(const BlockRun<F>& block, const Threads& threads) {
    const int64_t height = block.out_height();
    if (threads.count == 1 || !block.fits_whole(height)) {
        return parallel(threads, height, [&](int64_t begin, int64_t end) { block.rows(begin, end); });
    }
    const int64_t pixels = height * block.out_width(), plane = pixels * block.lanes();
    const Panels& panels = block.panels();
    auto* tile = scratch.shared.get<typename F::Activation>(panels.vectors * plane);
    parallel(threads, panels.count, [&](int64_t begin, int64_t end) {
        auto* hidden = scratch.hidden.get<typename F::Hidden>(3 * block.lanes() * block.height * block.width);
        for (int64_t p = begin; p < end; ++p) {
            block.make_hidden(p, 0, block.height, block.height, hidden);
            block.convolve(p, 0, height, block.height, hidden, tile + panels.first(p) * plane, plane);
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

}  // namespace mbv2::cpu
