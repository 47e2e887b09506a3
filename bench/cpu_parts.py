"""`python -m bench cpu_parts`: our network on one CPU thread, part by part: time, GFLOP/s, share of the peak, GB/s.

Parts are timed inside whole runs; of every part its fastest run is given, and the peak of multiply-adds is the best
measured between the runs. Bytes are the least a part has to move: weights, input and output.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

import mbv2
from bench import report, schema
from bench.cpu_peers import make_models
from bench.kernels import variant
from bench.tables import Column
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.kernels.cpu_network import BlockShape
from mbv2.optimized import block_shapes

COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("part", "part"),
    Column("least_ms", "ms", ".3f"),
    Column("gflop_per_s", "GFLOP/s", ".1f"),
    Column("peak_percent", "% of peak", ".0f"),
    Column("gb_per_s", "GB/s", ".1f"),
)


def part_work(blocks: list[BlockShape], last_channels: int, classes: int, resolution: int) -> list[dict[str, Any]]:
    """Floating-point operations and least traffic in bytes (weights, input, output) of each part for one picture."""
    size = (resolution + 1) // 2
    parts = []
    for index, block in enumerate(blocks):
        out = (size - 1) // block.stride + 1
        taps = 27 if index == 0 else block.inputs
        weights = taps * block.hidden + 9 * block.hidden + block.hidden * block.outputs
        work = taps * block.hidden * size**2 + (9 + block.outputs) * block.hidden * out**2
        entering = 3 * resolution**2 if index == 0 else block.inputs * size**2
        moved = weights + entering + block.outputs * out**2
        name = f"block {index + 1}" + (" with the stem" if index == 0 else "")
        parts.append({"name": name, "flop": 2 * work, "weight_bytes": 4 * weights, "bytes": 4 * moved})
        size = out
    outputs = blocks[-1].outputs
    for name, inputs, channels, pixels in (
        ("head", outputs, last_channels, size**2),
        ("classifier", last_channels, classes, 1),
    ):
        weights = inputs * channels
        moved = weights + inputs * pixels + channels
        parts.append({"name": name, "flop": 2 * weights * pixels, "weight_bytes": 4 * weights, "bytes": 4 * moved})
    return parts


@torch.no_grad()
def measure(model_name: str, batch: int, seconds: float) -> tuple[list[schema.Row], float]:
    """A row for each part and one for the whole run, and the peak in FLOP/s."""
    width, resolution = variant(model_name)
    model = make_models(width)[0]
    fast = mbv2.optimize_for_inference(model)
    x = torch.randn(batch, 3, resolution, resolution)
    runs, peaks = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(runs) < 5:
        runs.append(torch.ops.mbv2.cpu_network_times(x, fast._packed, fast._plan, fast.isa))
        peaks.append(torch.ops.mbv2.cpu_fma_rate(fast.isa))
    every, peak = torch.stack(runs), max(peaks)
    parts = part_work(block_shapes(model), model.last_channel, model.num_classes, resolution)
    taken = [*every.min(dim=0).values.tolist(), every.sum(dim=1).min().item()]
    whole = {"name": "the whole run", **{key: sum(part[key] for part in parts) for key in _COUNTS}}
    return [
        {"model": model_name, "batch": batch, "runs": len(runs), **_figures(part, batch, least, peak)}
        for part, least in zip([*parts, whole], taken, strict=True)
    ], peak


_COUNTS = ("flop", "weight_bytes", "bytes")


def _figures(part: dict[str, Any], batch: int, seconds: float, peak: float) -> schema.Row:
    work = part["flop"] * batch
    moved = part["weight_bytes"] + batch * (part["bytes"] - part["weight_bytes"])
    return {
        "part": part["name"],
        "least_ms": 1e3 * seconds,
        "gflop_per_s": work / seconds / 1e9,
        "peak_percent": 100 * work / seconds / peak,
        "gb_per_s": moved / seconds / 1e9,
    }


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu_parts", __doc__.split("\n")[0], seconds=8.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise UserError(cpu_network.refusal())
    settings = {"isa": cpu_network.isa(), "seconds": options.seconds, "threads": 1, "peak_gflops": 0.0}
    result = schema.new("cpu_parts", argv, settings)
    torch.set_num_threads(1)
    for model in options.models:
        for batch in options.batches:
            rows, peak = measure(model, batch, options.seconds)
            result.rows.extend(rows)
            settings["peak_gflops"] = max(settings["peak_gflops"], peak / 1e9)
    return report.finish(result, COLUMNS, options.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
