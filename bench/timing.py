"""Timings for machines that are not quiet: interleaved rounds, medians, and ratios round by round."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

MOST_ROUNDS = 1000


@dataclass
class Times:
    """Seconds of every round, on the clock and on the process's cores."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)


def interleaved(
    runs: dict[str, Callable[[], object]], seconds: float, device: torch.device, least_rounds: int = 5
) -> dict[str, Times]:
    """Time every run once per round, so that all see the same disturbances, for `seconds` or `least_rounds`.

    Each run is called once beforehand. On a GPU a round ends when the device has finished.
    """
    found = {name: Times() for name in runs}
    for run in runs.values():
        run()
    _finish(device)
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < least_rounds or (time.perf_counter() < end and rounds < MOST_ROUNDS):
        for name, run in runs.items():
            start, start_cpu = time.perf_counter(), time.process_time()
            run()
            _finish(device)
            found[name].wall.append(time.perf_counter() - start)
            found[name].cpu.append(time.process_time() - start_cpu)
        rounds += 1
    return found


def summary(times: Times, baseline: Times, device: torch.device) -> dict[str, float]:
    """Median and spread in milliseconds, and how often faster than the baseline.

    `faster` is the median of the rounds' ratios, `faster_low` and `faster_high` their quartiles; of time on the cores
    when the device is the CPU, as another process that runs there changes the clock's time and not this one.
    """
    own, other = (times.wall, baseline.wall) if device.type == "cuda" else (times.cpu, baseline.cpu)
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    low, middle, high = quartiles(ratios)
    p25, median, p75 = quartiles(times.wall)
    return {
        "median_ms": 1e3 * median,
        "p25_ms": 1e3 * p25,
        "p75_ms": 1e3 * p75,
        "min_ms": 1e3 * min(times.wall),
        "cpu_median_ms": 1e3 * statistics.median(times.cpu),
        "faster": middle,
        "faster_low": low,
        "faster_high": high,
    }


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """25 %, 50 % and 75 % of at least two values."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
