"""Measured tables of tiles: each kernel's candidates timed on this machine's GPU, for MBV2_TILES.

    python -m bench.tune folder                    all kernels
    python -m bench.tune folder --kernel expand    one
    MBV2_TILES=folder python -m mbv2.train ...     what is found there goes before the tables of the project

One process is enough: every rank of a run must read the same tables, as equal shapes then give equal bits.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from bench import planner
from bench.occupancy import ARCHITECTURES
from bench.workload import Call
from mbv2.files import write_atomic
from mbv2.kernels.triton import tuning


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.tune", description="time the kernels' tiles on a GPU")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kernel", nargs="*", default=sorted(planner.candidates()))
    arguments = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("no GPU here; the tables of the project come from `python -m bench.resources plan`", file=sys.stderr)
        return 1
    for kernel in arguments.kernel:
        entries = []
        for itemsize in (2, 4):
            # Which sizes a launcher names is the same on all architectures.
            calls = planner.shapes(kernel, ARCHITECTURES[80], itemsize)
            entries += [{"bytes": itemsize, **entry} for entry in measured(kernel, calls, "cuda")]
        write(arguments.folder, kernel, entries)
        print(f"{kernel}: {len(entries)} entries", flush=True)
    return 0


def measured(kernel: str, calls: Iterable[tuple[dict[str, int], Call]], device: str) -> list[dict[str, Any]]:
    """A table's entries from timing every candidate of `kernel` in these calls, given with the sizes they name."""
    metas = planner.candidates()[kernel]
    times = []
    for sizes, call in calls:
        args = [_filled(value, device) for value in call.args]
        seconds = [
            _seconds(kernel, meta, call.stage, args) if planner.covers(kernel, sizes, meta) else float("inf")
            for meta in metas
        ]
        times.append((sizes, seconds))
    return [planner.within(kernel, entry) for entry in planner.entries_of(planner.points_of(times), metas)]


def write(folder: Path, kernel: str, entries: list[dict[str, Any]]) -> None:
    """Make `folder`/`kernel`.json the table with these entries for the architecture of the GPU."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / f"{kernel}.json", planner.formatted({tuning.architecture(): entries}).encode())


def _seconds(kernel: str, meta: dict[str, int], stage: str, args: list[Any]) -> float:
    """Median time of the stage with this tile; infinite where it cannot be launched."""
    from mbv2.kernels.triton import stages

    benchmark = triton.runtime.driver.active.get_benchmarker()
    with tuning.forced(kernel, **meta):
        try:
            return benchmark(lambda: getattr(stages, stage)(*args), quantiles=(0.5, 0.2, 0.8))[0]
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def _filled(value: Any, device: str) -> Any:
    """A tensor without memory as one with random values, and the same strides, on the device."""
    if not isinstance(value, Tensor):
        return value
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    return made.copy_(torch.rand(value.shape, device=device) + 0.5)
