#include "plan.h"

#include <algorithm>

#include "plan_cost.h"

namespace mbv2::cuda {
namespace {

class Planner {
 public:
    // dram: bytes that the launch moves.
    Planner(const BlockShape& shape, const Gpu& gpu, const Wish& wish, double dram, Plan* best)
        : shape_(shape), gpu_(gpu), wish_(wish), best_(best), bytes_(element_bytes(shape.element)), dram_(dram) {}

    bool run() {
        for (int tile = 0; tile < kTiles; ++tile) {
            if (wish_.tile < 0 || wish_.tile == tile) try_tile(tile);
        }
        return found_;
    }

 private:
    int64_t out_height() const { return (shape_.height - 1) / shape_.stride + 1; }
    int64_t out_width() const { return (shape_.width - 1) / shape_.stride + 1; }

    // Every size that makes one fewer tile than the next smaller one, up to `most`.
    static std::vector<int64_t> sizes(int64_t extent, int64_t most, int wished) {
        if (wished > 0) return {wished};
        std::vector<int64_t> out;
        for (int64_t size = std::min(extent, most); size > 0;) {
            const int64_t tiles = quotient_up(extent, size);
            out.push_back(quotient_up(extent, tiles));
            size = out.back() - 1;
        }
        return out;
    }

    void try_tile(int index) {
        const TileShape& tile = kTileShapes[index];
        if (tile.projects() != (shape_.outputs > 0) || tile.channels() < shape_.outputs) return;
        const int64_t units = tile.outputs() / tile.walk;
        for (int64_t width : sizes(out_width(), units, wish_.tile_width)) {
            const int64_t most = units / width * tile.walk;
            for (int64_t height : sizes(out_height(), most, wish_.tile_height)) {
                const int64_t room = units / (width * quotient_up(height, tile.walk));
                const bool whole = width == out_width() && height == out_height();
                const int64_t images = whole ? std::min<int64_t>({room, shape_.images, 8}) : 1;
                for (int64_t n : sizes(images, images, wish_.tile_images)) {
                    if (n <= room) try_layouts(index, n, height, width);
                }
            }
        }
    }

    void try_layouts(int index, int64_t tile_images, int64_t tile_height, int64_t tile_width) {
        Plan plan = {};
        plan.tile = index;
        plan.threads = kTileShapes[index].threads();
        for (bool ahead : {true, false}) {
            if (lay_out(plan, tile_images, tile_height, tile_width, ahead)) try_splits(plan);
        }
    }

    void try_splits(Plan& plan) {
        FusedParams& p = plan.params;
        const int64_t chunks = quotient_up(p.hidden, kTileShapes[plan.tile].chunk_bytes / bytes_);
        const int64_t tiles = quotient_up(p.images, p.tile_images) * p.tiles_down * p.tiles_across;
        for (int64_t each : sizes(chunks, chunks, -1)) {
            p.splits = static_cast<int32_t>(quotient_up(chunks, each));
            p.chunks = static_cast<int32_t>(each);
            if (wish_.splits > 0 && wish_.splits != p.splits) continue;
            // Partial sums pay only while tiles alone leave SMs idle; without a projection there are none.
            if (wish_.splits < 0 && shape_.outputs > 0 && p.splits > 1 && tiles * (p.splits - 1) >= 2 * gpu_.processors)
                break;
            plan.blocks = tiles * p.splits;
            if (plan.blocks > INT32_MAX) continue;
            plan.partial_bytes = shape_.outputs > 0 && p.splits > 1 ? p.splits * p.out_positions * p.outputs * 4 : 0;
            estimate(plan);
            if (!found_ || better(plan, *best_)) *best_ = plan, found_ = true;
        }
    }

    bool lay_out(Plan& plan, int64_t tile_images, int64_t tile_height, int64_t tile_width, bool ahead) const {
        const TileShape& tile = kTileShapes[plan.tile];
        const int64_t pitch = tile.chunk_bytes + 16, chunk = tile.chunk_bytes / bytes_;
        const int64_t walks = quotient_up(tile_height, tile.walk), stride = shape_.stride;
        const int64_t a1_rows = (walks * tile.walk - 1) * stride + 3, a1_columns = (tile_width - 1) * stride + 3;
        const int64_t positions = positions_of(tile_images, tile_height, tile_width);
        const int64_t outputs = round_up(tile_images * walks * tile_width, 16) * tile.walk;
        const int64_t row = round_up(shape_.inputs * bytes_, 32);

        FusedParams& p = plan.params;
        p.out_positions = shape_.images * out_height() * out_width();
        p.images = static_cast<int32_t>(shape_.images);
        p.height = static_cast<int32_t>(shape_.height), p.width = static_cast<int32_t>(shape_.width);
        p.inputs = static_cast<int32_t>(shape_.inputs), p.hidden = static_cast<int32_t>(shape_.hidden);
        p.outputs = static_cast<int32_t>(shape_.outputs);
        p.out_height = static_cast<int32_t>(out_height()), p.out_width = static_cast<int32_t>(out_width());
        p.stride = static_cast<int32_t>(stride), p.residual = shape_.residual;
        p.tile_images = static_cast<int32_t>(tile_images);
        p.tile_height = static_cast<int32_t>(tile_height), p.tile_width = static_cast<int32_t>(tile_width);
        p.tiles_down = static_cast<int32_t>(quotient_up(out_height(), tile_height));
        p.tiles_across = static_cast<int32_t>(quotient_up(out_width(), tile_width));
        p.x_vectors = divisor(row / 16), p.out_vectors = divisor(std::max<int64_t>(shape_.outputs * bytes_ / 16, 1));

        const int64_t padded = round_up(positions, 32);
        const int64_t x_bytes = shape_.expands ? padded * (row + 16) : 0;
        const int64_t w3_bytes = round_up(shape_.outputs, 16) * pitch;
        const int64_t weights = w3_bytes + (shape_.expands ? chunk * (row + 16) : 0);
        const int64_t taps = 9 * tile.chunk_bytes + 8 * chunk;
        const int64_t at_a2 = x_bytes + tile_images * a1_rows * a1_columns * pitch;
        const int64_t at_weights = at_a2 + outputs * pitch;
        const int64_t staged = x_bytes + outputs * (shape_.outputs * bytes_ + 16);
        const int64_t at_tables = std::max(at_weights + 2 * taps + (ahead ? 2 : 1) * weights, staged);
        const int64_t total = at_tables + kTileBytes + tile.outputs() / tile.walk * kUnitBytes + padded * kPlaceBytes;
        // The kernel divides vector numbers below 2^16 only.
        if (total > gpu_.shared_per_block || padded * (row / 16) >= 1 << 16) return false;
        p.at_a1 = static_cast<int32_t>(x_bytes), p.at_a2 = static_cast<int32_t>(at_a2);
        p.at_weights = static_cast<int32_t>(at_weights), p.at_tables = static_cast<int32_t>(at_tables);
        p.x_pitch = static_cast<int32_t>(row + 16);
        p.ahead = ahead, p.weights_step = static_cast<int32_t>(ahead ? weights : 0),
        p.w3_bytes = static_cast<int32_t>(w3_bytes);
        plan.shared_bytes = static_cast<int>(total);
        return true;
    }

    // Input positions of a tile, halo included, as many as lie inside the image.
    int64_t positions_of(int64_t images, int64_t height, int64_t width) const {
        const int64_t rows = std::min((height - 1) * shape_.stride + 3, shape_.height);
        const int64_t columns = std::min((width - 1) * shape_.stride + 3, shape_.width);
        return images * rows * columns;
    }

    // Where DRAM bounds both, what keeps the SMs less busy.
    static bool better(const Plan& a, const Plan& b) {
        return a.microseconds != b.microseconds ? a.microseconds < b.microseconds : a.busy < b.busy;
    }

    // Instructions are those of the machine code for sm_80 (python -m bench.resources_cuda), rounded and with a line
    // through the tiles; a test holds their sum to the machine code's.
    void estimate(Plan& plan) const {
        const FusedParams& p = plan.params;
        const TileShape& tile = kTileShapes[plan.tile];
        const int warps = tile.warps_m * tile.warps_n;
        const bool packed = bytes_ == 2;
        const int64_t steps = tile.chunk_bytes / 32, x_steps = p.x_vectors.value / 2;
        const int64_t positions = positions_of(p.tile_images, p.tile_height, p.tile_width);
        const int64_t groups = quotient_up(p.tile_images * quotient_up(p.tile_height, tile.walk) * p.tile_width, 16);
        // Of an 8-column tensor-core tile and 32 bytes of channels: instructions and multiply-adds of 16-bit speed.
        const double mma = packed ? 1 : 3, work = packed ? 2048 : 6144;
        // Of an operand that becomes two of tf32, where it is loaded.
        const double split = packed ? 0 : 28, split_project = packed ? 0 : 15;

        Phase walk, multiply;
        const int64_t rows = tile.walk * shape_.stride + 3 - shape_.stride;
        if (packed) {
            walk.add(groups * steps, warps, 95 + 4 * rows + 26 * tile.walk, 3 * rows * 512 + tile.walk * 512,
                     tile.walk * 18 * 1024);
        } else {
            walk.add(groups * steps, warps, 45 + 2 * (3 * rows + 23 * tile.walk), 6 * rows * 256 + tile.walk * 512, 0);
        }
        if (shape_.expands) {
            const int64_t tiles = packed ? 4 : 2;
            multiply.add(quotient_up(positions, 32) * steps / 2, warps,
                         138 + 12 * tiles + x_steps * (9 + (tiles + 4) * (1 + split) / 2 + 2 * tiles * mma),
                         x_steps * (2 + tiles / 2) * 512 + 2048, x_steps * 2 * tiles * work);
        }
        const int64_t across = std::min<int64_t>(tile.tiles_n, quotient_up(shape_.outputs, 8));
        const double left = tile.tiles_m + across / 2.0;
        if (tile.projects()) {
            multiply.add(warps, warps, 30 + 1.8 * steps * (left * (1 + split_project) + tile.tiles_m * across * mma),
                         steps * left * 512, steps * tile.tiles_m * across * work);
        } else {
            multiply.add(quotient_up(groups * tile.chunk_bytes, 32), warps, 10 + 11 * tile.walk, 512 * tile.walk, 0);
        }
        // The loop over chunks itself, and starting the copies of weights.
        multiply.add(warps, warps, 140, 0, 0);
        const double chunk = double(tile.chunk_bytes) / bytes_;
        const double copies = round_up(p.outputs, 16) * tile.chunk_bytes / 16 * 31.0 +
                              (shape_.expands ? chunk * p.x_vectors.value * 26 : 0) + 9 * tile.chunk_bytes / 16 * 17 +
                              chunk / 2 * 28;
        multiply.instructions += copies / 32;

        const double chunks = p.chunks, items = bytes_;
        const double outputs = double(p.tile_images) * p.tile_height * p.tile_width;
        const double weights = chunks * chunk * (p.outputs + (shape_.expands ? p.inputs : 0)) * items;
        const double results = tile.projects() ? p.outputs : chunks * chunk;
        const double moved = weights + (double(positions) * p.inputs + outputs * results) * items;
        const Rates rate = rates(gpu_.arch);
        // Once: tables, the input tile, the results by pairs in registers and by 16 bytes in shared memory.
        double instructions =
            warps * (330.0 + tile.tiles_m * across * 2 * (shape_.residual ? 18 : 8)) +
            (groups * 16 * 96.0 + positions * 77.0) / 32 +
            (shape_.expands ? positions * p.x_vectors.value : positions * steps * 2 * chunks) * 37.0 / 32 +
            (tile.projects() ? outputs * p.out_vectors.value * 44 / 32 : 0);
        double longest = kStart, shared = 0, products = 0;
        for (const Phase& phase : {walk, multiply}) {
            instructions += chunks * phase.instructions;
            longest += chunks * (kBarrier + kLoneWarp * phase.longest);
            shared += chunks * phase.shared;
            products += chunks * phase.products;
        }
        plan.instructions = 32 * instructions * plan.blocks;
        if (!p.ahead) longest += std::max(0.0, chunks * (kLatency - kLoneWarp * walk.longest) + weights / kL2Bytes);
        const int resident = std::max(
            1, std::min(resident_blocks(plan.tile, gpu_.arch), gpu_.shared_per_processor / (plan.shared_bytes + 1024)));
        const double throughput = std::max(
            {instructions / (4 * kIssueShare), shared / kSharedBytes, products / rate.products, moved / kL2Bytes});
        plan.busy = clocks(throughput, longest, plan.blocks, resident, gpu_.processors) / rate.clock;
        if (plan.partial_bytes > 0) {
            plan.busy += kSecondLaunch + 2.0 * plan.partial_bytes / (kL2Bytes * gpu_.processors) / rate.clock;
        }
        plan.microseconds = std::max(plan.busy, dram_ / (rate.dram * gpu_.processors) / rate.clock);
    }

    const BlockShape& shape_;
    const Gpu& gpu_;
    const Wish& wish_;
    Plan* best_;
    const int bytes_;
    const double dram_;
    bool found_ = false;
};

}  // namespace

const char* refusal(const BlockShape& s, const Gpu& gpu) {
    if (gpu.arch < 80) return "the fused block needs compute capability 8.0 or newer";
    if (s.stride != 1 && s.stride != 2) return "the stride is neither 1 nor 2";
    if (s.images < 1 || s.height < 1 || s.width < 1) return "there are no pixels";
    if (s.inputs < 8 || s.hidden < 8 || s.outputs < 8) return "a convolution has fewer than 8 channels";
    if (s.inputs % 8 || s.hidden % 8 || s.outputs % 8) return "channels are not multiples of 8";
    if (s.outputs > most_channels()) return "the projection has too many channels";
    if (!s.expands && s.inputs != s.hidden) return "without expansion, inputs and hidden channels are the same";
    if (s.residual && (s.stride != 1 || s.inputs != s.outputs)) return "the shortcut needs stride 1 and equal channels";
    if (s.images > INT32_MAX || s.height > 1 << 20 || s.width > 1 << 20 || s.inputs > 1 << 14 || s.hidden > 1 << 20)
        return "the tensors are too large";
    // Positions inside a tile's images are 32-bit numbers.
    if (s.height * s.width > INT32_MAX / 8) return "an image is too large";
    return nullptr;
}

bool plan_launch(const BlockShape& shape, const Gpu& gpu, const Wish& wish, double dram, Plan* best) {
    return Planner(shape, gpu, wish, dram, best).run();
}

}  // namespace mbv2::cuda
