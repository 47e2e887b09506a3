from collections.abc import Callable

import pytest
import torch
from conftest import Gpu
from ptxcpu.triton_driver import emulated
from stage_check import HALF_AND_SINGLE, activations, batch_norm_of, check_stage, skip_if_wrong_there, weights
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.triton import depthwise as module
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.depthwise import depthwise, depthwise_folded

TILE = {"BLOCK_P": 4, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1}
DTYPES = (*HALF_AND_SINGLE, torch.float64)
# Batch, channels, height, width, stride; the blocks of two columns below cut odd numbers of output columns raggedly.
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
    monkeypatch.setattr(module, "COLUMNS", (2,))
    with tuning.forced("depthwise", **TILE):
        yield


def _identity(c: int) -> Tensor:
    weight = torch.zeros(c, 1, 3, 3)
    weight[:, :, 1, 1] = 1
    return weight


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
def test_normalised_input_and_statistics(gpu: Gpu, stride: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    y1 = activations(3, 24, 10, 9, dtype)
    check_stage(gpu, depthwise, y1, batch_norm_of(y1), weights(24, 1, 3, 3, dtype=dtype), stride)


@pytest.mark.parametrize(("n", "c", "h", "w", "stride"), SHAPES)
def test_odd_sizes_of_everything(gpu: Gpu, n: int, c: int, h: int, w: int, stride: int) -> None:
    y1 = activations(n, c, h, w, torch.float32)
    check_stage(gpu, depthwise, y1, batch_norm_of(y1), weights(c, 1, 3, 3, dtype=torch.float32), stride)


@pytest.mark.parametrize("stride", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_block_without_expansion_takes_any_strides(gpu: Gpu, stride: int) -> None:
    x = activations(2, 24, 9, 5, torch.float16).contiguous()
    check_stage(gpu, depthwise, x, None, weights(24, 1, 3, 3, dtype=torch.float16), stride)


@pytest.mark.parametrize(
    ("stride", "dtype"),
    (
        (1, torch.float16),
        pytest.param(2, torch.float16, marks=pytest.mark.slow),
        pytest.param(1, torch.bfloat16, marks=pytest.mark.slow),
        (2, torch.float32),
    ),
    ids=str,
)
def test_folded_adds_bias_and_clamps(gpu: Gpu, stride: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    x, weight = activations(2, 24, 9, 5, dtype, scale=3.0), weights(24, 1, 3, 3, dtype=dtype)
    check_stage(gpu, depthwise_folded, x, weight, torch.linspace(-2, 6, 24), stride)


def test_empty_batch_gives_an_empty_result(gpu: Gpu) -> None:
    x = torch.empty(0, 24, 9, 5, device=gpu.device)
    y = depthwise_folded(x, torch.zeros(24, 1, 3, 3, device=gpu.device), torch.zeros(24, device=gpu.device), 2)
    assert y.shape == (0, 24, 5, 3)


@pytest.mark.parametrize("stride", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_the_tiles_of_real_shapes(gpu: Gpu, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    y1 = activations(2, 32, 7 * stride, 14 * stride, torch.float16)
    with tuning.forced("depthwise", BLOCK_P=4, BLOCK_C=64, num_warps=4, num_stages=1):
        check_stage(gpu, depthwise, y1, batch_norm_of(y1), weights(32, 1, 3, 3, dtype=torch.float16), stride)


def test_one_long_strip_and_many_short_ones_agree(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    y1 = activations(1, 24, 18, 9, torch.float32)
    bn, weight = batch_norm_of(y1), weights(24, 1, 3, 3, dtype=torch.float32)
    args = [t.to(gpu.device) for t in (y1, bn, weight)]
    short, parts = depthwise(*args, 1)
    monkeypatch.setattr(module, "PROGRAMS", 1)
    long, fewer_parts = depthwise(*args, 1)
    assert torch.equal(short, long)
    assert parts.shape[0] == 5 * fewer_parts.shape[0]
    torch.testing.assert_close(aten.merge_moments(parts), aten.merge_moments(fewer_parts))
    check_stage(gpu, depthwise, y1, bn, weight, 1)


def _far_from_zero(y1: Tensor) -> Tensor:
    return 100 + 0.1 * y1


def _first_is_an_outlier(y1: Tensor) -> Tensor:
    y1 = 5 + 0.01 * y1
    y1[:, :, 0, 0] = 1000
    return y1


@pytest.mark.parametrize("made", (_far_from_zero, _first_is_an_outlier))
def test_variance_of_values_far_from_zero(gpu: Gpu, made: Callable[[Tensor], Tensor]) -> None:
    x = made(activations(3, 24, 10, 9, torch.float32))
    y, moments = depthwise(x.to(gpu.device), None, _identity(24).to(gpu.device), 1)
    assert torch.equal(y.cpu(), x)
    exact = aten._with_moments(x.double())[1][0]
    count, mean, m2 = aten.merge_moments(moments.cpu().double())
    assert torch.equal(count, exact[0])
    torch.testing.assert_close(mean, exact[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(m2, exact[2], rtol=1e-4, atol=0)


def test_moments_have_exact_counts_and_no_empty_part(gpu: Gpu) -> None:
    y1 = activations(3, 24, 10, 9, torch.float32)
    _, moments = depthwise(*[t.to(gpu.device) for t in (y1, batch_norm_of(y1), _identity(24))], 1)
    counts = moments[:, 0].cpu()
    assert (counts > 0).all()
    assert torch.equal(counts.sum(0), torch.full((24,), 3.0 * 10 * 9))
    assert (moments[:, 2] >= 0).all()


@pytest.mark.parametrize("stride", (1, 2))
def test_nan_and_infinity_reach_exactly_the_outputs_eager_reaches(gpu: Gpu, stride: int) -> None:
    y1 = activations(3, 24, 10, 9, torch.float32)
    bn, weight = batch_norm_of(y1), weights(24, 1, 3, 3, dtype=torch.float32)
    y1[0, 0, 0, 0] = y1[1, 5, 9, 8] = y1[2, 23, 4, 4] = torch.nan
    y1[0, 1, 0, 8] = torch.inf
    got, moments = depthwise(*[t.to(gpu.device) for t in (y1, bn, weight)], stride)
    expected, _ = aten.depthwise(y1, bn, weight, stride)
    torch.testing.assert_close(got.cpu(), expected, equal_nan=True, rtol=1e-5, atol=1e-5)
    reached = expected.isnan().any(3).any(2).any(0)
    assert torch.equal(aten.merge_moments(moments.cpu())[2].isnan(), reached)


def test_same_input_gives_same_bits(gpu: Gpu) -> None:
    y1 = activations(3, 24, 10, 9, torch.float32)
    args = [t.to(gpu.device) for t in (y1, batch_norm_of(y1), weights(24, 1, 3, 3, dtype=torch.float32))]
    first, again = depthwise(*args, 1), depthwise(*args, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("stride", (1, 2))
def test_input_is_read_once_from_memory_and_little_more_by_the_programs(gpu: Gpu, stride: int) -> None:
    if gpu.mode != "ptx":
        pytest.skip("bytes are counted where the PTX runs on the CPU")
    y1 = activations(3, 24, 10, 9, torch.float32)
    with emulated(80, count_sectors=True) as launches:
        y2, _ = depthwise(y1, batch_norm_of(y1), _identity(24), stride)
    read, written = launches[-1].sectors["x_ptr"], launches[-1].sectors["y_ptr"]
    assert 32 * read.loads == y1.nbytes
    assert 32 * written.stores == y2.nbytes
    # Strips of four rows and groups of two columns, four a program: the largest halo there is.
    assert read.block_loads < 1.9 * read.loads


# Hidden channels, input size and stride of the depthwise convolutions of MobileNetV2 at 224.
NETWORK = (
    (32, 112, 1), (96, 112, 2), (144, 56, 1), (144, 56, 2), (192, 28, 1), (192, 28, 2),
    (384, 14, 1), (576, 14, 1), (576, 14, 2), (960, 7, 1),
)  # fmt: skip


@pytest.mark.parametrize(("c", "size", "stride"), NETWORK)
@pytest.mark.parametrize("n", (1, 32, 256))
def test_cut_wastes_no_column_and_re_reads_little(
    n: int, c: int, size: int, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    rows = (size - 1) // stride + 1
    for tile in module.CANDIDATES["depthwise"]:
        cols, strip, strips = module.cut(n, rows, rows, -(-c // tile["BLOCK_C"]), tile["BLOCK_P"])
        assert rows % cols == 0
        assert (strips - 1) * strip < rows <= strips * strip
        assert (strip * stride + 3 - stride) / (strip * stride) <= 1.5
        if n == 256:
            # Three float32 are written and read again per part and channel, against one value in and one out.
            values = min(tile["BLOCK_P"], n * rows // cols) * cols * strip
            assert 0.1 * values * 2 * (1 + stride**2) >= 2 * 12
