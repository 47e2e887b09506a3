"""BatchNorm's own kernels against their plain-torch twins (kernels/aten.py)."""

import pytest
import torch
from conftest import Gpu
from stage_check import (
    HALF_AND_SINGLE,
    activations,
    batch_norm_of,
    check_stage,
    coefficients,
    relative_error,
    skip_if_wrong_there,
)
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import COUNT, MEAN, RSTD, SCALE, SHIFT, VAR, wide
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.batch_norm import (
    bn_apply,
    bn_backward,
    bn_constant,
    bn_finalize,
    bn_sums,
    merge_moments,
)

# Triton's interpreter computes with numpy, which warns of every NaN, also in lanes that are masked off.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

EVERY = (*HALF_AND_SINGLE, torch.float64)
WIDE = (torch.float32, torch.float64)
PARTS_TILE = {"BLOCK_G": 16, "BLOCK_C": 8, "num_warps": 4, "num_stages": 1}


def random_moments(parts: int, channels: int, dtype: torch.dtype, seed: int = 5) -> Tensor:
    """Parts of different counts, the third one empty and holding NaN."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.randint(1, 200, (parts, 1), generator=generator).expand(parts, channels).to(dtype)
    mean = torch.randn(parts, channels, generator=generator).to(dtype) + 3
    m2 = torch.rand(parts, channels, generator=generator).to(dtype) * count
    moments = torch.stack((count, mean, m2), 1)
    if parts > 2:
        moments[2] = 0
    return moments


def small_tiles():
    """Tiles so small that every loop runs several times on small shapes, with ragged ends."""
    return tuning.forced("bn_sums", BLOCK_M=16, BLOCK_C=16, num_warps=4, num_stages=1)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("parts", "channels"), [(1, 8), (41, 20)])
def test_moments_of_all_parts_merge_as_chan_does(gpu: Gpu, dtype: torch.dtype, parts: int, channels: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    with tuning.forced("merge_moments", **PARTS_TILE):
        check_stage(gpu, merge_moments, random_moments(parts, channels, dtype))


def test_an_empty_part_changes_nothing_whatever_it_holds(gpu: Gpu) -> None:
    moments = random_moments(5, 8, torch.float32)
    expected = aten.merge_moments(moments)
    moments[2, 1:] = float("nan")
    with tuning.forced("merge_moments", **PARTS_TILE):
        assert relative_error(merge_moments(moments.to(gpu.device)).cpu(), expected) < 1e-6


def test_the_variance_survives_a_mean_far_from_zero(gpu: Gpu) -> None:
    values = torch.randn(40, 64, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01 + 1000
    values = values.float().double()
    moments = torch.stack(
        (torch.full((40, 8), 64.0), values.mean(1), (values - values.mean(1, keepdim=True)).square().sum(1)), 1
    )
    with tuning.forced("merge_moments", **PARTS_TILE):
        merged = merge_moments(moments.float().to(gpu.device)).cpu()
    exact = values.reshape(-1, 8).var(0, correction=0)
    # Means in float32 are 6e-5 apart up there, with a variance of 1e-4.
    assert relative_error(merged[2] / merged[0], exact) < 1e-2


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("parameters", ["none", "wide", "half"])
def test_finalize_gives_what_a_batch_norm_applies(gpu: Gpu, dtype: torch.dtype, parameters: str) -> None:
    skip_if_wrong_there(gpu, dtype)
    gamma = beta = None
    if parameters != "none":
        generator = torch.Generator().manual_seed(7)
        gamma, beta = torch.rand(20, generator=generator) + 0.5, torch.randn(20, generator=generator)
    if parameters == "half":
        gamma, beta = gamma.half(), beta.half()
    with tuning.forced("bn_finalize", **PARTS_TILE):
        check_stage(gpu, bn_finalize, random_moments(41, 20, dtype), gamma, beta, 1e-3)


def test_finalize_takes_thousands_of_parts(gpu: Gpu) -> None:
    check_stage(gpu, bn_finalize, random_moments(2500, 24, torch.float32), None, None, 1e-5)


def test_a_constant_channel_divides_by_eps_alone(gpu: Gpu) -> None:
    moments = torch.tensor([[[10.0] * 8, [2.0] * 8, [0.0] * 8]])
    with tuning.forced("bn_finalize", **PARTS_TILE):
        bn = bn_finalize(moments.to(gpu.device), None, None, 1e-3).cpu()
    torch.testing.assert_close(bn[RSTD], torch.full((8,), 1e-3).rsqrt(), rtol=2e-7, atol=0)
    assert torch.equal(bn[COUNT], torch.full((8,), 10.0))


@pytest.mark.parametrize("statistic", [MEAN, VAR])
def test_a_nan_in_one_part_reaches_only_its_channel(gpu: Gpu, statistic: int) -> None:
    moments = random_moments(20, 8, torch.float32)
    moments[7, 1 + statistic, 5] = float("nan")
    with tuning.forced("bn_finalize", **PARTS_TILE):
        bn = bn_finalize(moments.to(gpu.device), None, None, 1e-5).cpu()
    assert bn[[VAR, RSTD, SCALE, SHIFT], 5].isnan().all()
    assert bn[:, [0, 1, 2, 3, 4, 6, 7]].isfinite().all()


@pytest.mark.parametrize("dtype", EVERY)
def test_constant_statistics_are_the_running_ones_with_count_zero(gpu: Gpu, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    generator = torch.Generator().manual_seed(8)
    mean, var, gamma, beta = (torch.rand(20, generator=generator).to(dtype) + 0.5 for _ in range(4))
    got = bn_constant(*(v.to(gpu.device) for v in (mean, var, gamma, beta)), 1e-5, dtype).cpu()
    exact = aten.bn_constant(*(v.double() for v in (mean, var, gamma, beta)), 1e-5, torch.float64)
    assert got.dtype == wide(dtype)
    assert relative_error(got, exact) < (1e-12 if dtype == torch.float64 else 3e-7)
    assert torch.equal(got[COUNT], torch.zeros_like(got[COUNT]))


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("relu6", [False, True])
def test_apply_normalises_with_one_rounding(gpu: Gpu, dtype: torch.dtype, residual: bool, relu6: bool) -> None:
    skip_if_wrong_there(gpu, dtype)
    y = activations(3, 24, 7, 9, dtype, scale=3)
    check_stage(
        gpu, bn_apply, y, batch_norm_of(y), activations(3, 24, 7, 9, dtype, seed=9) if residual else None, relu6
    )


@pytest.mark.parametrize("channels", [8, 12, 17])
def test_apply_takes_any_number_of_channels(gpu: Gpu, channels: int) -> None:
    y = activations(1, channels, 5, 13, torch.float16, scale=3)
    check_stage(gpu, bn_apply, y, batch_norm_of(y), None, True)


def test_apply_takes_a_residual_in_another_layout(gpu: Gpu) -> None:
    y = activations(2, 24, 3, 3, torch.float16)
    residual = activations(2, 24, 3, 3, torch.float16, seed=4).contiguous()
    check_stage(gpu, bn_apply, y, batch_norm_of(y), residual, False)


def test_apply_lets_nan_and_infinity_through_as_torch_does(gpu: Gpu) -> None:
    y = activations(1, 24, 3, 3, torch.float16)
    bn = batch_norm_of(y)
    y[0, 3, 1, 1], y[0, 4, 1, 1], y[0, 5, 1, 1] = float("nan"), float("inf"), float("-inf")
    for relu6 in (False, True):
        got = bn_apply(y.to(gpu.device), bn.to(gpu.device), None, relu6).cpu()
        torch.testing.assert_close(got, aten.bn_apply(y, bn, None, relu6), equal_nan=True, rtol=2e-3, atol=1e-3)
        assert got.isnan().sum() == 1


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("relu6", [False, True])
def test_sums_over_several_ragged_tiles_a_program(
    gpu: Gpu, dtype: torch.dtype, relu6: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_if_wrong_there(gpu, dtype)
    monkeypatch.setattr("mbv2.kernels.triton.batch_norm.PROGRAMS", 4)
    y, grad = activations(3, 24, 7, 9, dtype, scale=2), activations(3, 24, 7, 9, dtype, seed=6)
    with small_tiles():
        check_stage(gpu, bn_sums, grad, y, batch_norm_of(y), relu6)


@pytest.mark.parametrize(("n", "channels", "h", "w"), [(1, 8, 1, 1), (3, 17, 5, 3)])
def test_sums_of_awkward_shapes(gpu: Gpu, n: int, channels: int, h: int, w: int) -> None:
    y, grad = activations(n, channels, h, w, torch.float16), activations(n, channels, h, w, torch.float16, seed=6)
    bn = batch_norm_of(activations(3, channels, 5, 5, torch.float16, seed=1))
    with small_tiles():
        check_stage(gpu, bn_sums, grad, y, bn, True)


def test_sums_take_a_gradient_in_another_layout_and_are_reproducible(gpu: Gpu) -> None:
    y, grad = activations(3, 24, 7, 9, torch.float16), activations(3, 24, 7, 9, torch.float16, seed=6)
    bn = batch_norm_of(y).to(gpu.device)
    with small_tiles():
        first = bn_sums(grad.to(gpu.device), y.to(gpu.device), bn, True)
        again = bn_sums(grad.contiguous().to(gpu.device), y.to(gpu.device), bn, True)
    assert torch.equal(first, again)


def test_a_nan_gradient_is_summed_and_a_nan_activation_lets_it_through(gpu: Gpu) -> None:
    y, grad = activations(2, 24, 3, 3, torch.float16), activations(2, 24, 3, 3, torch.float16, seed=6)
    bn = batch_norm_of(y)
    grad[0, 2, 0, 0] = float("nan")
    y[0, 2, 0, 0] = y[1, 4, 1, 1] = float("nan")
    with small_tiles():
        got = bn_sums(grad.to(gpu.device), y.to(gpu.device), bn.to(gpu.device), True).sum(0).cpu()
    expected = aten.bn_sums(grad, y, bn, True).sum(0)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[0, 2].isnan()
    assert got[0, 4].isfinite()
    assert got[1, 4].isnan()
    torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(("parts", "constant"), [(1, False), (41, False), (41, True)])
def test_backward_gives_totals_and_coefficients(gpu: Gpu, dtype: torch.dtype, parts: int, constant: bool) -> None:
    skip_if_wrong_there(gpu, dtype)
    y = activations(2, 20, 5, 5, dtype)
    bn = batch_norm_of(y)
    if constant:
        bn[COUNT] = 0
    sums = torch.stack([coefficients(20, dtype, seed=g)[:2] for g in range(parts)])
    with tuning.forced("bn_backward", **PARTS_TILE):
        check_stage(gpu, bn_backward, sums, bn)
        if constant:
            _, coef = bn_backward(sums.to(gpu.device), bn.to(gpu.device))
            assert torch.equal(coef[1:], torch.zeros_like(coef[1:]))


def test_the_kernels_together_are_torch_batch_norm(gpu: Gpu) -> None:
    y, grad = activations(3, 24, 7, 9, torch.float32, scale=2), activations(3, 24, 7, 9, torch.float32, seed=6)
    gamma, beta = torch.rand(24) + 0.5, torch.randn(24)
    leaves = [v.double().requires_grad_() for v in (y, gamma, beta)]
    out = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[1], leaves[2], True)
    expected = torch.autograd.grad(out, leaves, grad.double())
    moments = aten._with_moments(y)[1].to(gpu.device)
    with tuning.forced("bn_finalize", **PARTS_TILE), tuning.forced("bn_backward", **PARTS_TILE), small_tiles():
        bn = bn_finalize(moments, gamma.to(gpu.device), beta.to(gpu.device), 1e-5)
        totals, coef = bn_backward(bn_sums(grad.to(gpu.device), y.to(gpu.device), bn, False), bn)
    assert relative_error(bn_apply(y.to(gpu.device), bn, None, False).cpu(), out.detach()) < 1e-6
    assert relative_error(aten._affine(grad, y, coef.cpu()), expected[0]) < 1e-5
    assert relative_error(totals[1].cpu(), expected[1]) < 1e-5
    assert relative_error(totals[0].cpu(), expected[2]) < 1e-5
