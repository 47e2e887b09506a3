"""Training steps on a CPU against what a PyTorch user has there: one table and JSON.

python -m bench.cpu_training --threads 1 2 --out results/cpu_training
python -m bench.cpu_training --quick
python -m bench.cpu_training --stages

A step is forward, cross entropy, backward and SGD with momentum. Every runner starts from the same weights; before
anything is timed its loss and all its gradients on a few pictures are compared with torchvision's in float64, and a
runner whose error is beyond that of eager in its own precision gets no time. Steps are interleaved: each round times
every runner once, so that all see the same disturbances. Given are the time on the cores (of all threads together; on
a busy machine the one to compare), its median and spread, and the wall clock's minimum. `--stages` profiles
mbv2 stage by stage: time, share of the multiply-add peak measured beside it, bytes moved.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import mbv2
from bench.memory import saved_bytes
from mbv2 import kernels
from mbv2.kernels import cpu_network
from mbv2.kernels.cpu import stages

CLASSES = 1000
# Pictures of the comparison with float64: batch statistics need a few, float64 is slow.
CHECKED = 4
SECONDS, ROUNDS = 40.0, 3


class Case(NamedTuple):
    width: float
    resolution: int
    batch: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.width}_{self.resolution} batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"


class Runner(NamedTuple):
    """A way to train: a model, the layout of its pictures, and the type autocast computes in (None: off)."""

    model: nn.Module
    layout: torch.memory_format
    autocast: torch.dtype | None

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            logits = self.model(x.to(memory_format=self.layout))
        return nn.functional.cross_entropy(logits.float(), labels)


NCHW, LAST, HALF = torch.contiguous_format, torch.channels_last, torch.bfloat16


def make_runners(width: float, wanted: list[str]) -> tuple[dict[str, Runner], nn.Module]:
    """The runners asked for, all with the weights of the plain torchvision model that is returned too."""
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v2(width_mult=width, dropout=0.0).train()
    ours = mbv2.MobileNetV2(CLASSES, width, dropout=0.0).train()
    ours.load_state_dict(plain.state_dict())

    def last(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=LAST)

    makers: dict[str, Callable[[], Runner]] = {
        "mbv2": lambda: Runner(last(ours), LAST, None),
        "mbv2 bf16 autocast": lambda: Runner(last(ours), LAST, HALF),
        "eager channels_last": lambda: Runner(last(plain), LAST, None),
        "eager NCHW": lambda: Runner(copy.deepcopy(plain), NCHW, None),
        "eager channels_last bf16 autocast": lambda: Runner(last(plain), LAST, HALF),
        "torch.compile": lambda: Runner(torch.compile(copy.deepcopy(plain)), NCHW, None),
    }
    return {name: makers[name]() for name in wanted}, plain


RUNNERS = (
    "mbv2",
    "eager channels_last",
    "eager NCHW",
    "eager channels_last bf16 autocast",
    "mbv2 bf16 autocast",
    "torch.compile",
)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """Loss and all gradients of `model` as one vector in float64; the gradients are cleared."""
    loss.backward()
    parts = [loss.detach().double().reshape(1)]
    for parameter in model.parameters():
        parts.append(parameter.grad.double().contiguous().flatten())
        parameter.grad = None
    return torch.cat(parts)


def errors(case: Case, runners: dict[str, Runner], plain: nn.Module) -> dict[str, float]:
    """Relative error of each runner's loss and gradients against float64."""
    x = torch.randn(CHECKED, 3, case.resolution, case.resolution)
    labels = torch.randint(CLASSES, (CHECKED,))
    exact_model = copy.deepcopy(plain).double()
    exact = gradients(nn.functional.cross_entropy(exact_model(x.double()), labels), exact_model)
    found = {}
    for name, runner in runners.items():
        trial = runner._replace(model=copy.deepcopy(runner.model))
        got = gradients(trial.loss(x, labels), trial.model)
        found[name] = float((got - exact).norm() / exact.norm())
    return found


def allowed(found: dict[str, float], runner: Runner, peers: dict[str, Runner]) -> float:
    """1.3 times the worst eager error in the runner's precision, and a floor."""
    eager = [found[name] for name, peer in peers.items() if "eager" in name and peer.autocast == runner.autocast]
    return 1.3 * max(eager, default=0.0) + (1e-4 if runner.autocast is None else 1e-2)


def measure(case: Case, wanted: list[str], seconds: float) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    runners, plain = make_runners(case.width, wanted)
    found = errors(case, runners, plain)
    left_out = {
        name: f"wrong: loss and gradients differ from float64 by {found[name]:.1e}"
        for name, runner in runners.items()
        if not found[name] <= allowed(found, runner, runners)
    }
    runners = {name: runner for name, runner in runners.items() if name not in left_out}
    x = torch.randn(case.batch, 3, case.resolution, case.resolution)
    labels = torch.randint(CLASSES, (case.batch,))
    saved = {}
    for name, runner in runners.items():
        if name != "torch.compile":
            kept = [*runner.model.parameters(), *runner.model.buffers(), x, labels]
            saved[name] = saved_bytes(lambda y, r=runner: r.loss(y, labels), kept, x) / case.batch / 2**20
    times = timed_rounds(runners, x, labels, seconds)
    peak = torch.ops.mbv2.cpu_fma_rate(cpu_network.isa())
    return {
        "case": case._asdict(),
        "name": case.name,
        "isa": cpu_network.isa(),
        "peak_gflops_a_core": peak / 1e9,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "rows": {name: row(times, name, case, found[name], saved.get(name)) for name in runners},
        "left_out": left_out,
    }


def timed_rounds(
    runners: dict[str, Runner], x: Tensor, labels: Tensor, seconds: float
) -> dict[str, list[tuple[float, float]]]:
    """(time on the cores, wall clock) of each runner's steps, the first of which is not counted."""
    optimizers = {
        name: torch.optim.SGD(runner.model.parameters(), 1e-4, momentum=0.9, weight_decay=4e-5)
        for name, runner in runners.items()
    }
    inputs = {name: x.to(memory_format=runner.layout) for name, runner in runners.items()}
    times: dict[str, list[tuple[float, float]]] = defaultdict(list)
    rounds, end = -1, time.perf_counter() + seconds
    while rounds < ROUNDS or time.perf_counter() < end:
        for name, runner in runners.items():
            wall, busy = time.perf_counter(), time.process_time()
            runner.loss(inputs[name], labels).backward()
            optimizers[name].step()
            optimizers[name].zero_grad(set_to_none=True)
            if rounds >= 0:
                times[name].append((time.process_time() - busy, time.perf_counter() - wall))
        rounds += 1
    return times


def row(
    times: dict[str, list[tuple[float, float]]], name: str, case: Case, error: float, saved: float | None
) -> dict[str, Any]:
    busy = sorted(t for t, _ in times[name])
    ours = times.get("mbv2", times[name])
    # Of each round, so that a disturbance that lasts hits both.
    ratios = sorted(theirs[0] / mine[0] for theirs, mine in zip(times[name], ours, strict=True))
    median = statistics.median(busy)
    return {
        "steps": len(busy),
        "cpu_min_ms": 1e3 * busy[0],
        "cpu_median_ms": 1e3 * median,
        "cpu_p90_ms": 1e3 * busy[int(0.9 * (len(busy) - 1))],
        "wall_min_ms": 1e3 * min(wall for _, wall in times[name]),
        "images_per_cpu_second": case.batch / median,
        "over_ours": statistics.median(ratios),
        "over_ours_range": [ratios[0], ratios[-1]],
        "error": error,
        "saved_mib_per_image": saved,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['name']}: {result['isa']}, FMA peak {result['peak_gflops_a_core']:.0f} GFLOP/s a core, "
        f"load {result['load']:.1f}"
    )
    heads = ("CPU ms min", "median", "p90", "img/CPU s", "wall min", "/ours", "(range)", "error", "MiB/img")
    print(f"{'':<34}" + "".join(f" {head:>11}" for head in heads))
    for name, r in result["rows"].items():
        low, high = r["over_ours_range"]
        saved = "" if r["saved_mib_per_image"] is None else f"{r['saved_mib_per_image']:.1f}"
        print(
            f"{name:<34} {r['cpu_min_ms']:11.0f} {r['cpu_median_ms']:11.0f} {r['cpu_p90_ms']:11.0f} "
            f"{r['images_per_cpu_second']:11.1f} {r['wall_min_ms']:11.0f} {r['over_ours']:11.2f} "
            f"{f'{low:.2f}-{high:.2f}':>11} {r['error']:11.1e} {saved:>11}"
        )
    for name, why in result["left_out"].items():
        print(f"{name:<34} left out: {why}")
    sys.stdout.flush()


def profile(case: Case, steps: int = 3) -> list[dict[str, Any]]:
    """Time, multiply-adds and bytes of each stage call of a training step, by stage and shapes."""
    torch.set_num_threads(case.threads)
    runners, _ = make_runners(case.width, ["mbv2"])
    runner = runners["mbv2"]
    x = torch.randn(case.batch, 3, case.resolution, case.resolution).to(memory_format=LAST)
    labels = torch.randint(CLASSES, (case.batch,))
    runner.loss(x, labels).backward()
    rows: dict[str, dict[str, Any]] = {}

    def watched(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.process_time()
            results = function(*arguments)
            taken = time.process_time() - start
            everything = (*arguments, *(results if isinstance(results, tuple) else (results,)))
            tensors = [t for t in everything if isinstance(t, Tensor) and t.dim() == 4]
            shapes = " ".join("x".join(map(str, t.shape[1:])) for t in tensors[:4])
            entry = rows.setdefault(f"{name} {shapes}", {"calls": 0, "ms": 0.0, "flops": 0, "bytes": 0})
            entry["calls"] += 1
            entry["ms"] += 1e3 * taken / steps
            entry["flops"] += flops(name, case.batch, arguments, results) / steps
            entry["bytes"] += sum(t.numel() * t.element_size() for t in tensors) / steps
            return results

        return call

    plain = {name: getattr(stages, name) for name in stages.__all__}
    try:
        for name, function in plain.items():
            setattr(stages, name, watched(name, function))
        for _ in range(steps):
            runner.loss(x, labels).backward()
    finally:
        for name, function in plain.items():
            setattr(stages, name, function)
    peak = torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()) * case.threads
    for entry in rows.values():
        entry["percent_of_peak"] = 100 * entry["flops"] / (entry["ms"] / 1e3) / peak
        entry["gb_per_s"] = entry["bytes"] / (entry["ms"] / 1e3) / 1e9
    return sorted(({"stage": name, **entry} for name, entry in rows.items()), key=lambda entry: -entry["ms"])


def flops(stage: str, batch: int, arguments: tuple[Any, ...], results: Any) -> int:
    """Twice the multiply-adds of a convolution stage, 0 for the others."""
    weight = {"stem": 1, "expand": 1, "depthwise": 2, "project": 2}.get(stage)
    if weight is not None:
        out = results[0]
        return 2 * arguments[weight].numel() * batch * out.shape[2] * out.shape[3]
    weight = {"project_backward": 3, "depthwise_backward": 5, "expand_backward": 3, "stem_backward": 5}.get(stage)
    if weight is None:
        return 0
    products = int(arguments[-1]) + int(arguments[-2])
    return 2 * products * arguments[weight].numel() * batch * arguments[1].shape[2] * arguments[1].shape[3]


def show_profile(case: Case, rows: list[dict[str, Any]]) -> None:
    print(f"\n{case.name}, stages of a step, {sum(r['ms'] for r in rows):.0f} ms together")
    for name in sorted({r["stage"].split()[0] for r in rows}):
        own = [r for r in rows if r["stage"].split()[0] == name]
        print(f"  {name:<22}{sum(r['ms'] for r in own):8.1f} ms")
    for r in rows[:30]:
        print(f"{r['ms']:8.1f} ms {r['percent_of_peak']:5.0f} % of peak {r['gb_per_s']:6.1f} GB/s  {r['stage']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=RUNNERS)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for each case")
    parser.add_argument("--quick", action="store_true", help="batch 8, one thread, without torch.compile")
    parser.add_argument("--stages", action="store_true", help="profile mbv2's stages instead")
    parser.add_argument("--out", type=Path, help="file name without suffix for .json")
    options = parser.parse_args()
    if cpu_network.refusal() is not None:
        raise SystemExit(cpu_network.refusal())
    if options.quick:
        options.batches, options.threads, options.seconds = [8], [1], min(options.seconds, 20)
        options.runners = [name for name in options.runners if name != "torch.compile"]
    results = []
    for model in options.models:
        width, resolution = model.split("_")
        for batch in options.batches:
            for threads in options.threads:
                case = Case(float(width), int(resolution), batch, threads)
                with kernels.backend("auto"):
                    if options.stages:
                        results.append({"case": case._asdict(), "stages": profile(case)})
                        show_profile(case, results[-1]["stages"])
                    else:
                        results.append(measure(case, options.runners, options.seconds))
                        show(results[-1])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
