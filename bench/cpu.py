"""Inference on a CPU against what else runs MobileNetV2 there: tables, JSON and a picture.

python -m bench.cpu --out results/cpu            # everything, about 12 minutes
python -m bench.cpu --quick                      # 1.0_224 alone, about 2 minutes

Every runner gets the same weights and its logits are compared with the model's in float64 before anything is timed.
Timings are interleaved: each round times every runner once, so that all see the same disturbances; minimum, median
and the 90th percentile of the rounds are printed, and the share of the multiply-add peak measured between the rounds.
The time that the process was on a core is given beside it: on a busy machine, and with one thread, it is the one to
compare. Peers that are not installed are left out (`pip install 'mbv2[bench]'`). The second table has our parts of the
network one by one, the third the ratios over ours.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mbv2
from bench.cpu_peers import RUNNERS, Case, Runner, make_models
from mbv2.kernels import cpu_network
from mbv2.kernels.cpu_network import BlockShape
from mbv2.optimized import block_shapes

QUICK = [Case(1.0, 224, batch, 1) for batch in (1, 32)]
CASES = [
    *(Case(1.0, 224, batch, threads) for threads in (1, 2) for batch in (1, 32)),
    *(Case(width, size, 1, 1) for width, size in ((1.4, 224), (0.5, 160), (0.35, 96))),
]
PACKAGES = ("torch", "torchvision", "ai-edge-litert", "openvino", "onnxruntime")


def multiply_adds(width: float, resolution: int) -> int:
    """Multiply-adds of one picture."""
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torchvision.models.mobilenet_v2(width_mult=width).eval()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def prepare(case: Case, wanted: list[str], folder: str) -> tuple[dict[str, Runner], Tensor, dict[str, str]]:
    """The runners whose logits are right, the pictures, and why the others are left out."""
    models = make_models(case.width)
    x = torch.randn(case.batch, 3, case.resolution, case.resolution)
    expected = models[1].double()(x.double())
    models[1].float()
    runners, left_out = {}, {}
    for name in wanted:
        try:
            runner = RUNNERS[name](models, case, x, folder)
            logits = torch.as_tensor(runner(x))
        except Exception as error:  # a peer that fails in its own way must not end the comparison of the others
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if difference < 1e-4:
            runners[name] = runner
        else:
            left_out[name] = f"wrong logits (relative error {difference:.1e})"
    return runners, x, left_out


def measure(case: Case, wanted: list[str], seconds: float, folder: str) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    runners, x, left_out = prepare(case, wanted, folder)
    times: dict[str, list[float]] = {name: [] for name in runners}
    busy: dict[str, list[float]] = {name: [] for name in runners}
    peaks = []
    for runner in runners.values():
        runner(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(peaks) < 5:
        for name, runner in runners.items():
            start, start_busy = time.perf_counter(), time.process_time()
            runner(x)
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
        peaks.append(torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()))
    peak = max(peaks) * case.threads
    work = 2 * case.batch * multiply_adds(case.width, case.resolution)
    rows = {}
    for name, taken in times.items():
        ordered, own = sorted(taken), busy.get("mbv2", busy[name])
        rows[name] = {
            "min_ms": 1e3 * ordered[0],
            "median_ms": 1e3 * statistics.median(ordered),
            "p90_ms": 1e3 * ordered[int(0.9 * (len(ordered) - 1))],
            "percent_of_peak": 100 * work / ordered[0] / peak,
            "over_ours": ordered[0] / min(times.get("mbv2", ordered)),
            "cpu_min_ms": 1e3 * min(busy[name]),
            "cpu_median_ms": 1e3 * statistics.median(busy[name]),
            "cpu_over_ours": min(busy[name]) / min(own),
            "cpu_median_over_ours": statistics.median(busy[name]) / statistics.median(own),
        }
    result = {
        "case": case._asdict(),
        "name": case.name,
        "rounds": len(peaks),
        "peak_gflops": peak / 1e9,
        "load": os.getloadavg()[0],
        "isa": cpu_network.isa(),
        "rows": rows,
        "left_out": left_out,
    }
    if case.threads > 1:
        result["handover_ns"] = 1e9 * torch.ops.mbv2.cpu_handover()
    return result


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


def measure_parts(width: float, resolution: int, batch: int, seconds: float) -> dict[str, Any]:
    """Our network part by part inside whole runs, one thread; of every part its fastest run."""
    model = make_models(width)[0]
    blocks = block_shapes(model)
    fast = mbv2.optimize_for_inference(model)
    x = torch.randn(batch, 3, resolution, resolution)
    runs, peaks = [], []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(runs) < 5:
        runs.append(torch.ops.mbv2.cpu_network_times(x, fast._packed, fast._plan, fast.isa))
        peaks.append(torch.ops.mbv2.cpu_fma_rate(fast.isa))
    best, peak = torch.stack(runs).min(dim=0).values.tolist(), max(peaks)
    parts = part_work(blocks, model.last_channel, model.num_classes, resolution)
    for part, taken in zip(parts, best, strict=True):
        work = part["flop"] * batch
        moved = part["weight_bytes"] + batch * (part["bytes"] - part["weight_bytes"])
        part |= {"ms": 1e3 * taken, "gflops": work / taken / 1e9, "gb_per_s": moved / taken / 1e9}
        part["percent_of_peak"] = 100 * work / taken / peak
    return {
        "name": f"{width}_{resolution} batch {batch}, 1 thread, part by part",
        "peak_gflops": peak / 1e9,
        "isa": fast.isa,
        "parts": parts,
    }


def show(result: dict[str, Any]) -> None:
    handover = f", a cache line goes over in {result['handover_ns']:.0f} ns" if "handover_ns" in result else ""
    print(
        f"\n{result['name']}: {result['rounds']} rounds, {result['isa']}, FMA peak {result['peak_gflops']:.0f} "
        f"GFLOP/s, load {result['load']:.1f}{handover}"
    )
    columns = ("min_ms", "median_ms", "p90_ms", "percent_of_peak", "over_ours", "cpu_min_ms", "cpu_median_ms")
    columns += ("cpu_over_ours", "cpu_median_over_ours")
    heads = ("min ms", "median", "p90", "% peak", "/ours", "CPU ms", "median", "/ours", "median/ours")
    print(f"{'':<20}" + "".join(f" {head:>11}" for head in heads))
    for name, row in result["rows"].items():
        print(f"{name:<20}" + "".join(f" {row[column]:11.3f}" for column in columns))
    for name, why in result["left_out"].items():
        print(f"{name:<20} left out: {why.splitlines()[0][:90]}")
    sys.stdout.flush()


def show_parts(result: dict[str, Any]) -> None:
    print(f"\n{result['name']}: {result['isa']}, FMA peak {result['peak_gflops']:.0f} GFLOP/s")
    print(f"{'':<22} {'ms':>9} {'GFLOP/s':>9} {'% peak':>9} {'GB/s':>9}")
    for part in result["parts"]:
        figures = (part["ms"], part["gflops"], part["percent_of_peak"], part["gb_per_s"])
        print(f"{part['name']:<22}" + "".join(f" {figure:9.3f}" for figure in figures))
    sys.stdout.flush()


def summarise(results: list[dict[str, Any]]) -> None:
    """The peers over ours in time on the core, and batch 32 against the best peer looped over batch 1."""
    print("\nTime on the core over ours (fastest round; median in brackets)")
    for result in results:
        peers = {name: row for name, row in result["rows"].items() if name != "mbv2"}
        figures = (
            f"{name} {row['cpu_over_ours']:.2f} ({row['cpu_median_over_ours']:.2f})" for name, row in peers.items()
        )
        print(f"{result['name']}: " + ", ".join(figures))
    single = {
        result["case"]["batch"]: result
        for result in results
        if result["case"] == {**results[0]["case"], "batch": result["case"]["batch"]}
    }
    if {1, 32} <= single.keys() and "mbv2" in single[32]["rows"]:
        best = min((row["cpu_min_ms"], name) for name, row in single[1]["rows"].items() if name != "mbv2")
        ratio = 32 * best[0] / single[32]["rows"]["mbv2"]["cpu_min_ms"]
        print(f"{single[32]['name']} against {best[1]} looped over batch 1: {ratio:.2f}")


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 2.4 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        names = list(result["rows"])[::-1]
        axis.barh(names, [result["rows"][name]["cpu_min_ms"] for name in names])
        axis.set_title(f"{result['name']} (time on the core, fastest round, ms)")
    figure.tight_layout()
    figure.savefig(path)


def environment() -> dict[str, Any]:
    """Machine, versions and date of a run."""
    from mbv2 import doctor

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    # The doctor tries a training step as well.
    with torch.enable_grad():
        cpu = doctor.examine()["cpu"]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="minutes"),
        "cpu": cpu,
        "platform": platform.platform(),
        "versions": versions,
    }


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="1.0_224 at batch 1 and 32, one thread, about 2 minutes")
    parser.add_argument("--models", nargs="+", help="width_resolution, instead of the usual cases")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32], help="with --models")
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="with --models")
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    parser.add_argument("--seconds", type=float, help="for each case (default: 60; 20 with --quick)")
    parser.add_argument("--out", type=Path, help="file name without suffix for .json and .png")
    options = parser.parse_args()
    seconds = options.seconds or (20 if options.quick else 60)
    cases = QUICK if options.quick else CASES
    if options.models:
        sizes = [model.split("_") for model in options.models]
        pairs = [(batch, threads) for threads in options.threads for batch in options.batches]
        cases = [Case(float(width), int(size), *pair) for width, size in sizes for pair in pairs]
    results, parts = [], []
    for case in cases:
        with tempfile.TemporaryDirectory() as folder:
            results.append(measure(case, options.runners, seconds, folder))
        show(results[-1])
    for width, size, batch in dict.fromkeys((case.width, case.resolution, case.batch) for case in cases[:2]):
        parts.append(measure_parts(width, size, batch, seconds / 4))
        show_parts(parts[-1])
    summarise(results)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": environment(), "results": results, "parts": parts}
        options.out.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n")
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
