"""`python -m bench.cpu_stages`: mbv2's training step on a CPU stage by stage: time, share of the peak, bytes moved.

The peak is that of multiply-adds, measured in the same run; bytes are of the activations that a stage reads and writes.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cpu_training import CLASSES, LAST, Case, make_runners
from mbv2.kernels import cpu_network
from mbv2.kernels.cpu import stages


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


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="1.0_224", help="width_resolution [%(default)s]")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise SystemExit(cpu_network.refusal())
    width, resolution = options.model.split("_")
    case = Case(float(width), int(resolution), options.batch, options.threads)
    show_profile(case, profile(case))


if __name__ == "__main__":
    main()
