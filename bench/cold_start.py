"""`python -m bench cold`: what a fresh process spends until its first logits, beyond importing torch.

Every runner is started anew in each of the interleaved rounds: it imports its library, builds 1.0_224 with weights
from a file, makes it ready and runs one picture. Time on the cores is given next to the clock's; the packages' bytecode
is cached, as after an installation. `ready` is `optimize_for_inference` for mbv2.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import report, schema
from bench.cold_process import EAGER, OPTIMIZED, PLAIN, RANDOM
from bench.tables import Column
from mbv2.progress import Progress

STEPS = ("import", "create", "ready", "first")
RUNNERS = (OPTIMIZED, PLAIN, RANDOM, EAGER)
COLUMNS = (
    Column("runner", "runner"),
    *(Column(f"{step}_cpu_ms", step, ".0f") for step in STEPS),
    Column("cpu_ms", "together, CPU ms", ".0f"),
    Column("cpu_min_ms", "least", ".0f"),
    Column("cpu_max_ms", "most", ".0f"),
    Column("wall_ms", "clock ms", ".0f"),
)


def in_a_fresh_process(runner: str, weights: str, bytecode: str) -> dict[str, list[float]]:
    """What `bench.cold_process` measures of `runner`; its modules' bytecode is kept in the folder `bytecode`."""
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": bytecode}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-m", "bench.cold_process", runner, weights]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], env=environment
    )
    return json.loads(done.stdout)


def row(runner: str, runs: list[dict[str, list[float]]]) -> schema.Row:
    """Medians of the steps, and median and extremes of their sum, over a runner's processes."""
    together = [sum(run["cpu"]) for run in runs]
    steps = zip(STEPS, zip(*[run["cpu"] for run in runs], strict=True), strict=True)
    return {
        "runner": runner,
        "processes": len(runs),
        **{f"{step}_cpu_ms": statistics.median(times) for step, times in steps},
        "cpu_ms": statistics.median(together),
        "cpu_min_ms": min(together),
        "cpu_max_ms": max(together),
        "wall_ms": statistics.median(sum(run["wall"]) for run in runs),
    }


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    import torchvision

    parser = report.parser("cold", __doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="processes of each runner [%(default)s]")
    options = parser.parse_args(argv)
    result = schema.new("cold", argv, {"model": "1.0_224", "rounds": options.rounds, "batch": 1})
    total = (options.rounds + 1) * len(RUNNERS)
    runs: dict[str, list[dict[str, list[float]]]] = {runner: [] for runner in RUNNERS}
    with tempfile.TemporaryDirectory() as folder, Progress(total, "cold", "processes") as progress:
        weights = str(Path(folder) / "weights.pth")
        torch.save(torchvision.models.mobilenet_v2().state_dict(), weights)
        for number in range(options.rounds + 1):
            for runner in RUNNERS:
                run = in_a_fresh_process(runner, weights, folder)
                if number:  # the first round compiles the modules
                    runs[runner].append(run)
                progress.advance()
    result.rows.extend(row(runner, runs[runner]) for runner in RUNNERS)
    return report.finish(result, COLUMNS, options.out)
