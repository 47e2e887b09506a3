"""The first convolution's kernels against their plain-torch twins (kernels/aten.py)."""

from contextlib import AbstractContextManager, ExitStack

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
    weights,
)
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import wide
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.stem import stem, stem_backward, stem_folded

# Triton's interpreter computes with numpy, which warns of every NaN, also in lanes that are masked off.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")

EVERY = (*HALF_AND_SINGLE, torch.float64)
# (n, h, w, stride): odd and even sizes, rows shorter than a tile, one output position.
SHAPES = [(3, 9, 13, 2), (1, 10, 12, 2), (2, 7, 5, 1), (1, 2, 2, 2), (1, 2, 1, 1)]


def small_tiles() -> AbstractContextManager[object]:
    """Tiles so small that small shapes take several of them, with ragged ends."""
    stack = ExitStack()
    for kernel in ("stem", "stem_folded", "stem_backward"):
        stack.enter_context(tuning.forced(kernel, BLOCK_M=32, BLOCK_N=16, BLOCK_K=32, num_warps=2, num_stages=1))
    return stack


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that each one walks over several tiles."""
    monkeypatch.setattr("mbv2.kernels.triton.stem.PROGRAMS", 4)


def backward_arguments(
    n: int, cin: int, cout: int, h: int, w: int, dtype: torch.dtype, stride: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    x, weight = activations(n, cin, h, w, dtype), weights(cout, cin, 3, 3, dtype=dtype)
    y, _ = aten.stem(x, weight, stride)
    bn = batch_norm_of(activations(2, cout, 5, 5, dtype, seed=4))
    return activations(*y.shape, dtype, seed=5), y, bn, coefficients(cout, dtype), x, weight, stride


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "h", "w", "stride"), SHAPES)
def test_stem_and_its_moments(gpu: Gpu, dtype: torch.dtype, n: int, h: int, w: int, stride: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    with small_tiles():
        check_stage(gpu, stem, activations(n, 3, h, w, dtype), weights(24, 3, 3, 3, dtype=dtype), stride)


@pytest.mark.parametrize("dtype", EVERY)
def test_stem_when_programs_walk_over_several_tiles(gpu: Gpu, dtype: torch.dtype, few_programs: None) -> None:
    skip_if_wrong_there(gpu, dtype)
    # 3 * 10 * 15 = 450 positions, 15 tiles over 2 parts, the last one with 2 positions.
    x, weight = activations(3, 3, 19, 29, dtype), weights(24, 3, 3, 3, dtype=dtype)
    with small_tiles():
        assert stem(x.to(gpu.device), weight.to(gpu.device), 2)[1].shape == (2, 3, 24)
        check_stage(gpu, stem, x, weight, 2)


def test_stem_with_the_table_s_tiles(gpu: Gpu) -> None:
    x, weight = activations(2, 3, 33, 31, torch.float16), weights(32, 3, 3, 3, dtype=torch.float16)
    check_stage(gpu, stem, x, weight, 2)
    check_stage(gpu, stem_backward, *backward_arguments(2, 3, 32, 33, 31, torch.float16, 2), False, True)


@pytest.mark.parametrize("cin", [1, 5])
def test_stem_of_other_numbers_of_input_channels(gpu: Gpu, cin: int) -> None:
    arguments = backward_arguments(2, cin, 8, 9, 7, torch.float16, 2)
    with small_tiles():
        check_stage(gpu, stem, *arguments[4:])
        check_stage(gpu, stem_backward, *arguments, False, True)


def test_stem_statistics_survive_a_mean_far_from_zero(gpu: Gpu, few_programs: None) -> None:
    # A picture of almost one colour: the outputs' spread is a thousandth of their mean, in fp32 a hard case for
    # sums of squares.
    x = 100 + activations(2, 3, 19, 29, torch.float32, scale=0.1)
    with small_tiles():
        check_stage(gpu, stem, x, weights(24, 3, 3, 3, dtype=torch.float32).abs(), 1)


def test_stem_takes_any_layout_of_picture_and_weight(gpu: Gpu) -> None:
    x, weight = activations(2, 3, 9, 13, torch.float16), weights(24, 3, 3, 3, dtype=torch.float16)
    with small_tiles():
        y, moments = stem(x.to(gpu.device), weight.to(gpu.device), 2)
        for other in (weight.contiguous(memory_format=torch.channels_last), weight.transpose(2, 3).contiguous().mT):
            again, moments_again = stem(x.contiguous().to(gpu.device), other.to(gpu.device), 2)
            assert torch.equal(y, again)
            assert torch.equal(moments, moments_again)


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "h", "w", "stride"), SHAPES)
def test_stem_folded(gpu: Gpu, dtype: torch.dtype, n: int, h: int, w: int, stride: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    bias = (torch.arange(24) / 24).to(wide(dtype))
    with small_tiles():
        check_stage(gpu, stem_folded, activations(n, 3, h, w, dtype), weights(24, 3, 3, 3, dtype=dtype), bias, stride)


def test_stem_folded_lets_nan_through(gpu: Gpu) -> None:
    x, weight = activations(1, 3, 9, 13, torch.float16), weights(24, 3, 3, 3, dtype=torch.float16)
    x[0, 1, 4, 6] = float("nan")
    with small_tiles():
        got = stem_folded(x.to(gpu.device), weight.to(gpu.device), torch.zeros(24, device=gpu.device), 1).cpu()
    assert torch.equal(got.isnan(), aten.stem_folded(x, weight, torch.zeros(24), 1).isnan())
    assert got.isnan().sum() == 9 * 24


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize(("n", "h", "w", "stride"), SHAPES)
def test_stem_weight_gradient(gpu: Gpu, dtype: torch.dtype, n: int, h: int, w: int, stride: int) -> None:
    skip_if_wrong_there(gpu, dtype)
    with small_tiles():
        check_stage(gpu, stem_backward, *backward_arguments(n, 3, 24, h, w, dtype, stride), False, True)


@pytest.mark.parametrize("dtype", EVERY)
def test_stem_weight_gradient_when_programs_walk_over_several_tiles(
    gpu: Gpu, dtype: torch.dtype, few_programs: None
) -> None:
    skip_if_wrong_there(gpu, dtype)
    with small_tiles():
        check_stage(gpu, stem_backward, *backward_arguments(3, 3, 24, 19, 29, dtype, 2), False, True)


@pytest.mark.parametrize(("need_input", "need_weight"), [(True, True), (True, False), (False, False)])
def test_stem_backward_gives_only_what_is_needed(gpu: Gpu, need_input: bool, need_weight: bool) -> None:
    arguments = backward_arguments(2, 3, 24, 9, 13, torch.float32, 2)
    with small_tiles():
        check_stage(gpu, stem_backward, *arguments, need_input, need_weight)


def test_stem_weight_gradient_has_the_parameter_s_strides_and_equal_bits(gpu: Gpu) -> None:
    *others, weight, stride = backward_arguments(2, 3, 24, 9, 13, torch.float16, 2)
    others = [o.to(gpu.device) for o in others]
    strided = weight.contiguous(memory_format=torch.channels_last).to(gpu.device)
    with small_tiles():
        _, first = stem_backward(*others, weight.to(gpu.device), stride, False, True)
        _, again = stem_backward(others[0].contiguous(), *others[1:], strided, stride, False, True)
    assert again.stride() == strided.stride()
    assert torch.equal(first, again)


def test_a_nan_activation_lets_the_gradient_through_and_makes_its_channel_nan(gpu: Gpu) -> None:
    arguments = backward_arguments(2, 3, 24, 9, 13, torch.float16, 2)
    arguments[1][1, 7, 2, 3] = float("nan")
    with small_tiles():
        _, got = stem_backward(*(a.to(gpu.device) if isinstance(a, Tensor) else a for a in arguments), False, True)
    got = got.cpu()
    expected = aten.stem_backward(*arguments, False, True)[1]
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[7].isnan().all()
    assert relative_error(got[:7], expected[:7]) < 1e-2
