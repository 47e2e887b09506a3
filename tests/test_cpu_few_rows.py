"""1x1 convolutions of few rows in training on a CPU, whose weights are packed where they are used, against float64."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Gpu
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from stage_check import activations, batch_norm_of, check_stage, coefficients, weights
from torch import Tensor

from mbv2.kernels import cpu_network
from mbv2.kernels.cpu import stages

ISAS = [] if cpu_network.refusal() else cpu_network.usable_isas()
HERE = Gpu("cpu", "cpu", [])
# csrc/cpu/train_few_work.h: a batch of this many positions is the last that counts as few.
MOST = 256

pytestmark = pytest.mark.skipif(not ISAS, reason=f"{cpu_network.refusal()}")


@pytest.fixture(params=cpu_network.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in ISAS:
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setenv("MBV2_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def calls(
    rows: int, inputs: int, outputs: int, dtype: torch.dtype
) -> list[tuple[Callable[..., Any], tuple[Any, ...], int]]:
    """Every product stage with all it can be asked for, its arguments, and which of them is the weight."""
    x, y = activations(1, inputs, 1, rows, dtype), activations(1, outputs, 1, rows, dtype, 1)
    grad, skip = activations(1, outputs, 1, rows, dtype, 2), activations(1, inputs, 1, rows, dtype, 3)
    weight, coef = weights(outputs, inputs, 1, 1, dtype=dtype), coefficients(outputs, dtype)
    bn = batch_norm_of(activations(2, inputs, 5, 5, dtype, 4))
    made: list[tuple[Callable[..., Any], tuple[Any, ...], int]] = [
        (stages.expand, (x, weight), 1),
        (stages.project, (x, bn, weight), 2),
    ]
    for need in ((True, True), (True, False), (False, True)):
        made.append((stages.project_backward, (grad, y, coef, weight, x, bn, *need), 3))
        made.append((stages.expand_backward, (grad, y, coef, weight, x, skip if need[1] else None, *need), 3))
    return made


def check(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    for stage, arguments, _ in calls(rows, inputs, outputs, dtype):
        # Sums over few positions cancel almost to nothing at times, for either side.
        check_stage(HERE, stage, *arguments, slack=3)


def listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def assert_same_bits(one: Any, other: Any, label: str) -> None:
    for a, b in zip(listed(one), listed(other), strict=True):
        assert (a is None) == (b is None), label
        assert a is None or torch.equal(a, b), label


@settings(max_examples=25, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    rows=st.integers(1, MOST),
    inputs=st.integers(1, 90),
    outputs=st.integers(1, 90),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    isa=st.sampled_from(ISAS or ["portable"]),
)
def test_few_rows_are_as_good_as_eager(rows: int, inputs: int, outputs: int, dtype: torch.dtype, isa: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBV2_CPU_ISA", isa)
        check(rows, inputs, outputs, dtype)


@pytest.mark.parametrize("shape", [(49, 160, 963), (49, 963, 160), (MOST, 33, 130), (MOST + 1, 33, 130)], ids=str)
def test_a_late_block_and_either_side_of_the_limit_are_as_good_as_eager(isa: str, shape: tuple[int, int, int]) -> None:
    check(*shape, torch.float32)


@pytest.mark.parametrize("rows", [MOST, MOST + 1])
def test_a_value_that_is_not_finite_reaches_what_depends_on_it_and_nothing_else(isa: str, rows: int) -> None:
    for stage, arguments, _ in calls(rows, 21, 37, torch.float32):
        clean = listed(stage(*arguments))
        for value in (float("nan"), float("inf")):
            # The first argument: x of the forward passes, the gradient of the backward passes.
            broken = arguments[0].clone(memory_format=torch.preserve_format)
            broken[0, 3, 0, rows - 1] = value
            for before, after in zip(clean, listed(stage(broken, *arguments[1:])), strict=True):
                if before is None or before.dim() == 3 or before.shape[2:] != broken.shape[2:]:
                    continue
                assert torch.equal(before[..., : rows - 1], after[..., : rows - 1]), stage.__name__
                if value != value:
                    # ReLU6's mask zeroes a gradient whatever it was; all other values depend on the NaN.
                    last = after[0, :, 0, -1]
                    hit = last.isnan() | (last == 0) if stage is stages.project_backward else last.isnan()
                    assert hit.all(), stage.__name__
                    assert last.isnan().any(), stage.__name__


def test_rows_of_a_weight_may_lie_apart(isa: str) -> None:
    for stage, arguments, place in calls(50, 21, 37, torch.float32):
        weight = arguments[place]
        wide = torch.full((37, 30, 1, 1), float("nan"))
        wide[:, :21] = weight
        moved = [wide[:, :21] if i == place else a for i, a in enumerate(arguments)]
        got, wanted = listed(stage(*moved)), listed(stage(*arguments))
        assert_same_bits(got, wanted, stage.__name__)
        gradient = got[-1]
        if isinstance(gradient, Tensor) and gradient.shape == weight.shape:
            assert gradient.stride(0) == 30


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_and_repetition_change_no_bit(isa: str, dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    # Above a million multiply-adds, so that other threads are woken; the last with fewer panels than threads.
    for shape in ((49, 165, 241), (200, 401, 19)):
        for stage, arguments, _ in calls(*shape, dtype):
            results = []
            for count in (1, 2, 3, 1):
                threads(count)
                results.append(stage(*arguments))
            for other in results[1:]:
                assert_same_bits(results[0], other, stage.__name__)
