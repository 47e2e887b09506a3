"""The fused block in CUDA C++: nvcc's PTX, the planner's launches and the stage around them, run by ptxcpu."""

from typing import Any

import pytest
import torch
from emulated_cuda import block, emulated, emulated_launch, run, wishing  # noqa: F401
from ptxcpu.nvcc import find_nvcc
from stage_check import activations

from mbv2.kernels import aten
from mbv2.kernels.cuda import fused, stages

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

Launches = list[tuple[fused.Plan, Any]]
HALF, BFLOAT16, FLOAT = torch.float16, torch.bfloat16, torch.float32
slow = pytest.mark.slow


# dtype, tile, (n, cin, hidden, cout, h, w, stride, residual)
TILES = [
    (HALF, 0, (2, 24, 40, 24, 9, 37, 1, True)),
    (BFLOAT16, 0, (1, 16, 96, 24, 13, 11, 2, False)),
    (FLOAT, 0, (1, 16, 24, 16, 9, 11, 1, True)),
    pytest.param(HALF, 1, (1, 16, 96, 24, 13, 11, 2, False), marks=slow),
    pytest.param(HALF, 2, (3, 32, 72, 64, 7, 7, 2, False), marks=slow),
    pytest.param(BFLOAT16, 2, (1, 64, 96, 64, 9, 7, 1, True), marks=slow),
    pytest.param(HALF, 3, (1, 96, 96, 96, 7, 14, 1, True), marks=slow),
    pytest.param(HALF, 4, (2, 160, 104, 160, 7, 7, 1, True), marks=slow),
    pytest.param(FLOAT, 4, (1, 88, 72, 136, 7, 7, 2, False), marks=slow),
    pytest.param(HALF, 5, (2, 160, 64, 320, 7, 7, 1, False), marks=slow),
    pytest.param(BFLOAT16, 6, (1, 224, 64, 448, 7, 7, 1, False), marks=slow),
]


@pytest.mark.parametrize(("dtype", "tile", "sizes"), TILES, ids=str)
def test_every_tile_is_as_good_as_eager(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tile: int,
    sizes: tuple[int, ...],
) -> None:
    n, cin, hidden, cout, h, w, stride, residual = sizes
    wishing(monkeypatch, tile=tile, splits=1)
    run(activations(n, cin, h, w, dtype), block(cin, hidden, cout, dtype), stride, bool(residual))
    assert [plan.tile for plan, _ in emulated] == [tile]


def test_without_expansion(emulated: Launches, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    wishing(monkeypatch, tile=0, splits=1)
    run(activations(2, 40, 9, 11, HALF), block(40, 40, 16, HALF, expands=False), 1, False)
    run(activations(1, 32, 9, 11, HALF), block(32, 32, 32, HALF, expands=False), 1, True)


# One tile cut many ways is still one compiled kernel.
CUTS = [(3, 5, 1), (9, 2, 3), (1, 1, 1), (4, 16, 2)]


@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_tiles_and_splits_meet_without_a_seam(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    cut: tuple[int, int, int],
) -> None:
    height, width, splits = cut
    wishing(monkeypatch, tile=0, tile_height=height, tile_width=width, splits=splits)
    run(activations(1, 24, 9, 11, HALF), block(24, 72, 24, HALF), 1, True)
    assert [(plan.height, plan.width, plan.splits) for plan, _ in emulated] == [(height, width, splits)]


def test_splits_add_up_the_same_every_time_and_images_do_not_mix(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    weights, x = block(24, 72, 24, HALF), activations(3, 24, 5, 5, HALF)
    wishing(monkeypatch, tile=0, splits=3)
    together = run(x, weights, 1, True)
    assert torch.equal(together, run(x, weights, 1, True))
    assert torch.equal(together[1:2], run(x[1:2], weights, 1, True))


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_no_race_in_either_order_of_lanes(order: str) -> None:
    shape = fused.Shape(0, 1, 9, 11, 24, 72, 24, 1, True, True)
    from emulated_cuda import A100

    plan = fused.plan_for(shape, A100, tile=0, splits=1)
    assert isinstance(plan, fused.Plan)
    w1, b1, wd, bd, w3, b3 = block(24, 72, 24, HALF)
    out = torch.empty(1, 9, 11, 24, dtype=HALF)
    x = activations(1, 24, 9, 11, HALF)
    stats = emulated_launch(plan, (x, w1, wd, w3, b1, bd, b3, out, None), strict_races=True, lane_order=order)
    assert torch.isfinite(out).all() and stats.mma > 0 and stats.atomics == 0


def test_nan_reaches_exactly_the_positions_it_reaches_in_eager(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wishing(monkeypatch, tile=0, splits=1)
    weights = block(24, 72, 24, HALF)
    x = activations(2, 24, 9, 11, HALF)
    x[0, 3, 0, 4] = float("nan")
    x[1, 3, 8, 8] = float("inf")
    got = fused.inverted_residual_folded(x, *weights, 1, False)
    expected = aten.inverted_residual_folded(x, *weights, 1, False)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2, equal_nan=True)


@pytest.mark.parametrize("reason", ["channels", "address"])
def test_what_the_kernel_cannot_take_goes_to_the_next_backend(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    reason: str,
) -> None:
    monkeypatch.setattr(stages, "next_best", lambda: aten)
    cin = 12 if reason == "channels" else 16
    weights, x = block(cin, 24, 16, HALF), activations(1, cin, 5, 5, HALF)
    if reason == "address":
        x = torch.cat([x.new_zeros(1), x.permute(0, 2, 3, 1).reshape(-1)])[1:].view(1, 5, 5, cin).permute(0, 3, 1, 2)
    got = fused.inverted_residual_folded(x, *weights, 1, False)
    assert emulated == [] and torch.equal(got, aten.inverted_residual_folded(x, *weights, 1, False))


def test_every_other_stage_is_the_next_backends() -> None:
    from mbv2.kernels import selfcheck
    from mbv2.kernels.triton import stages as triton_stages

    assert stages.inverted_residual_folded is fused.inverted_residual_folded
    for name in triton_stages.__all__:
        assert callable(getattr(stages, name))
    assert stages.stem_folded is triton_stages.stem_folded
    with pytest.raises(AttributeError):
        _ = stages.no_such_stage
    assert selfcheck.examples("inverted_residual_folded", HALF)


@pytest.mark.parametrize("dtype", [HALF, pytest.param(BFLOAT16, marks=slow), pytest.param(FLOAT, marks=slow)])
def test_the_first_use_check_runs_through_the_kernel_and_passes(
    emulated: Launches,  # noqa: F811
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from mbv2.kernels.selfcheck import disagreement

    wishing(monkeypatch, tile=0)
    assert disagreement("inverted_residual_folded", fused.inverted_residual_folded, dtype, torch.device("cpu")) is None
    assert len(emulated) == 3
