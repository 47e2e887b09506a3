import pytest
import torch
from conftest import Gpu
from ptxcpu.triton_driver import emulated
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
from mbv2.kernels.triton import depthwise as forward
from mbv2.kernels.triton import depthwise_backward as module
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.depthwise_backward import depthwise_backward

TILE = {"BLOCK_P": 4, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1}
DTYPES = (*HALF_AND_SINGLE, torch.float64)
# Triton's interpreter computes in NumPy, which warns of infinity times zero.
ARITHMETIC_OF_NUMPY = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
# Batch, channels, height, width, stride.
SHAPES = (
    (1, 24, 1, 1, 1),
    (1, 24, 1, 1, 2),
    (3, 16, 10, 4, 1),
    (2, 8, 6, 8, 2),
    pytest.param(3, 24, 5, 2, 1, marks=pytest.mark.slow),
    pytest.param(1, 40, 13, 6, 2, marks=pytest.mark.slow),
)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> object:
    """Groups of two columns and tiles of one warp: fast to build, many programs for small pictures."""
    monkeypatch.setattr(forward, "COLUMNS", (2,))
    with tuning.forced("depthwise_backward", **TILE):
        yield


def _inputs(n: int, c: int, h: int, w: int, dtype: torch.dtype, stride: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dz2, y2, coef2 and y1."""
    small = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    y1 = activations(n, c, h, w, dtype, seed=5)
    return activations(*small, dtype, seed=6), activations(*small, dtype, seed=7), coefficients(c, dtype), y1


def _run(gpu: Gpu, *args: object) -> list[Tensor]:
    return [
        t.cpu() for t in depthwise_backward(*[a.to(gpu.device) if isinstance(a, Tensor) else a for a in args])
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
def test_both_gradients_and_sums(gpu: Gpu, stride: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    dz2, y2, coef, y1 = _inputs(3, 24, 10, 9, dtype, stride)
    weight = weights(24, 1, 3, 3, dtype=dtype)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, batch_norm_of(y1), weight, stride, True, True)


@pytest.mark.parametrize(("n", "c", "h", "w", "stride"), SHAPES)
def test_odd_sizes_of_everything(gpu: Gpu, n: int, c: int, h: int, w: int, stride: int) -> None:
    dz2, y2, coef, y1 = _inputs(n, c, h, w, torch.float32, stride)
    weight = weights(c, 1, 3, 3, dtype=torch.float32)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, batch_norm_of(y1), weight, stride, True, True)


@pytest.mark.parametrize("stride", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_block_without_expansion_masks_and_sums_nothing(gpu: Gpu, stride: int) -> None:
    dz2, y2, coef, x = _inputs(2, 24, 9, 5, torch.float16, stride)
    weight = weights(24, 1, 3, 3, dtype=torch.float16)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, x.contiguous(), None, weight, stride, True, True)


@pytest.mark.parametrize("normalised", (True, pytest.param(False, marks=pytest.mark.slow)))
@pytest.mark.parametrize("stride", (1, pytest.param(2, marks=pytest.mark.slow)))
@pytest.mark.parametrize(("need_input", "need_weight"), ((True, False), (False, True), (False, False)))
def test_what_is_not_needed_is_neither_returned_nor_touched(
    gpu: Gpu, need_input: bool, need_weight: bool, stride: int, normalised: bool
) -> None:
    dz2, y2, coef, y1 = _inputs(2, 24, 9, 5, torch.float32, stride)
    bn = batch_norm_of(y1) if normalised else None
    weight = weights(24, 1, 3, 3, dtype=torch.float32)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, bn, weight, stride, need_input, need_weight)
    if gpu.mode == "ptx":
        assert len(gpu.launches) == need_weight + (need_input or need_weight)
        if gpu.launches and not need_weight:
            moved = gpu.launches[0].global_store_bytes
            assert moved == y1.nbytes + (gpu.launches[0].grid[0] * 2 * 16 * 4 * 24 // 32 if normalised else 0)


@pytest.mark.parametrize("stride", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_the_tiles_of_real_shapes(gpu: Gpu, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    dz2, y2, coef, y1 = _inputs(2, 32, 7 * stride, 14 * stride, torch.float16, stride)
    weight = weights(32, 1, 3, 3, dtype=torch.float16)
    with tuning.forced("depthwise_backward", BLOCK_P=4, BLOCK_C=64, num_warps=4, num_stages=1, maxnreg=168):
        check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, batch_norm_of(y1), weight, stride, True, True)


def test_one_long_strip_and_many_short_ones_agree(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    args = _inputs(1, 24, 18, 9, torch.float32, 1)
    bn, weight = batch_norm_of(args[3]), weights(24, 1, 3, 3, dtype=torch.float32)
    short = _run(gpu, *args, bn, weight, 1, True, True)
    monkeypatch.setattr(forward, "PROGRAMS", 1)
    long = _run(gpu, *args, bn, weight, 1, True, True)
    assert torch.equal(short[0], long[0])
    assert short[1].shape[0] == 5 * long[1].shape[0]
    torch.testing.assert_close(short[2], long[2], rtol=1e-4, atol=1e-4)
    check_stage(gpu, depthwise_backward, *args, bn, weight, 1, True, True)


@ARITHMETIC_OF_NUMPY
@pytest.mark.parametrize("stride", (1, 2))
def test_mask_is_strict_and_lets_gradients_through_where_the_activation_is_nan(gpu: Gpu, stride: int) -> None:
    dz2, y2, coef, y1 = _inputs(3, 24, 10, 9, torch.float32, stride)
    generator = torch.Generator().manual_seed(9)
    y1.copy_(torch.tensor([-1.0, 0.0, 3.0, 6.0, 7.0])[torch.randint(0, 5, y1.shape, generator=generator)])
    y1[0, 0, 0, 0] = y1[2, 23, 9, 8] = torch.nan
    y1[1, 5, 3, 3] = torch.inf
    one = torch.ones(24)
    bn = torch.stack((0 * one, one, one, one, 0 * one, 270 * one))
    args = dz2, y2, coef, y1, bn, weights(24, 1, 3, 3, dtype=torch.float32), stride, True, True
    got, expected = _run(gpu, *args), aten.depthwise_backward(*args)
    assert torch.equal(got[0] == 0, expected[0] == 0)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(got[1].sum(0).isnan(), expected[1][0].isnan())
    assert torch.equal(got[2].isnan().any(3).any(2), expected[2].isnan().any(3).any(2))


@ARITHMETIC_OF_NUMPY
@pytest.mark.parametrize("stride", (1, 2))
def test_overflowed_gradients_arrive(gpu: Gpu, stride: int) -> None:
    dz2, y2, coef, y1 = _inputs(3, 24, 10, 9, torch.float32, stride)
    dz2[0, 3, 2, 2] = torch.inf
    dz2[1, 7, 0, 0] = torch.nan
    args = dz2, y2, coef, y1, batch_norm_of(y1), weights(24, 1, 3, 3, dtype=torch.float32), stride, True, True
    got, expected = _run(gpu, *args), aten.depthwise_backward(*args)
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-4, equal_nan=True)
    assert torch.equal(got[1].sum(0).isfinite(), expected[1][0].isfinite())
    assert torch.equal(got[2].isfinite().all(3).all(2), expected[2].isfinite().all(3).all(2))


def test_same_input_gives_same_bits(gpu: Gpu) -> None:
    args = _inputs(3, 24, 10, 9, torch.float32, 2)
    bn, weight = batch_norm_of(args[3]), weights(24, 1, 3, 3, dtype=torch.float32)
    first, again = (_run(gpu, *args, bn, weight, 2, True, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weight_gradient_has_the_parameters_strides_and_type(gpu: Gpu) -> None:
    args = _inputs(3, 24, 10, 9, torch.float16, 2)
    weight = weights(24, 1, 3, 3, dtype=torch.float16).to(memory_format=torch.channels_last)
    got = _run(gpu, *args, batch_norm_of(args[3]), weight, 2, True, True)[2]
    assert (got.stride(), got.dtype) == (weight.stride(), weight.dtype)


@pytest.mark.parametrize("stride", (1, 2))
def test_activations_are_read_once_from_memory(gpu: Gpu, stride: int) -> None:
    if gpu.mode != "ptx":
        pytest.skip("bytes are counted where the PTX runs on the CPU")
    args = _inputs(3, 24, 10, 9, torch.float32, stride)
    with emulated(80, count_sectors=True) as launches:
        weight = weights(24, 1, 3, 3, dtype=torch.float32)
        depthwise_backward(*args, batch_norm_of(args[3]), weight, stride, True, True)
    moved = launches[0].sectors
    assert 32 * moved["dz2_ptr"].loads == 32 * moved["y2_ptr"].loads == args[0].nbytes
    assert moved["y1_ptr"].loads == moved["y1_ptr"].block_loads == args[3].nbytes // 32
    assert moved["dz1_ptr"].stores == moved["dz1_ptr"].block_stores == args[3].nbytes // 32
    # Strips of four rows and groups of two columns, four a program: the largest halo there is.
    assert moved["dz2_ptr"].block_loads < 1.9 * moved["dz2_ptr"].loads


@pytest.mark.parametrize(("c", "size", "stride"), ((96, 112, 2), (144, 56, 1), (960, 7, 1), (576, 14, 2)))
def test_parts_are_small_against_the_activations(
    c: int, size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rows = size // stride
    for tile in module.CANDIDATES["depthwise_backward"]:
        cols, strip, _ = forward.cut(256, rows, rows, -(-c // tile["BLOCK_C"]), tile["BLOCK_P"])
        # Eleven float32 a part and channel, written and read; dz2 and y2 in, y1 in and dz1 out, two bytes each.
        assert 0.1 * tile["BLOCK_P"] * cols * strip * 4 * (1 + stride**2) >= 2 * 44
