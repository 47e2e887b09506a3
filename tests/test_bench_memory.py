"""Saved bytes against a count by hand, and the peak of a process of its own."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from bench import memory


def test_saved_bytes_are_counted_once_and_without_parameters() -> None:
    linear = nn.Linear(8, 4)
    x = torch.randn(3, 8, requires_grad=True)

    def run(x: torch.Tensor) -> torch.Tensor:
        y = linear(x)
        # The product keeps y twice and its square once: two storages of 3 x 4, next to x.
        return (y * y).exp()

    assert memory.saved_bytes(run, list(linear.parameters()), x) == 4 * (3 * 8 + 3 * 4 + 3 * 4)


@pytest.mark.slow
def test_ours_save_least() -> None:
    found = memory.saved_megabytes(64, 1, torch.bfloat16)
    assert found[memory.OURS] < found[memory.COMPILED] < found[memory.EAGER]


def test_a_peak_is_put_into_its_runners_row_or_a_row_of_its_own() -> None:
    rows: list[dict[str, object]] = [{"runner": "a"}, {"runner": "b"}]
    memory._put(rows, "a", 100.0)
    memory._put(rows, "c", 50.0)
    assert rows[0] == {"runner": "a", "peak_mb": 100.0, "less_peak": 1}
    assert rows[2] == {"runner": "c", "peak_mb": 50.0, "less_peak": 2}


@pytest.mark.slow
def test_a_larger_batch_has_a_larger_peak_and_the_backend_is_told() -> None:
    peaks = []
    for batch in ("1", "64"):
        command = [sys.executable, "-m", "bench.memory", memory.NETWORK, "64", batch]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        backends, peak = json.loads(done.stdout)
        assert backends
        peaks.append(peak)
    assert peaks[1] > peaks[0] > 0
