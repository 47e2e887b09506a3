"""Would two launches a block beat the fused block? Predicted, for every variant, batch and GPU; nothing is timed.

    python -m bench.pairs                             table of what pairs would save; results/pairs.json
    python -m bench.pairs --batch 1 256 --gpu "RTX 4090"

Two ways to cut a block are weighed against the fused kernel: expand and depthwise, then project; and expand, then
depthwise and project. The second kernel of the latter is the fused one without expansion, so the planner
(csrc/cuda/plan.cpp) prices it; the others are priced here with the planner's constants: instructions of the same
pieces of code, tensor cores, shared memory and L2 bytes of an SM, clocks of a thread block that runs alone, waves, and
DRAM. To the pairs' advantage their products use tiles that waste nothing, and a hidden tensor that fits half of L2
costs no DRAM. A second launch costs what it costs the fused block where the planner splits it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from bench import plan, workload
from bench.occupancy import ARCHITECTURES, DRAM_SHARE, ISSUE_SHARE, Architecture
from mbv2.files import write_atomic
from mbv2.kernels.cuda import fused

RESULTS = Path(__file__).parent / "results" / "pairs.json"
BATCHES = (1, 8, 32, 64, 128, 256)
ITEM = 2
# A saving of less than this share of a network's time is not worth two more kernels.
MATERIAL = 0.03
# As in csrc/cuda/plan.cpp: of an SM, in bytes a clock and clocks.
SHARED, L2, LONE_WARP, BARRIER, START = 128, 40, 4, 40, 1200
SECOND_LAUNCH = 2.0  # microseconds
TENSOR = {80: 1024, 86: 256, 89: 256, 90: 1280, 100: 1024, 120: 256}  # multiply-adds a clock
L2_SIZE = {80: 40e6, 86: 6e6, 89: 72e6, 90: 50e6, 100: 126e6, 120: 96e6}


@dataclass
class Work:
    """What a thread block does: of all warps, and of the one that has most."""

    instructions: float = 0
    longest: float = START
    shared: float = 0
    products: float = 0

    def add(
        self, items: float, warps: int, instructions: float, shared: float = 0, products: float = 0, times: int = 1
    ) -> None:
        """`items` pieces of work dealt to `warps`, each with these costs; all of it `times` times."""
        self.instructions += times * items * instructions
        self.longest += times * LONE_WARP * -(-items // warps) * instructions
        self.shared += times * items * shared
        self.products += times * items * products


class Option(NamedTuple):
    """A way to run a block and what it is predicted to take."""

    name: str
    microseconds: float


def microseconds(gpu: Architecture, work: Work, blocks: int, resident: int, moved: float, dram: float) -> float:
    """Of a launch of `blocks` thread blocks of which an SM holds `resident`; moved: bytes from L2 a block."""
    clock = gpu.clock / 1e6
    busy = max(
        work.instructions / (4 * ISSUE_SHARE), work.shared / SHARED, work.products / TENSOR[gpu.number], moved / L2
    )
    waves, rest = divmod(blocks, gpu.processors * resident)
    last = max(busy * -(-rest // gpu.processors), work.longest) if rest else 0
    return max((waves * max(busy * resident, work.longest) + last) / clock, 1e6 * dram / (gpu.bandwidth * DRAM_SHARE))


def expand_depthwise(gpu: Architecture, block: plan.Block, batch: int) -> float:
    """Microseconds of the kernel that leaves the depthwise result: the fused one without its last product.

    A thread block has a tile of outputs and some chunks of 32 hidden channels, any number, as no sums are shared.
    """
    best = float("inf")
    stride, side = block.stride, block.side_out
    x_steps, chunks = -(-block.cin // 16), -(-block.hidden // 32)
    walk, warps = 4, 8
    hidden = _from_dram(gpu, block.elements["E2"] * batch)
    dram = ITEM * (block.elements["X"] * batch + hidden + block.hidden * (block.cin + 9))
    for height, width in _tiles(side, 256):
        rows, columns = (min((n - 1) * stride + 3, block.side) for n in (height, width))
        positions, groups = rows * columns, -(-(-(-height // walk) * width) // 16)
        shared = (
            -(-positions // 32) * 32 * (32 * x_steps + 16) + positions * 80 + groups * 64 * 80 + 2 * 32 * 32 * x_steps
        )
        resident = min(2, gpu.shared_per_sm // (shared + 9000))
        if resident == 0:
            continue
        for each in sorted({-(-chunks // parts) for parts in (1, 2, 3, 4, 6, 8, 12, 20, chunks)}):
            work = Work()
            a1_rows = walk * stride + 3 - stride
            work.longest += each * 2 * BARRIER
            loads = (3 * a1_rows + walk) * 512
            work.add(groups * 2, warps, 95 + 4 * a1_rows + 26 * walk, loads, walk * 18 * 1024, times=each)
            expanded = 186 + 21 * x_steps, x_steps * 4 * 512 + 2048, x_steps * 8 * 2048
            work.add(-(-positions // 32), warps, *expanded, times=each)
            work.add(warps, warps, 120, times=each)
            work.add(-(-height * width * 4 // 32), warps, 25, 1024, times=each)  # 16 bytes a lane to global memory
            work.add(warps, warps, 330)
            work.add(positions / 32, warps, 77 + 37 * 2 * x_steps)
            blocks = batch * -(-side // height) * -(-side // width) * -(-chunks // each)
            moved = ITEM * (positions * block.cin + each * 32 * (height * width + block.cin))
            best = min(best, microseconds(gpu, work, blocks, resident, moved, dram))
    return best


def product(gpu: Architecture, rows: int, inner: int, columns: int, dram: float) -> float:
    """Microseconds of a 1x1 convolution, [rows, inner] x [inner, columns], with the best of some tiles."""
    best = float("inf")
    steps = -(-inner // 32)
    for m in (16, 32, 64, 128):
        for n in (16, 32, 64, 128):
            warps = min(4, m * n // 256)
            pairs = m * n / 128 / warps  # 16x8 tiles of a warp
            work = Work()
            work.longest += steps * BARRIER
            # Two products of 16 terms, operands by ldmatrix, 16 bytes a lane of the next step's copies.
            work.add(warps, warps, 20 + pairs * 3.2, pairs * 1200, pairs * 2 * 2048, times=steps)
            work.add((m + n) * 4 / 32, warps, 12, times=steps)
            work.add(warps, warps, 150 + 16 * pairs)
            blocks = -(-rows // m) * -(-columns // n)
            resident = max(1, min(8, gpu.warps // warps // 2))
            moved = ITEM * (inner * (m + n) + m * n)
            best = min(best, microseconds(gpu, work, blocks, resident, moved, dram))
    return best


@cache
def options(gpu: Architecture, block: plan.Block, batch: int) -> list[Option]:
    """The fused block first, then the pairs."""
    limits = fused.Gpu(gpu.number, gpu.processors, gpu.shared_per_block, gpu.shared_per_sm)
    shape = fused.Shape(
        0, batch, block.side, block.side, block.cin, block.hidden, block.cout, block.stride, block.expands,
        block.residual,
    )  # fmt: skip
    whole = fused.plan_for(shape, limits)
    if isinstance(whole, str):
        return []
    found = [Option("fused", whole.microseconds)]
    if not block.expands:
        return found
    e = {kind: size * batch for kind, size in block.elements.items()}
    shortcut = e["X"] if block.residual else 0
    positions = batch * block.side_out**2
    dram = ITEM * (_from_dram(gpu, e["E2"]) + e["O"] + shortcut + block.hidden * block.cout)
    first = expand_depthwise(gpu, block, batch) + product(gpu, positions, block.hidden, block.cout, dram)
    found.append(Option("expand+depthwise | project", first + SECOND_LAUNCH))
    rest = fused.plan_for(shape._replace(inputs=block.hidden, expands=False, residual=False), limits)
    if isinstance(rest, fused.Plan):
        dram = ITEM * (_from_dram(gpu, e["E1"]) + e["X"] + block.hidden * block.cin)
        last = product(gpu, batch * block.side**2, block.cin, block.hidden, dram) + rest.microseconds
        found.append(Option("expand | depthwise+project", last + SECOND_LAUNCH))
    return found


def network(gpu: Architecture, alpha: float, resolution: int, batch: int) -> dict[str, Any]:
    """Microseconds of a network's blocks when all are fused, and when each takes what is predicted fastest."""
    fused_only = with_pairs = 0.0
    taken = []
    for index, block in enumerate(plan.network(alpha, resolution), 1):
        found = options(gpu, block, batch)
        if not found:
            continue
        best = min(found, key=lambda option: option.microseconds)
        fused_only += found[0].microseconds
        with_pairs += best.microseconds
        if best.name != "fused":
            saved = found[0].microseconds - best.microseconds
            taken.append({"block": index, "shape": str(block), "pair": best.name, "saves_us": round(saved, 3)})
    return {
        "gpu": gpu.gpu,
        "alpha": alpha,
        "resolution": resolution,
        "batch": batch,
        "fused_us": round(fused_only, 2),
        "best_us": round(with_pairs, 2),
        "saved": round(1 - with_pairs / fused_only, 4),
        "pairs": taken,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The most that pairs save on each GPU at each batch, over all variants, and where."""
    lines = ["PREDICTED share of a network's 17 blocks that pairs save over fused blocks; nothing was timed", ""]
    lines.append(f"{'GPU':12}{'batch':>6}{'1.0_224':>10}{'most':>8}  where, and the block that saves most")
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        for batch in dict.fromkeys(row["batch"] for row in rows):
            mine = [row for row in rows if row["gpu"] == gpu and row["batch"] == batch]
            full = next((row for row in mine if (row["alpha"], row["resolution"]) == (1.0, 224)), mine[0])
            most = max(mine, key=lambda row: row["saved"])
            lines.append(
                f"{gpu:12}{batch:6}{full['saved']:10.1%}{most['saved']:8.1%}  {most['alpha']}_{most['resolution']}"
                + "".join(f" {p['shape']} ({p['pair']})" for p in sorted(most["pairs"], key=_saving)[-1:])
            )
    material = [row for row in rows if row["saved"] >= MATERIAL]
    lines += ["", f"{len(material)} of {len(rows)} networks would save {MATERIAL:.0%} or more."]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.pairs", description="fused block or pairs, predicted")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    names = {arch.gpu: arch for arch in ARCHITECTURES.values()}
    parser.add_argument("--gpu", nargs="+", choices=names, default=list(names))
    parser.add_argument("--json", type=Path, default=RESULTS, help="where the figures go (%(default)s)")
    arguments = parser.parse_args(argv)
    rows = [
        network(names[gpu], alpha, resolution, batch)
        for gpu in arguments.gpu
        for alpha, resolution in workload.variants()
        for batch in arguments.batch
    ]
    print(table(rows))
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    text = f'{{\n "note": "predicted, nothing was timed",\n "rows": [\n{lines}\n ]\n}}\n'
    write_atomic(arguments.json, text.encode())
    return 0


def _from_dram(gpu: Architecture, elements: float) -> float:
    """Elements of a hidden tensor that DRAM moves once: none where half of L2 keeps it."""
    return elements if elements * ITEM > L2_SIZE[gpu.number] / 2 else 0


def _tiles(side: int, most: int) -> Iterator[tuple[int, int]]:
    """Sizes that cut an output picture evenly."""
    sizes = sorted({-(-side // parts) for parts in range(1, side + 1)})
    for width in sizes:
        heights = [height for height in sizes if height * width <= most]
        yield from ((height, width) for height in heights[-2:])


def _saving(pair: dict[str, Any]) -> float:
    return pair["saves_us"]


if __name__ == "__main__":
    sys.exit(main())
