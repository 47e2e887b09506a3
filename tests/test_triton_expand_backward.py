"""The backward of the expansion and the head's product in Triton against plain torch, in one pass and in two."""

from typing import Any

import pytest
import torch
from conftest import Gpu
from stage_check import HALF_AND_SINGLE, activations, check_stage, coefficients, skip_if_wrong_there, weights
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.expand_backward import expand_backward
from mbv2.kernels.triton.reduce import row_programs, sum_parts

DTYPES = (torch.float64, *HALF_AND_SINGLE)
# batch, inputs, hidden, height, width
SHAPES = (
    (1, 8, 8, 1, 1),
    (1, 24, 40, 5, 3),  # chunks and tiles that are not full
    (3, 16, 32, 7, 9),
)


@pytest.fixture(params=["one pass", "split"])
def way(request: pytest.FixtureRequest) -> str:
    return request.param


class tiles:
    """Small tiles for one of the two ways the stage runs."""

    def __init__(self, way: str):
        common = {"BLOCK_M": 32, "num_warps": 4, "num_stages": 2}
        one_pass = {**common, "BLOCK_H": 16, "BLOCK_C": 32}
        self._forced = [
            tuning.forced("expand_backward", **({"SPLIT": 1} if way == "split" else one_pass)),
            tuning.forced("expand_backward_input", **common, BLOCK_K=16, BLOCK_C=16, CHUNKS=2),
            tuning.forced("expand_backward_weight", **common, BLOCK_H=32, BLOCK_C=16, CHUNKS=1),
        ]

    def __enter__(self) -> None:
        for one in self._forced:
            one.__enter__()

    def __exit__(self, *exception: Any) -> None:
        for one in reversed(self._forced):
            one.__exit__(*exception)


def arguments(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, residual: bool = True
) -> tuple[Tensor | None, ...]:
    n, inputs, hidden, h, w = shape
    dz1, y1 = activations(n, hidden, h, w, dtype, 0), activations(n, hidden, h, w, dtype, 5)
    x = activations(n, inputs, h, w, dtype, 6)
    weight = weights(hidden, inputs, 1, 1, dtype=dtype)
    past = activations(n, inputs, h, w, dtype, 7) if residual else None
    return dz1, y1, coefficients(hidden, dtype), weight, x, past


def run(gpu: Gpu, args: tuple[Tensor | None, ...]) -> tuple[Tensor, Tensor]:
    return expand_backward(*(None if a is None else a.to(gpu.device) for a in args), True, True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_plain_torch(gpu: Gpu, way: str, shape: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    with tiles(way):
        check_stage(gpu, expand_backward, *arguments(shape, dtype), True, True)


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize(
    ("inputs", "hidden"), [(16, 96), (24, 144), (32, 192), (64, 72), (96, 72), (160, 40), (192, 40)]
)
def test_equals_plain_torch_with_the_tables_tiles(gpu: Gpu, inputs: int, hidden: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    check_stage(gpu, expand_backward, *arguments((1, inputs, hidden, 6, 7), dtype), True, True)


def test_programs_that_loop_over_several_tiles_with_a_ragged_end(
    gpu: Gpu, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mbv2.kernels.triton.reduce._MOST", 2)
    with tiles(way):
        assert row_programs(189, {"BLOCK_M": 32, "num_warps": 4}, 1, 0, 1) == 2
        check_stage(gpu, expand_backward, *arguments((3, 16, 32, 7, 9), torch.float16), True, True)


@pytest.mark.parametrize(("need_input", "need_weight"), [(True, False), (False, True), (False, False)])
def test_gradients_nobody_needs_are_left_out(gpu: Gpu, way: str, need_input: bool, need_weight: bool) -> None:
    with tiles(way):
        check_stage(gpu, expand_backward, *arguments((1, 24, 40, 5, 3), torch.float16), need_input, need_weight)


def test_without_a_gradient_past_the_block(gpu: Gpu, way: str) -> None:
    with tiles(way):
        check_stage(gpu, expand_backward, *arguments((1, 24, 40, 5, 3), torch.float16, residual=False), True, True)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of numpy, in the interpreter
@pytest.mark.parametrize(("where", "value"), [(0, float("nan")), (4, float("nan")), (1, float("inf"))])
def test_a_nan_reaches_what_it_reaches_in_plain_torch_and_nothing_else(
    gpu: Gpu, way: str, where: int, value: float
) -> None:
    args = arguments((1, 24, 40, 5, 3), torch.float32)
    args[where][0, 17, 2, 1] = value
    with tiles(way):
        got = run(gpu, args)
    for mine, plain in zip(got, aten.expand_backward(*args, True, True), strict=True):
        assert torch.equal(mine.cpu().isfinite(), plain.isfinite())


def test_equal_inputs_give_equal_bits(gpu: Gpu, way: str) -> None:
    args = arguments((3, 16, 32, 7, 9), torch.float16)
    with tiles(way):
        first, second = run(gpu, args), run(gpu, args)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_weight_keeps_its_strides_and_gradients_may_have_any(gpu: Gpu, way: str) -> None:
    dz1, y1, coef1, weight, x, past = arguments((3, 16, 32, 7, 9), torch.float32)
    strided = weight.as_strided(weight.shape, (16, 1, 16, 16))
    with tiles(way):
        expected = run(gpu, (dz1, y1, coef1, weight, x, past))
        got = run(gpu, (dz1.contiguous(), y1, coef1, strided, x, past.contiguous()))
    assert got[1].stride() == strided.stride()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [(24, 8, 1, 1), (9, 1, 3, 3), (8, 3, 3, 3), (200, 100, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_parts_add_up_to_something_like_the_weight(
    gpu: Gpu, layout: torch.memory_format, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    skip_if_wrong_there(gpu, dtype)
    like = torch.empty(shape, dtype=dtype, device=gpu.device).contiguous(memory_format=layout)
    parts = torch.randn(70, *shape, generator=torch.Generator().manual_seed(0)).to(gpu.device)
    total = sum_parts(parts, like)
    assert total.dtype == dtype
    assert total.stride() == like.stride()
    torch.testing.assert_close(total, parts.double().sum(0).to(dtype))
    assert torch.equal(total, sum_parts(parts, like))


def test_programs_share_the_rows_evenly_and_no_more_than_their_parts_are_worth() -> None:
    tile = {"BLOCK_M": 32, "num_warps": 4}
    assert row_programs(1, tile, 1) == 1
    assert row_programs(32 * 1025, tile, 1) == 513
    assert row_programs(32 * 4096, tile, 8) == 128
    assert row_programs(32 * 4096, tile, 1, traffic=10_000_000, part=900) == 1024
    assert row_programs(32 * 4096, tile, 1, traffic=10_000_000, part=2000) == 456
    assert row_programs(32 * 4096, tile, 1, traffic=10_000_000, part=100_000) == 256
