"""The backward of the projection in Triton against plain torch: in one pass and in two, ragged shapes, NaN, flags."""

from typing import Any

import pytest
import torch
from conftest import Gpu
from stage_check import (
    HALF_AND_SINGLE,
    activations,
    batch_norm_of,
    check_stage,
    coefficients,
    skip_if_wrong_there,
    weights,
)
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import MEAN, SCALE, SHIFT
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.project_backward import project_backward

DTYPES = (torch.float64, *HALF_AND_SINGLE)
ONE_PASS = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_O": 16, "FOLD": 2, "num_warps": 4, "num_stages": 2}
# batch, hidden, outputs, height, width
SHAPES = (
    (1, 8, 8, 1, 1),
    (1, 40, 24, 5, 3),  # 24 outputs: two chunks of 16, and a tile of hidden channels that is not full
    (3, 32, 16, 7, 9),
)


@pytest.fixture(params=["one pass", "dy3 first", "split"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


class tiles:
    """Small tiles for one of the three ways the stage runs."""

    def __init__(self, way: str):
        split = way == "split"
        product = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
        one_pass = {**ONE_PASS, "AFFINE": int(way == "one pass")}
        self._forced = [
            tuning.forced("project_backward", **({"SPLIT": 1} if split else one_pass)),
            tuning.forced("project_backward_affine", BLOCK_M=16, BLOCK_O=16, num_warps=4, num_stages=1),
            tuning.forced("project_backward_input", **product, BLOCK_K=16),
            tuning.forced("project_backward_weight", **product, BLOCK_O=16, CHUNKS=2),
        ]

    def __enter__(self) -> None:
        for one in self._forced:
            one.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for one in reversed(self._forced):
            one.__exit__(*exception)


def arguments(shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    n, hidden, outputs, h, w = shape
    y2 = activations(n, hidden, h, w, dtype, 0)
    y3, grad = activations(n, outputs, h, w, dtype, 5), activations(n, outputs, h, w, dtype, 6)
    weight = weights(outputs, hidden, 1, 1, dtype=dtype)
    bn2 = batch_norm_of(y2) if n * h * w > 1 else batch_norm_of(activations(2, hidden, 3, 3, dtype, 0))
    return grad, y3, coefficients(outputs, dtype), weight, y2, bn2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_plain_torch(gpu: Gpu, way: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    with tiles(way):
        check_stage(gpu, project_backward, *arguments(shape, dtype), True, True)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("outputs", [16, 24, 64, 96, 160, 192])
def test_equals_plain_torch_with_the_tables_tiles(gpu: Gpu, outputs: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    check_stage(gpu, project_backward, *arguments((1, 72, outputs, 6, 7), dtype), True, True)


def test_programs_that_loop_over_several_tiles_with_a_ragged_end(
    gpu: Gpu, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbv2.kernels.triton.reduce._MOST", 2)
    args = arguments((3, 32, 16, 7, 9), torch.float16)
    with tiles(way):
        _, sums, _ = project_backward(*(a.to(gpu.device) for a in args), True, True)
        assert sums.shape[0] == 2, "189 rows in tiles of 32 are to be shared by two programs"
        check_stage(gpu, project_backward, *args, True, True)


@pytest.mark.parametrize(("need_input", "need_weight"), [(True, False), (False, True), (False, False)])
def test_gradients_nobody_needs_are_left_out(gpu: Gpu, way: str, need_input: bool, need_weight: bool) -> None:
    with tiles(way):
        check_stage(gpu, project_backward, *arguments((1, 40, 24, 5, 3), torch.float16), need_input, need_weight)


def test_activations_at_the_ends_of_relu6_get_no_gradient(gpu: Gpu, way: str) -> None:
    grad, y3, coef3, weight, y2, bn2 = arguments((3, 32, 16, 7, 9), torch.float16)
    bn2[SCALE], bn2[SHIFT], bn2[MEAN] = 1.0, 0.0, 3.0
    y2.copy_(torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0])[torch.arange(y2.numel()) % 5].view(y2.shape))
    with tiles(way):
        dz2, _, _ = project_backward(*(a.to(gpu.device) for a in (grad, y3, coef3, weight, y2, bn2)), True, True)
        check_stage(gpu, project_backward, grad, y3, coef3, weight, y2, bn2, True, True)
    assert torch.equal(dz2.cpu() != 0, (y2 == 3) & (dz2.cpu() != 0))
    assert (dz2.cpu()[y2 == 3] != 0).float().mean() > 0.9


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize(("where", "value"), [("grad", float("nan")), ("y2", float("nan")), ("y2", float("inf"))])
def test_a_nan_reaches_what_it_reaches_in_plain_torch_and_nothing_else(
    gpu: Gpu, way: str, where: str, value: float
) -> None:
    args = arguments((1, 40, 24, 5, 3), torch.float32)
    args[0 if where == "grad" else 4][0, 17, 2, 1] = value
    with tiles(way):
        got = project_backward(*(a.to(gpu.device) for a in args), True, True)
    for mine, plain in zip(got, aten.project_backward(*args, True, True), strict=True):
        assert torch.equal(mine.cpu().sum(0).isnan(), plain.sum(0).isnan())


def test_equal_inputs_give_equal_bits(gpu: Gpu, way: str) -> None:
    args = [a.to(gpu.device) for a in arguments((3, 32, 16, 7, 9), torch.float16)]
    with tiles(way):
        first, second = (project_backward(*args, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_weight_keeps_its_strides_and_the_gradient_may_have_any(gpu: Gpu, way: str) -> None:
    grad, y3, coef3, weight, y2, bn2 = (a.to(gpu.device) for a in arguments((3, 32, 16, 7, 9), torch.float32))
    with tiles(way):
        expected = project_backward(grad, y3, coef3, weight, y2, bn2, True, True)
        strided = weight.as_strided(weight.shape, (32, 1, 32, 32))
        got = project_backward(grad.contiguous(), y3, coef3, strided, y2, bn2, True, True)
    assert got[2].stride() == strided.stride()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
