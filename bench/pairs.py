"""Where a block runs as two launches instead of one, by the planner's estimate; nothing is timed.

    python -m bench.pairs                             table of what pairs save; results/pairs.json
    python -m bench.pairs --batch 1 256 --gpu "RTX 4090"

For every variant, GPU and batch: the time of the 17 blocks with one launch each, and with a pair (expand and depthwise,
then project) wherever the planner takes one (csrc/cuda/plan_pair.cpp). Both are the planner's estimates. Beside each
pair stand the instructions of both ways, counted in machine code (`bench.resources_cuda`) and not estimated.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench import fused_counts, plan, workload
from bench.occupancy import ARCHITECTURES, Architecture
from mbv2.files import write_atomic
from mbv2.kernels.cuda import fused

RESULTS = Path(__file__).parent / "results" / "pairs.json"
FUSED = Path(__file__).parent / "results" / "cuda_fused.json"
BATCHES = (1, 8, 32, 64, 128, 256)
# A saving of this share of a network's time is worth a second kernel.
MATERIAL = 0.03


def shape_of(block: plan.Block, batch: int) -> fused.Shape:
    """A block in float16, as the planner takes it."""
    return fused.Shape(
        0, batch, block.side, block.side, block.cin, block.hidden, block.cout, block.stride, block.expands,
        block.residual,
    )  # fmt: skip


def limits(gpu: Architecture) -> fused.Gpu:
    """A GPU, as the planner takes it."""
    return fused.Gpu(gpu.number, gpu.processors, gpu.shared_per_block, gpu.shared_per_sm)


@cache
def counts(gpu: Architecture) -> dict[str, fused_counts.Counts]:
    """Instructions of the kernels' float16 machine code, by tile."""
    known = json.loads(FUSED.read_text())[gpu.name]["float16"]
    return {tile: row["counts"] for tile, row in known.items()}


def network(gpu: Architecture, alpha: float, resolution: int, batch: int) -> dict[str, Any]:
    """Microseconds of a network's blocks in one launch each, and as planned; the blocks that become pairs."""
    one_launch = planned = 0.0
    taken = []
    for index, block in enumerate(_blocks(alpha, resolution), 1):
        shape = shape_of(block, batch)
        whole, choice = fused.plan_for(shape, limits(gpu)), fused.choice_for(shape, limits(gpu))
        assert isinstance(whole, fused.Plan) and not isinstance(choice, str), f"{shape}: {whole}"
        one_launch += whole.microseconds
        planned += choice.microseconds
        if isinstance(choice, fused.Pair):
            instructions = sum(fused_counts.pair_executed(shape, choice, counts(gpu)))
            taken.append(
                {
                    "block": index,
                    "shape": str(block),
                    "saves_us": round(whole.microseconds - choice.microseconds, 3),
                    "instructions": round(instructions / fused_counts.executed(shape, whole, counts(gpu)), 3),
                }
            )
    return {
        "gpu": gpu.gpu,
        "alpha": alpha,
        "resolution": resolution,
        "batch": batch,
        "one_launch_us": round(one_launch, 2),
        "planned_us": round(planned, 2),
        "saved": round(1 - planned / one_launch, 4),
        "pairs": taken,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The most that pairs save on each GPU at each batch, over all variants, and where."""
    lines = ["PREDICTED share of a network's 17 blocks that pairs save over one launch each; nothing was timed", ""]
    lines.append(f"{'GPU':12}{'batch':>6}{'1.0_224':>10}{'most':>8}  where, pairs, and the block that saves most")
    for gpu in dict.fromkeys(row["gpu"] for row in rows):
        for batch in dict.fromkeys(row["batch"] for row in rows):
            mine = [row for row in rows if row["gpu"] == gpu and row["batch"] == batch]
            full = next((row for row in mine if (row["alpha"], row["resolution"]) == (1.0, 224)), mine[0])
            most = max(mine, key=lambda row: row["saved"])
            lines.append(
                f"{gpu:12}{batch:6}{full['saved']:10.1%}{most['saved']:8.1%}  {most['alpha']}_{most['resolution']}"
                f" {len(most['pairs'])}" + "".join(f" {p['shape']}" for p in sorted(most["pairs"], key=_saving)[-1:])
            )
    material = [row for row in rows if row["saved"] >= MATERIAL]
    ratios = sorted(p["instructions"] for row in rows for p in row["pairs"])
    lines += ["", f"{len(material)} of {len(rows)} networks save {MATERIAL:.0%} or more."]
    if ratios:
        lines.append(f"Instructions of a pair over those of one launch, machine code: median {_median(ratios):.2f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.pairs", description="one launch or pairs, predicted")
    parser.add_argument("--batch", type=int, nargs="+", default=list(BATCHES))
    known = json.loads(FUSED.read_text())
    names = {arch.gpu: arch for arch in ARCHITECTURES.values() if "float16" in known.get(arch.name, {})}
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


@cache
def _blocks(alpha: float, resolution: int) -> list[plan.Block]:
    return plan.network(alpha, resolution)


def _median(ordered: list[float]) -> float:
    return ordered[len(ordered) // 2]


def _saving(pair: dict[str, Any]) -> float:
    return pair["saves_us"]


if __name__ == "__main__":
    sys.exit(main())
