"""How long the device takes with none of the data in cache: CUDA events, L2 overwritten before every run."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

# More than any L2 there is.
FLUSH_BYTES = 512 << 20
WARM_UP, RUNS = 5, 30


def seconds(run: Callable[[], Any], device: torch.device, runs: int = RUNS) -> dict[str, float]:
    """Median and quartiles of `runs` runs, in seconds; on a CPU (rehearsals) of the clock."""
    times = _on_gpu(run, device, runs) if device.type == "cuda" else _on_cpu(run, runs)
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median_s": middle, "p25_s": low, "p75_s": high}


def exact_float32() -> None:
    """Have torch compute float32 in float32: its convolutions would take tf32 by default, products would not."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def _on_gpu(run: Callable[[], Any], device: torch.device, runs: int) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)
    for _ in range(WARM_UP):
        run()
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(runs)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in events]


def _on_cpu(run: Callable[[], Any], runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are of."""
    about: dict[str, Any] = {"torch": torch.__version__, "cuda": torch.version.cuda, "device": device.type}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        about |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "processors": properties.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        }
    return about
