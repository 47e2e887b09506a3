// A block as one launch or as a pair: the pair's product, and which way is estimated faster.
#include "plan.h"
#include "plan_cost.h"

namespace mbv2::cuda {
namespace {

// A pair needs memory and rests on L2: it is taken where it is estimated to need no more than this of one launch's
// time.
constexpr double kPairGain = 0.9;

// Instructions are those of the machine code for sm_80, as in plan.cpp.
void estimate(ProductPlan& plan, Element element, const Gpu& gpu, double dram) {
    const ProductParams& p = plan.params;
    const ProductTile& tile = kProductTiles[plan.tile];
    const int warps = plan.threads / 32, bytes = element_bytes(element), vectors = kProductChunk / 16;
    const double mma = bytes == 2 ? 1 : 3, split = bytes == 2 ? 0 : 27, work = bytes == 2 ? 2048 : 6144;
    const int64_t chunks = quotient_up(p.inner * bytes, kProductChunk);
    const double steps = double(quotient_up(p.inner * bytes, 32)) / chunks;
    const double loads = tile.tiles_m + tile.tiles_n / 2.0, tiles = tile.tiles_m * tile.tiles_n;
    const double copies = double(tile.rows() + tile.columns()) * vectors / plan.threads;

    const double pass = 44 + 5 * copies + steps * (loads * (1 + split) + tiles * mma);
    const double row_passes = double(tile.rows()) * vectors / plan.threads;
    const int64_t written = std::min<int64_t>(p.columns, tile.columns()) * bytes / 16;
    const double once = 214 + 33.4 * tiles + row_passes * (18 + 7 * quotient_up(written, vectors));
    const double each = std::max(kBarrier + kLoneWarp * pass, kLatency / (kProductStages - 1));
    const double longest = kStart + chunks * each + kLoneWarp * once;
    const double instructions = warps * (once + chunks * pass);
    const double results = double(tile.rows()) * tile.columns() * bytes;
    const double shared =
        chunks * (warps * steps * 512 * loads + (tile.rows() + tile.columns()) * kProductChunk) + 2 * results;
    const double moved = double(tile.rows() + tile.columns()) * p.inner * bytes + results;
    const Rates rate = rates(gpu.arch);
    const int resident = std::max(1, std::min(tile.blocks, gpu.shared_per_processor / (plan.shared_bytes + 1024)));
    const double throughput = std::max({instructions / (4 * kIssueShare), shared / kSharedBytes,
                                        chunks * steps * tiles * work * warps / rate.products, moved / kL2Bytes});
    const double busy = clocks(throughput, longest, plan.blocks, resident, gpu.processors) / rate.clock;
    plan.instructions = 32 * instructions * plan.blocks;
    plan.microseconds = std::max(busy, dram / (rate.dram * gpu.processors) / rate.clock);
}

// Bytes of DRAM, each once, as halos and weights of other thread blocks come from L2.
struct Bytes {
    double x, out, expand, depthwise, project, shortcut, hidden;

    Bytes(const BlockShape& s, const Gpu& gpu) {
        const double item = element_bytes(s.element);
        const int64_t height = (s.height - 1) / s.stride + 1, width = (s.width - 1) / s.stride + 1;
        x = double(s.images) * s.height * s.width * s.inputs * item;
        out = double(s.images) * height * width * s.outputs * item;
        expand = s.expands ? double(s.hidden) * s.inputs * item : 0;
        depthwise = double(s.hidden) * 9 * item;
        project = double(s.hidden) * s.outputs * item;
        shortcut = s.residual ? x : 0;
        // The tensor between two launches is not moved where half of L2 keeps it.
        hidden = double(s.images) * height * width * s.hidden * item;
        if (hidden <= rates(gpu.arch).l2 * gpu.processors / 2) hidden = 0;
    }
};

bool plan_pair(const BlockShape& s, const Gpu& gpu, const Wish& wish, BlockPlan* best) {
    BlockShape front = s;
    front.outputs = 0, front.residual = false;
    const int64_t rows = s.images * ((s.height - 1) / s.stride + 1) * ((s.width - 1) / s.stride + 1);
    // The kernel steps from row to row by 32-bit numbers.
    if (((s.width - 1) / s.stride + 1) * s.hidden > INT32_MAX) return false;
    const Bytes bytes(s, gpu);
    best->cut = Cut::kPair;
    return plan_launch(front, gpu, wish, bytes.x + bytes.hidden + bytes.expand + bytes.depthwise, &best->block) &&
           plan_product(s.element, rows, s.hidden, s.outputs, gpu, wish,
                        bytes.hidden + bytes.project + bytes.out + bytes.shortcut, &best->product);
}

}  // namespace

bool plan_product(Element element, int64_t rows, int64_t inner, int64_t columns, const Gpu& gpu, const Wish& wish,
                  double dram, ProductPlan* best) {
    bool found = false;
    for (int index = 0; index < kProducts; ++index) {
        if (wish.product >= 0 && wish.product != index) continue;
        const ProductTile& tile = kProductTiles[index];
        ProductPlan plan = {};
        plan.tile = index, plan.threads = tile.threads();
        plan.params.rows = rows;
        plan.params.inner = static_cast<int32_t>(inner), plan.params.columns = static_cast<int32_t>(columns);
        plan.blocks = quotient_up(rows, tile.rows()) * quotient_up(columns, tile.columns());
        const int ring = kProductStages * (tile.rows() + tile.columns()) * kProductPitch;
        plan.shared_bytes = std::max(ring, tile.rows() * (tile.columns() * element_bytes(element) + 16));
        if (plan.shared_bytes > gpu.shared_per_block || plan.blocks > INT32_MAX) continue;
        estimate(plan, element, gpu, dram);
        if (!found || plan.microseconds < best->microseconds) *best = plan, found = true;
    }
    return found;
}

bool plan_block(const BlockShape& shape, const Gpu& gpu, const Wish& wish, BlockPlan* best) {
    if (refusal(shape, gpu) != nullptr) return false;
    bool found = false;
    BlockPlan plan = {};
    if (wish.cut != static_cast<int>(Cut::kPair)) {
        const Bytes bytes(shape, gpu);
        found = plan_launch(shape, gpu, wish, bytes.x + bytes.out + bytes.expand + bytes.project, &plan.block);
        plan.microseconds = plan.block.microseconds;
        if (found) *best = plan;
    }
    if (wish.cut == static_cast<int>(Cut::kWhole) || !shape.expands) return found;
    if (!plan_pair(shape, gpu, wish, &plan)) return found;
    plan.microseconds = plan.block.microseconds + plan.product.microseconds + kSecondLaunch;
    if (!found || plan.microseconds < kPairGain * best->microseconds) *best = plan, found = true;
    return found;
}

}  // namespace mbv2::cuda
