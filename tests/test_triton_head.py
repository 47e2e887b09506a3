"""The head's kernels against their plain-torch twins (kernels/aten.py)."""

import pytest
import torch
from conftest import Gpu
from stage_check import (
    HALF_AND_SINGLE,
    activations,
    batch_norm_of,
    check_stage,
    skip_if_wrong_there,
    weights,
)
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import wide
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.head import bn_relu6_pool, head_folded, pool_backward

# Triton's interpreter computes with numpy, which warns of every NaN, also in lanes that are masked off.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

EVERY = (*HALF_AND_SINGLE, torch.float64)
# (n, channels, h, w): several tiles of positions with a ragged end, one position, channels short of a tile.
SHAPES = [(3, 40, 7, 7), (1, 8, 1, 1), (2, 40, 3, 5)]
ELEMENTWISE = {"BLOCK_M": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}
PRODUCT = {"IMAGES": 2, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2}


def gradient(y: Tensor) -> Tensor:
    return activations(y.shape[0], y.shape[1], 1, 1, y.dtype, seed=5).flatten(1)


def normalised(n: int, channels: int, h: int, w: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return activations(n, channels, h, w, dtype), batch_norm_of(activations(2, channels, 5, 5, dtype, seed=4))


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "channels", "h", "w"), SHAPES)
def test_pool_of_the_normalised_tensor(gpu: Gpu, dtype: torch.dtype, n: int, channels: int, h: int, w: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    with tuning.forced("bn_relu6_pool", **ELEMENTWISE):
        check_stage(gpu, bn_relu6_pool, *normalised(n, channels, h, w, dtype))


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "channels", "h", "w"), SHAPES)
def test_pool_backward_and_its_sums(
    gpu: Gpu, dtype: torch.dtype, n: int, channels: int, h: int, w: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_wrong_there(gpu, dtype)
    # Two parts of 40 channels: each program walks over several tiles, the last one ragged.
    monkeypatch.setattr("mbv2.kernels.triton.head.PROGRAMS", 4)
    y, bn = normalised(n, channels, h, w, dtype)
    with tuning.forced("pool_backward", **ELEMENTWISE):
        check_stage(gpu, pool_backward, gradient(y), y, bn)


def test_the_table_s_tiles(gpu: Gpu) -> None:
    y, bn = normalised(2, 144, 7, 7, torch.float16)
    check_stage(gpu, bn_relu6_pool, y, bn)
    check_stage(gpu, pool_backward, gradient(y), y, bn)


def test_pool_backward_takes_a_strided_gradient_and_gives_equal_bits(gpu: Gpu) -> None:
    y, bn = (t.to(gpu.device) for t in normalised(3, 40, 3, 5, torch.float16))
    grad = gradient(y).to(gpu.device)
    with tuning.forced("pool_backward", **ELEMENTWISE):
        dz, sums = pool_backward(grad, y, bn)
        dz_again, sums_again = pool_backward(grad.t().contiguous().t(), y, bn)
    assert torch.equal(dz, dz_again)
    assert torch.equal(sums, sums_again)


def test_pool_lets_nan_through_to_its_own_mean_only(gpu: Gpu) -> None:
    y, bn = normalised(2, 40, 3, 5, torch.float16)
    y[1, 3, 2, 2], y[0, 4, 0, 0], y[0, 5, 0, 0] = float("nan"), float("inf"), float("-inf")
    with tuning.forced("bn_relu6_pool", **ELEMENTWISE):
        got = bn_relu6_pool(y.to(gpu.device), bn.to(gpu.device)).cpu()
    torch.testing.assert_close(got, aten.bn_relu6_pool(y, bn), equal_nan=True, rtol=2e-3, atol=1e-3)
    assert got.isnan().sum() == 1


def test_pool_backward_lets_the_gradient_through_where_the_activation_is_nan(gpu: Gpu) -> None:
    y, bn = normalised(2, 40, 3, 5, torch.float16)
    y[1, 3, 2, 2] = float("nan")
    grad = gradient(y)
    grad[0, 7] = float("inf")
    with tuning.forced("pool_backward", **ELEMENTWISE):
        dz, sums = (t.cpu() for t in pool_backward(*(t.to(gpu.device) for t in (grad, y, bn))))
    expected_dz, expected_sums = aten.pool_backward(grad, y, bn)
    torch.testing.assert_close(dz, expected_dz, rtol=2e-3, atol=1e-5)
    torch.testing.assert_close(sums.sum(0), expected_sums.sum(0), equal_nan=True, rtol=2e-3, atol=1e-4)
    assert dz[1, 3, 2, 2] == (grad[1, 3] / 15).half()


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "h", "w"), [(3, 7, 7), (1, 1, 1), (2, 3, 5)])
def test_head_folded(gpu: Gpu, dtype: torch.dtype, n: int, h: int, w: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    bias = torch.linspace(-1, 3, 72).to(wide(dtype))
    with tuning.forced("head_folded", **PRODUCT):
        check_stage(gpu, head_folded, activations(n, 40, h, w, dtype), weights(72, 40, 1, 1, dtype=dtype), bias)


def test_head_folded_with_the_table_s_tile(gpu: Gpu) -> None:
    bias = torch.linspace(-1, 3, 40)
    x, weight = activations(1, 96, 7, 7, torch.float16), weights(40, 96, 1, 1, dtype=torch.float16)
    check_stage(gpu, head_folded, x, weight, bias)


def test_head_folded_keeps_a_nan_in_its_image(gpu: Gpu) -> None:
    x, weight = activations(3, 40, 3, 5, torch.float16), weights(72, 40, 1, 1, dtype=torch.float16)
    x[1, 3, 2, 2] = float("nan")
    with tuning.forced("head_folded", **PRODUCT):
        got = head_folded(x.to(gpu.device), weight.to(gpu.device), torch.zeros(72, device=gpu.device)).cpu()
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_head_folded_gives_an_image_equal_bits_beside_any_other(gpu: Gpu) -> None:
    x, weight = activations(3, 40, 3, 5, torch.float16), weights(72, 40, 1, 1, dtype=torch.float16)
    x, weight, bias = x.to(gpu.device), weight.to(gpu.device), torch.zeros(72, device=gpu.device)
    with tuning.forced("head_folded", **PRODUCT):
        assert torch.equal(head_folded(x, weight, bias)[1:], head_folded(x[1:].contiguous(), weight, bias))
