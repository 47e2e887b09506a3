"""The Triton 1x1 convolutions: expand and project with statistics, and the folded one."""

import pytest
import torch
from conftest import Gpu
from stage_check import (
    HALF_AND_SINGLE,
    activations,
    batch_norm_of,
    check_stage,
    relative_error,
    skip_if_wrong_there,
    weights,
)

from mbv2.kernels import aten
from mbv2.kernels.triton import pointwise, tuning

ANY = pytest.mark.parametrize("dtype", [*HALF_AND_SINGLE, torch.float64], ids=str)
SMALL = {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
# (n, cin, cout, h, w): a ragged last tile of rows; channels beyond one tile and not a multiple of it; one position
SHAPES = [(3, 8, 48, 5, 7), (1, 72, 40, 6, 6), (1, 72, 40, 1, 1)]


@ANY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_expand_is_as_good_as_eager(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_if_wrong_there(gpu, dtype)
    n, cin, cout, h, w = shape
    with tuning.forced("expand", **SMALL):
        check_stage(gpu, pointwise.expand, activations(n, cin, h, w, dtype), weights(cout, cin, 1, 1, dtype=dtype))


@ANY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_project_is_as_good_as_eager(gpu: Gpu, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    skip_if_wrong_there(gpu, dtype)
    n, cin, cout, h, w = shape
    y2 = activations(n, cin, h, w, dtype)
    bn2 = batch_norm_of(activations(2, cin, 4, 4, dtype, seed=5))
    with tuning.forced("project", **SMALL):
        check_stage(gpu, pointwise.project, y2, bn2, weights(cout, cin, 1, 1, dtype=dtype))


@ANY
@pytest.mark.parametrize("residual", [False, True], ids=["relu6", "residual"])
def test_folded_pointwise_is_as_good_as_eager(gpu: Gpu, dtype: torch.dtype, residual: bool) -> None:
    skip_if_wrong_there(gpu, dtype)
    n, cin, cout, h, w = SHAPES[residual]
    x, weight = activations(n, cin, h, w, dtype), weights(cout, cin, 1, 1, dtype=dtype)
    bias = torch.randn(cout, generator=torch.Generator().manual_seed(4)).to(aten.wide(dtype))
    added = activations(n, cout, h, w, dtype, seed=6) if residual else None
    with tuning.forced("pointwise_folded", **SMALL):
        check_stage(gpu, pointwise.pointwise_folded, x, weight, bias, not residual, added)


@pytest.mark.parametrize("stage", ["expand", "project"])
def test_statistics_are_right_where_each_program_walks_over_several_tiles(
    gpu: Gpu, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pointwise, "PROGRAMS", 4)
    x, weight = activations(3, 8, 16, 9, torch.float32), weights(48, 8, 1, 1, dtype=torch.float32)
    # A mean a thousand times the deviation: sums of squares would have lost the variance.
    x = x + 1000 if stage == "expand" else x
    arguments = (x, weight) if stage == "expand" else (x, batch_norm_of(x), weight)
    with tuning.forced(stage, **SMALL):
        check_stage(gpu, getattr(pointwise, stage), *arguments, slack=100 if stage == "expand" else 1)
        _, moments = getattr(pointwise, stage)(*(a.to(gpu.device) for a in arguments))
    assert moments.shape[0] == 2  # 14 tiles of rows, two tiles of channels
    assert moments[:, 0, 0].tolist() == [7 * 32, 6 * 32 + 16]


def test_equal_inputs_give_equal_bits(gpu: Gpu) -> None:
    x, weight = activations(3, 8, 5, 7, torch.float16).to(gpu.device), weights(48, 8, 1, 1, dtype=torch.float16)
    with tuning.forced("expand", **SMALL):
        first, second = (pointwise.expand(x, weight.to(gpu.device)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_what_is_not_finite_spreads_as_in_eager(gpu: Gpu, value: float) -> None:
    x = activations(3, 8, 5, 7, torch.float16)
    x[1, 3, 2, 4] = value
    weight, bn = weights(48, 8, 1, 1, dtype=torch.float16), batch_norm_of(activations(3, 8, 5, 7, torch.float16))
    bias = torch.zeros(48)
    here = [t.to(gpu.device) for t in (x, weight, bn, bias)]
    with (
        tuning.forced("expand", **SMALL),
        tuning.forced("project", **SMALL),
        tuning.forced("pointwise_folded", **SMALL),
    ):
        got = (
            *pointwise.expand(here[0], here[1]),
            *pointwise.project(here[0], here[2], here[1]),
            pointwise.pointwise_folded(here[0], here[1], here[3], True, None),
        )
    expected = (
        *aten.expand(x, weight),
        *aten.project(x, bn, weight),
        aten.pointwise_folded(x, weight, bias, True, None),
    )
    for mine, theirs in zip(got, expected, strict=True):
        if mine.dim() == 3:  # of statistics only whether they are finite is comparable
            mine, theirs = aten.merge_moments(mine).isfinite(), theirs[0].isfinite()
        torch.testing.assert_close(mine.cpu().to(theirs.dtype), theirs, rtol=2e-3, atol=2e-3, equal_nan=True)


def test_float32_products_are_rounded_to_tf32_where_torch_allows_it(gpu: Gpu) -> None:
    if gpu.mode == "interpreter":
        pytest.skip("Triton's interpreter computes tf32 as float32")
    x, weight = activations(1, 8, 6, 6, torch.float32), weights(48, 8, 1, 1, dtype=torch.float32)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with tuning.forced("expand", **SMALL):
            y, _ = pointwise.expand(x.to(gpu.device), weight.to(gpu.device))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    error = relative_error(y.cpu(), aten.expand(x.double(), weight.double())[0])
    assert 1e-5 < error < 2e-3


@pytest.mark.parametrize("kernel", ["expand", "project", "pointwise_folded"])
def test_there_is_a_tile_for_every_shape(gpu: Gpu, kernel: str) -> None:
    names = {"expand": ("rows", "cin", "hidden"), "project": ("rows", "hidden", "cout")}
    for dtype in (*HALF_AND_SINGLE, torch.float64):
        for values in ((1, 8, 8), (256 * 112 * 112, 96, 24), (2**32, 2**14, 2**14)):
            sizes = dict(zip(names.get(kernel, ("rows", "cin", "cout")), values, strict=True))
            meta = tuning.tile(kernel, dtype, **sizes)
            assert min(meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]) >= 16
