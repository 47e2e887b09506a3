"""The training depthwise kernels in CUDA C++, their PTX run on the CPU (with --device cuda: on the GPU)."""

import ctypes
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Gpu
from cuda_depthwise_emulated import SOURCES, emulated
from hypothesis import given
from hypothesis import strategies as st
from ptxcpu.nvcc import find_nvcc
from stage_check import activations, batch_norm_of, check_stage, coefficients, weights
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.cuda import depthwise as module
from mbv2.kernels.cuda import training
from mbv2.kernels.cuda.depthwise import cut, depthwise, depthwise_backward

HALF = (torch.float16, torch.bfloat16)
# Batch, channels, height, width: nothing a multiple of a tile; one pixel; wider than a block; several images a block.
SHAPES = ((3, 24, 10, 9), (1, 24, 1, 1), (1, 16, 5, 150), (5, 40, 7, 7), (2, 8, 17, 60))


@pytest.fixture
def arch() -> int:
    """The architecture that PTX is made for; below sm_90 the kernels have no instruction that stores matrices."""
    return 90


@pytest.fixture
def launches(gpu: Gpu, arch: int) -> Iterator[list[Any]]:
    """Statistics of the launches where they are emulated, nothing on a GPU."""
    if gpu.mode == "interpreter":
        pytest.skip("these kernels are no Triton kernels")
    if gpu.mode == "ptx" and find_nvcc() is None:
        pytest.skip("needs nvcc")
    with emulated(arch=arch, count_sectors=True) if gpu.mode == "ptx" else nullcontext([]) as log:
        yield log


def _slow_but_the_first(*cases: tuple[int, torch.dtype, bool, int]) -> list[Any]:
    return [cases[0], *(pytest.param(*case, marks=pytest.mark.slow) for case in cases[1:])]


# Stride, type, whether BatchNorm comes before, architecture.
CASES = _slow_but_the_first(
    (1, torch.float16, True, 90), (2, torch.float16, True, 90), (1, torch.bfloat16, True, 90),
    (2, torch.bfloat16, True, 90), (1, torch.float16, True, 80), (2, torch.bfloat16, True, 80),
    (1, torch.float16, False, 90), (2, torch.bfloat16, False, 90), (1, torch.float32, True, 80),
    (2, torch.float32, True, 80), (1, torch.float32, False, 80), (2, torch.float32, False, 80),
)  # fmt: skip
_ON = ("stride", "dtype", "normalised", "arch")


@pytest.mark.parametrize(_ON, CASES, ids=str)
def test_forward_is_as_accurate_as_eager(
    gpu: Gpu, launches: list[Any], stride: int, dtype: torch.dtype, normalised: bool
) -> None:
    for shape in SHAPES:
        y1 = activations(*shape, dtype)
        bn = batch_norm_of(y1) if normalised else None
        check_stage(gpu, depthwise, y1, bn, weights(shape[1], 1, 3, 3, dtype=dtype), stride)
        assert not launches or (launches[-1].mma > 0) == (dtype in HALF)


def _gradients(shape: tuple[int, int, int, int], dtype: torch.dtype, stride: int) -> tuple[Tensor, ...]:
    """dz2, y2, coef2 and y1."""
    n, c, h, w = shape
    small = n, c, (h - 1) // stride + 1, (w - 1) // stride + 1
    y1 = activations(*shape, dtype, seed=5)
    return activations(*small, dtype, seed=6), activations(*small, dtype, seed=7), coefficients(c, dtype), y1


@pytest.mark.parametrize(_ON, CASES, ids=str)
def test_backward_is_as_accurate_as_eager(
    gpu: Gpu, launches: list[Any], stride: int, dtype: torch.dtype, normalised: bool
) -> None:
    for shape in SHAPES:
        dz2, y2, coef, y1 = _gradients(shape, dtype, stride)
        bn = batch_norm_of(y1) if normalised else None
        weight = weights(shape[1], 1, 3, 3, dtype=dtype)
        for need in ((True, True), (True, False), (False, True), (False, False)):
            check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, bn, weight, stride, *need)


@pytest.mark.parametrize("deviation", (1e-2, 30.0, 1000.0))
@pytest.mark.parametrize("gradient", (1.0, 1e-3))
def test_backward_is_as_accurate_where_gradients_are_small_beside_activations(
    gpu: Gpu, launches: list[Any], deviation: float, gradient: float
) -> None:
    shape = (2, 8, 11, 20)
    dz2, y2 = activations(*shape, torch.float16, 6, gradient), activations(*shape, torch.float16, 7, deviation)
    y1 = activations(*shape, torch.float16, seed=5)
    # As BatchNorm's backward has them, with gamma 1: the factor of y2 is of the order of gradient / deviation^2.
    mean, rstd = y2.float().mean((0, 2, 3)), y2.float().var((0, 2, 3)).rsqrt()
    xhat = (y2.float() - mean[:, None, None]) * rstd[:, None, None]
    of_y2 = -(rstd**2) * (dz2.float() * xhat).mean((0, 2, 3))
    coef = torch.stack((rstd, of_y2, -rstd * dz2.float().mean((0, 2, 3)) - of_y2 * mean))
    weight = weights(8, 1, 3, 3, dtype=torch.float16)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, batch_norm_of(y1), weight, 1, True, True)


# Channels, side of the input and stride of the full-width network's depthwise stages, and what of a narrow one differs.
STAGES = (
    (32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2), (384, 14, 1), (576, 14, 2),
    (960, 7, 1), (8, 48, 2), (88, 6, 1),
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("c", "side", "stride"), STAGES)
@pytest.mark.parametrize(("dtype", "arch"), ((torch.float16, 90), (torch.float32, 80)), ids=str)
def test_the_networks_stages_are_as_accurate_as_eager(
    gpu: Gpu, launches: list[Any], c: int, side: int, stride: int, dtype: torch.dtype
) -> None:
    # Blocks share no channels, so a few slabs of large pictures stand for all.
    c = c if side <= 14 else min(c, 40)
    dz2, y2, coef, y1 = _gradients((2 if side <= 14 else 1, c, side, side), dtype, stride)
    bn, weight = batch_norm_of(y1), weights(c, 1, 3, 3, dtype=dtype)
    check_stage(gpu, depthwise, y1, bn, weight, stride)
    check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, bn, weight, stride, True, True)


@pytest.mark.slow
@pytest.mark.parametrize("stride", (1, 2))
@pytest.mark.parametrize("arch", (80, 90))
def test_the_order_of_threads_inside_a_warp_changes_nothing(gpu: Gpu, arch: int, stride: int) -> None:
    if gpu.mode != "ptx" or find_nvcc() is None:
        pytest.skip("only an emulated GPU can run threads in another order")
    args = _gradients((2, 24, 10, 9), torch.float16, stride)
    bn, weight = batch_norm_of(args[3]), weights(24, 1, 3, 3, dtype=torch.float16)
    runs = []
    for order in ("forward", "reverse"):
        with emulated(arch=arch, lane_order=order):
            runs.append(
                (*depthwise(args[3], bn, weight, stride), *depthwise_backward(*args, bn, weight, stride, True, True))
            )
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_forward_moves_every_byte_once_and_the_blocks_little_more(gpu: Gpu, launches: list[Any]) -> None:
    y1 = activations(2, 32, 28, 28, torch.float16)
    y2, moments = depthwise(
        *[t.to(gpu.device) for t in (y1, batch_norm_of(y1), weights(32, 1, 3, 3, dtype=y1.dtype))], 1
    )
    if launches:
        moved = launches[-1].sectors
        assert 32 * moved["x"].loads == y1.nbytes
        assert 32 * moved["y"].stores == y2.nbytes
        assert 32 * moved["moments"].stores == moments.nbytes
        # Strips of seven rows, the shortest there are: nine are fetched.
        assert moved["x"].block_loads <= 9 / 7 * moved["x"].loads
        assert moved["y"].block_stores == moved["y"].stores


def test_backward_moves_every_byte_once_and_the_blocks_little_more(gpu: Gpu, launches: list[Any]) -> None:
    args = _gradients((2, 32, 28, 28), torch.float16, 1)
    bn, weight = batch_norm_of(args[3]), weights(32, 1, 3, 3, dtype=torch.float16)
    depthwise_backward(*[t.to(gpu.device) for t in (*args, bn, weight)], 1, True, True)
    if launches:
        moved = launches[0].sectors
        for name in ("dz2", "y2", "y1"):
            assert 32 * moved[name].loads == args[3].nbytes
            assert moved[name].block_loads <= 9 / 7 * moved[name].loads
        assert 32 * moved["dz1"].stores == args[3].nbytes


def test_statistics_of_values_far_from_zero(gpu: Gpu, launches: list[Any]) -> None:
    x = (100 + activations(2, 16, 12, 20, torch.float16)).clone()
    weight = torch.zeros(16, 1, 3, 3, dtype=torch.float16)
    weight[:, :, 1, 1] = 1
    one = torch.ones(16)
    bn = torch.stack((0 * one, one, one, 0.05 * one, 0 * one, 480 * one))
    y, moments = depthwise(*[t.to(gpu.device) for t in (x, bn, weight)], 1)
    exact = aten._with_moments(y.cpu().double())[1][0]
    count, mean, m2 = aten.merge_moments(moments.cpu().double())
    assert torch.equal(count, exact[0])
    torch.testing.assert_close(mean, exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, exact[2], rtol=1e-4, atol=0)


def test_nan_reaches_eagers_outputs_and_at_most_the_eight_channels_of_its_matrix(gpu: Gpu, launches: list[Any]) -> None:
    y1 = activations(1, 24, 9, 12, torch.float16)
    bn, weight = batch_norm_of(y1), weights(24, 1, 3, 3, dtype=torch.float16)
    y1[0, 5, 4, 6] = torch.nan
    got = depthwise(*[t.to(gpu.device) for t in (y1, bn, weight)], 1)[0].cpu().isnan()
    expected = aten.depthwise(y1, bn, weight, 1)[0].isnan()
    assert (got | ~expected).all()
    assert not got[:, 8:].any()
    assert torch.equal(got.any(1), expected.any(1))


def test_same_input_gives_same_bits(gpu: Gpu, launches: list[Any]) -> None:
    args = _gradients((3, 24, 10, 9), torch.float16, 1)
    bn, weight = batch_norm_of(args[3]), weights(24, 1, 3, 3, dtype=torch.float16)
    args = [t.to(gpu.device) for t in (*args, bn, weight)]
    runs = [(*depthwise(args[3], args[4], args[5], 1), *depthwise_backward(*args, 1, True, True)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    (((1, 12, 4, 4), torch.float16, "12 channels are no multiple of 8"), ((1, 8, 4, 4), torch.float64, "float64")),
)
def test_what_there_is_no_kernel_for_is_refused_by_name(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        depthwise(torch.zeros(shape, dtype=dtype), None, torch.zeros(shape[1], 1, 3, 3, dtype=dtype), 1)


@given(
    n=st.integers(1, 300), c=st.integers(1, 120), h=st.integers(1, 300), w=st.integers(1, 700),
    stride=st.sampled_from((1, 2)), itemsize=st.sampled_from((2, 4)), backward=st.booleans(),
)  # fmt: skip
def test_cut_covers_every_output_once_within_a_blocks_room(
    n: int, c: int, h: int, w: int, stride: int, itemsize: int, backward: bool
) -> None:
    plan = cut(n, 8 * c, h, w, stride, itemsize, backward)
    rows, width = (h - 1) // stride + 1, (w - 1) // stride + 1
    assert (plan.chunks - 1) * plan.columns < width <= plan.chunks * plan.columns
    assert (plan.strips - 1) * plan.rows < rows <= plan.strips * plan.rows
    assert plan.rows <= module.ROWS_AT_MOST
    if itemsize == 4:
        assert plan.columns * plan.groups == 64
        return
    # Of 16 neighbouring columns one is there, whose value is the origin of the statistics.
    assert plan.chunks * plan.columns - width < 16
    pixels = module.BACKWARD_PIXELS[stride] if backward else module.FORWARD_PIXELS[stride]
    step = 1 if backward else stride
    assert plan.groups * (plan.columns * step + 3 - stride) <= pixels
    assert plan.groups * plan.columns <= pixels // step
    # Offsets within a block are 32-bit.
    assert plan.groups == 1 or n * 8 * c * h * w < 2**31


@pytest.mark.parametrize(("c", "size", "stride"), (
    (32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2), (384, 14, 1), (576, 14, 2),
    (960, 7, 1),
))  # fmt: skip
@pytest.mark.parametrize("backward", (False, True))
def test_cut_of_the_networks_shapes_wastes_little(c: int, size: int, stride: int, backward: bool) -> None:
    plan = cut(256, c, size, size, stride, 2, backward)
    width = (size - 1) // stride + 1
    assert plan.chunks * plan.columns == width
    tiles = -(-plan.groups * plan.columns // 16)
    assert plan.groups * plan.columns >= 0.75 * 16 * tiles
    assert (plan.rows * stride + 3 - stride) / (plan.rows * stride) <= 1.3


def test_argument_structs_have_the_sizes_the_compiler_gives_them(tmp_path: Path) -> None:
    source = tmp_path / "sizes.cpp"
    source.write_text(
        '#include "depthwise_params.h"\n'
        f"static_assert(sizeof(mbv2::cuda::DepthwiseParams) == {ctypes.sizeof(module.ForwardParams)});\n"
        f"static_assert(sizeof(mbv2::cuda::DepthwiseBackwardParams) == {ctypes.sizeof(module.BackwardParams)});\n"
    )
    import subprocess

    subprocess.run(["g++", "-std=c++17", "-fsyntax-only", f"-I{SOURCES}", str(source)], check=True)


@pytest.mark.parametrize(("capability", "same_as"), (((8, 7), (8, 6)), ((12, 1), (12, 0)), ((10, 3), (10, 0))))
def test_an_unlisted_architecture_takes_the_choice_of_the_next_older_one(
    capability: tuple[int, int], same_as: tuple[int, int]
) -> None:
    for stage in ("depthwise", "depthwise_backward"):
        for stride in (1, 2):
            assert training.chosen(capability, stage, 2, stride) == training.chosen(same_as, stage, 2, stride)
    assert not training.chosen((7, 5), "depthwise", 2, 1)


@pytest.mark.parametrize("preferred", (True, False))
def test_the_table_decides_whose_kernel_runs(preferred: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from mbv2.kernels.cuda import stages

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(training, "chosen", lambda capability, stage, itemsize, stride: preferred)
    monkeypatch.setattr(module, "depthwise", lambda *args: "cuda")
    monkeypatch.setattr(stages, "next_best", lambda: type("Other", (), {"depthwise": lambda *args: "other"}))
    x = torch.zeros(1, 8, 4, 4, dtype=torch.float16)
    assert stages.depthwise(x, None, x, 1) == ("cuda" if preferred else "other")
    refused = torch.zeros(1, 12, 4, 4, dtype=torch.float16)
    assert stages.depthwise(refused, None, refused, 1) == "other"
