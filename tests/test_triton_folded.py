"""The folded pairs of stages, and the block they make up."""

import pytest
import torch
from conftest import Gpu
from stage_check import HALF_AND_SINGLE, activations, check_stage, skip_if_wrong_there, weights
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.triton import folded, tuning

ANY = pytest.mark.parametrize("dtype", [*HALF_AND_SINGLE, torch.float64], ids=str)
EXPANDING = {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 16, "COLS": 5, "num_warps": 4, "num_stages": 1}
PROJECTING = {"BLOCK_Q": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}


def bias(channels: int, dtype: torch.dtype, seed: int = 4) -> Tensor:
    """As large as the pre-activations, so that both of ReLU6's bounds are met."""
    return (torch.randn(channels, generator=torch.Generator().manual_seed(seed)) * 2 + 1).to(aten.wide(dtype))


def block(cin: int, hidden: int, cout: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Weights and biases of a block: w1, b1, wd, bd, w3, b3."""
    return (
        weights(hidden, cin, 1, 1, dtype=dtype),
        bias(hidden, dtype),
        weights(hidden, 1, 3, 3, dtype=dtype, seed=5),
        bias(hidden, dtype, 6),
        weights(cout, hidden, 1, 1, dtype=dtype, seed=7),
        bias(cout, dtype, 8),
    )


# (n, h, w, stride): outputs 5 and 9 wide are one and two groups of 5 columns, 3 and 9 wide at stride 2 groups of 3
PLACES = [(1, 1, 5, 1), (3, 9, 9, 1), (1, 6, 6, 2), (3, 9, 17, 2)]


@ANY
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_expand_depthwise_is_as_good_as_eager(gpu: Gpu, dtype: torch.dtype, place: tuple[int, ...]) -> None:
    skip_if_wrong_there(gpu, dtype)
    n, h, w, stride = place
    w1, b1, wd, bd, _, _ = block(8, 48, 8, dtype)
    with tuning.forced("expand_depthwise_folded", **EXPANDING):
        check_stage(gpu, folded.expand_depthwise_folded, activations(n, 8, h, w, dtype), w1, b1, wd, bd, stride)


@ANY
@pytest.mark.parametrize("place", PLACES, ids=str)
def test_depthwise_project_is_as_good_as_eager(gpu: Gpu, dtype: torch.dtype, place: tuple[int, ...]) -> None:
    skip_if_wrong_there(gpu, dtype)
    n, h, w, stride = place
    _, _, wd, bd, w3, b3 = block(8, 40, 40, dtype)
    x = activations(n, 40, h, w, dtype)
    residual = activations(n, 40, h, w, dtype, seed=9) if stride == 1 else None
    with tuning.forced("depthwise_project_folded", **PROJECTING):
        check_stage(gpu, folded.depthwise_project_folded, x, wd, bd, w3, b3, stride, residual)


@pytest.mark.parametrize("place", [(2, 3, 3, 1), (1, 1, 1, 2)], ids=str)
def test_pictures_smaller_than_a_tile_and_more_input_channels_than_one(gpu: Gpu, place: tuple[int, ...]) -> None:
    n, h, w, stride = place
    w1, b1, wd, bd, _, _ = block(40, 24, 8, torch.float16)
    with tuning.forced("expand_depthwise_folded", **EXPANDING):
        check_stage(
            gpu, folded.expand_depthwise_folded, activations(n, 40, h, w, torch.float16), w1, b1, wd, bd, stride
        )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("stage", ["expand_depthwise_folded", "depthwise_project_folded"])
def test_nan_reaches_exactly_the_positions_it_reaches_in_eager(gpu: Gpu, stage: str) -> None:
    expanding = stage == "expand_depthwise_folded"
    w1, b1, wd, bd, w3, b3 = block(8, 48, 8, torch.float16) if expanding else block(8, 40, 40, torch.float16)
    x = activations(3, 8 if expanding else 40, 9, 9, torch.float16)
    x[1, 3, 0, 4] = float("nan")
    x[2, 3, 8, 8] = float("inf")
    arguments = (x, w1, b1, wd, bd, 1) if expanding else (x, wd, bd, w3, b3, 1, x)
    here = [a.to(gpu.device) if isinstance(a, Tensor) else a for a in arguments]
    with tuning.forced("expand_depthwise_folded", **EXPANDING), tuning.forced("depthwise_project_folded", **PROJECTING):
        got, again = (getattr(folded, stage)(*here).cpu() for _ in range(2))
    expected = getattr(aten, stage)(*arguments)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, rtol=5e-3, atol=5e-3, equal_nan=True)
    assert torch.equal(got.isnan(), again.isnan()) and torch.equal(got.nan_to_num(), again.nan_to_num())


def test_strips_of_rows_meet_without_a_seam(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    w1, b1, wd, bd, _, _ = block(8, 48, 8, torch.float16)
    x = activations(3, 8, 9, 9, torch.float16).to(gpu.device)
    arguments = [t.to(gpu.device) for t in (x, w1, b1, wd, bd)]
    with tuning.forced("expand_depthwise_folded", **EXPANDING):
        cut = folded.expand_depthwise_folded(*arguments, 1)
        monkeypatch.setattr(folded, "_PROGRAMS", 1)
        whole = folded.expand_depthwise_folded(*arguments, 1)
    assert torch.equal(cut, whole)


ROUTES = ["expand_depthwise+project", "expand+depthwise_project", "three"]


@pytest.mark.parametrize("route", ROUTES)
def test_a_block_is_the_same_by_every_route(gpu: Gpu, route: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w1, b1, wd, bd, w3, b3 = block(8, 48, 8, torch.float16)
    x = activations(3, 8, 9, 9, torch.float16)
    monkeypatch.setattr(folded, "folded_plan", lambda *_: route)
    with (
        tuning.forced("expand_depthwise_folded", **EXPANDING),
        tuning.forced("depthwise_project_folded", **PROJECTING),
        tuning.forced("pointwise_folded", BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
    ):
        got = folded.inverted_residual_folded(*[t.to(gpu.device) for t in (x, w1, b1, wd, bd, w3, b3)], 1, True)
    expected = aten.depthwise_project_folded(aten.pointwise_folded(x, w1, b1, True, None), wd, bd, w3, b3, 1, x)
    assert got.stride() == expected.stride()
    torch.testing.assert_close(got.cpu(), expected, rtol=5e-3, atol=1e-2)


@pytest.mark.parametrize("fused", [False, True])
def test_a_block_without_expansion(gpu: Gpu, fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, wd, bd, w3, b3 = block(8, 40, 40, torch.float16)
    x = activations(3, 40, 9, 9, torch.float16)
    monkeypatch.setattr(folded, "_fills_a_gpu", lambda *_: fused)
    with (
        tuning.forced("depthwise_project_folded", **PROJECTING),
        tuning.forced("pointwise_folded", BLOCK_M=32, BLOCK_N=32, BLOCK_K=32, num_warps=4, num_stages=2),
    ):
        here = [t.to(gpu.device) for t in (x, wd, bd, w3, b3)]
        got = folded.inverted_residual_folded(here[0], None, None, *here[1:], 1, False)
    expected = aten.depthwise_project_folded(x, wd, bd, w3, b3, 1, None)
    torch.testing.assert_close(got.cpu(), expected, rtol=5e-3, atol=1e-2)


def test_the_plan_fuses_where_the_largest_tensors_are() -> None:
    def plan(n: int, cin: int, hidden: int, cout: int, size: int, stride: int) -> str:
        return folded.folded_plan(n, cin, hidden, cout, size, size, stride, torch.float16)

    assert plan(256, 16, 96, 24, 112, 2) == "expand_depthwise+project"
    assert plan(256, 24, 144, 24, 56, 1) == "expand_depthwise+project"
    assert plan(256, 160, 960, 160, 7, 1) == "expand+depthwise_project"
    # A single picture's 16 squares would be one program, which no byte saved makes up for.
    assert plan(1, 160, 960, 160, 7, 1) != "expand+depthwise_project"
    for dtype in HALF_AND_SINGLE:
        costs = folded.folded_bytes(64, 24, 144, 24, 56, 56, 1, dtype)
        assert list(costs) == ROUTES
        assert costs["three"] > costs["expand+depthwise_project"] > costs["expand_depthwise+project"]


def test_groups_of_columns_expand_no_more_than_they_must() -> None:
    assert [folded._columns(wo, 1, 7) for wo in (1, 5, 7, 14, 56)] == [1, 5, 7, 7, 7]
    assert folded._columns(14, 1, 4) == 4
    assert folded._columns(9, 2, 5) == 3


@pytest.mark.parametrize("kernel", ["expand_depthwise_folded", "depthwise_project_folded"])
def test_there_is_a_tile_for_every_shape(gpu: Gpu, kernel: str) -> None:
    for dtype in (*HALF_AND_SINGLE, torch.float64):
        for channels in (8, 100, 2**14):
            for stride in (1, 2):
                sizes = {"cin" if kernel == "expand_depthwise_folded" else "cout": channels}
                assert tuning.tile(kernel, dtype, hidden=channels, stride=stride, **sizes)["num_warps"] > 0
