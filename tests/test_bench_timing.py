"""The order of interleaved rounds and the figures made of them, and what counts as a right result. Nothing is timed."""

import math

import pytest
import torch

from bench import check, timing
from bench.timing import Times

CPU = torch.device("cpu")


def test_every_round_runs_every_runner_once_in_order_after_one_run_of_each() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in ("a", "b", "c")}
    times = timing.interleaved(runs, seconds=0, device=CPU, least_rounds=4)
    assert order == list("abc") * 5
    assert all(len(taken.wall) == len(taken.cpu) == 4 for taken in times.values())


def test_a_ratio_is_the_median_over_rounds_not_the_ratio_of_medians() -> None:
    # The machine gets slower and slower, and `own` is always twice as fast.
    baseline = Times(wall=[9, 9, 9, 9, 9], cpu=[1, 2, 4, 8, 16])
    own = Times(wall=[1, 1, 1, 1, 1], cpu=[0.5, 1, 2, 4, 8])
    figures = timing.summary(own, baseline, CPU)
    assert (figures["faster"], figures["faster_low"], figures["faster_high"]) == (2, 2, 2)
    assert figures["cpu_median_ms"] == 2000


def test_on_a_gpu_the_clock_counts() -> None:
    figures = timing.summary(Times([1, 2, 3], [9, 9, 9]), Times([2, 4, 6], [1, 1, 1]), torch.device("cuda"))
    assert figures["faster"] == 2


def test_spread_is_the_quartiles() -> None:
    figures = timing.summary(Times([0.001, 0.002, 0.003, 0.004, 0.005], [1] * 5), Times([1] * 5, [1] * 5), CPU)
    assert [round(figures[key], 9) for key in ("min_ms", "p25_ms", "median_ms", "p75_ms")] == [1, 2, 3, 4]


def test_the_error_is_that_of_the_worst_tensor() -> None:
    one = torch.ones(4)
    assert check.error([one, one * 1.5], [one, one]) == pytest.approx(0.5)
    assert check.error([one], [one]) == 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_wrong(bad: float) -> None:
    error = check.error([torch.tensor([1.0, bad])], [torch.tensor([1.0, 1.0])])
    assert math.isnan(error)
    assert check.fault(error, 1e-3, torch.float32).startswith("wrong result")


def test_another_shape_is_wrong() -> None:
    assert math.isnan(check.error([torch.ones(2)], [torch.ones(3)]))


def test_a_result_may_be_twice_as_far_from_the_truth_as_plain_torch() -> None:
    assert check.fault(2e-4, 1e-4, torch.float32) is None
    assert "at most 2.0e-04 is right" in check.fault(3e-4, 1e-4, torch.float32)
