"""Pairs in CUDA C++: expand and depthwise in one launch, project in another; nvcc's PTX run by ptxcpu."""

import itertools
from typing import Any

import pytest
import torch
from emulated_cuda import A100, GPUS, block, emulated, emulated_launch, emulated_product, run, wishing  # noqa: F401
from ptxcpu.nvcc import find_nvcc
from stage_check import activations, relative_error
from test_cuda_plan import blocks
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.cuda import fused

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

Launches = list[tuple[Any, Any]]
HALF, BFLOAT16, FLOAT = torch.float16, torch.bfloat16, torch.float32
slow = pytest.mark.slow
SHAPE = fused.Shape(0, 1, 9, 11, 24, 72, 24, 1, True, True)


# dtype, tile of the first and of the second launch, splits, (n, cin, hidden, cout, h, w, stride, residual)
CASES = [
    (HALF, 8, 0, 2, (2, 24, 72, 24, 9, 11, 1, True)),
    (HALF, 8, 3, 1, (1, 16, 40, 72, 13, 9, 2, False)),
    pytest.param(BFLOAT16, 8, 4, 3, (2, 24, 72, 24, 7, 7, 1, True), marks=slow),
    pytest.param(FLOAT, 8, 0, 3, (2, 24, 40, 24, 9, 11, 1, True), marks=slow),
    pytest.param(HALF, 7, 1, 1, (1, 40, 104, 40, 15, 15, 1, True), marks=slow),
    pytest.param(HALF, 7, 2, 2, (3, 96, 72, 136, 7, 7, 2, False), marks=slow),
    pytest.param(FLOAT, 7, 2, 1, (1, 88, 72, 136, 7, 7, 2, False), marks=slow),
    pytest.param(BFLOAT16, 7, 1, 1, (2, 24, 200, 448, 9, 3, 1, False), marks=slow),
]


@pytest.mark.parametrize(("dtype", "tile", "product", "splits", "sizes"), CASES, ids=str)
def test_a_pair_is_as_good_as_eager(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    tile: int,
    product: int,
    splits: int,
    sizes: tuple[int, ...],
) -> None:
    n, cin, hidden, cout, h, w, stride, residual = sizes
    wishing(monkeypatch, cut=1, tile=tile, product=product, splits=splits)
    run(activations(n, cin, h, w, dtype), block(cin, hidden, cout, dtype), stride, bool(residual))
    assert [plan.tile for plan, _ in emulated] == [tile, product]
    assert emulated[0][0].splits == splits


@pytest.mark.parametrize("cut", [(3, 5, 1), (9, 2, 3), (1, 1, 2)], ids=str)
def test_tiles_and_chunks_of_the_hidden_tensor_meet_without_a_seam(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    cut: tuple[int, int, int],
) -> None:
    height, width, splits = cut
    wishing(monkeypatch, cut=1, tile=8, tile_height=height, tile_width=width, splits=splits, product=0)
    run(activations(1, 24, 9, 11, HALF), block(24, 72, 24, HALF), 1, True)
    assert [plan[:5] for plan, _ in emulated[:1]] == [(0, 8, 1, height, width)] and emulated[0][0].splits == splits


def test_the_hidden_tensor_is_plain_torchs_rounded_once(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept: list[Tensor] = []
    launch_product = fused.launch_product
    monkeypatch.setattr(fused, "launch_product", lambda plan, t: (kept.append(t[0]), launch_product(plan, t)))
    wishing(monkeypatch, cut=1, tile=8, product=0, splits=2)
    weights, x = block(24, 72, 24, HALF), activations(2, 24, 9, 11, HALF)
    fused.inverted_residual_folded(x, *weights, 1, True)
    w1, b1, wd, bd, _, _ = [None if t is None else t.double() for t in weights]
    expanded = torch.nn.functional.conv2d(x.double(), w1, b1).clamp(0, 6).half().double()
    hidden = torch.nn.functional.conv2d(expanded, wd, bd, padding=1, groups=72).clamp(0, 6)
    assert kept[0].shape == hidden.shape and kept[0].is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(kept[0].double(), hidden, rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_no_race_in_either_order_of_lanes(order: str) -> None:
    pair = fused.pair_for(SHAPE, A100, tile=8, splits=2, product=0)
    assert isinstance(pair, fused.Pair)
    w1, b1, wd, bd, w3, b3 = block(24, 72, 24, HALF)
    x, hidden, out = (torch.empty(1, 9, 11, c, dtype=HALF) for c in (24, 72, 24))
    x.copy_(activations(1, 24, 9, 11, HALF).permute(0, 2, 3, 1))
    options = {"strict_races": True, "lane_order": order}
    stats = emulated_launch(pair.front, (x, w1, wd, None, b1, bd, None, hidden, None), **options)
    assert torch.isfinite(hidden).all() and stats.mma > 0 and stats.atomics == 0
    stats = emulated_product(pair.product, (hidden, w3, b3, x, out), **options)
    assert torch.isfinite(out).all() and stats.mma > 0 and stats.atomics == 0


def test_nan_reaches_exactly_the_positions_it_reaches_in_eager(
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wishing(monkeypatch, cut=1, tile=8, product=0, splits=1)
    weights = block(24, 72, 24, HALF)
    x = activations(2, 24, 9, 11, HALF)
    x[0, 3, 0, 4] = float("nan")
    x[1, 3, 8, 8] = float("inf")
    got = fused.inverted_residual_folded(x, *weights, 1, False)
    expected = aten.inverted_residual_folded(x, *weights, 1, False)
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2, equal_nan=True)


def test_each_launch_moves_its_tensors_once() -> None:
    pair = fused.pair_for(SHAPE, A100, tile=8, splits=1, product=0)
    assert isinstance(pair, fused.Pair)
    w1, b1, wd, bd, w3, b3 = block(24, 72, 24, HALF)
    x, hidden, out = (torch.zeros(1, 9, 11, c, dtype=HALF) for c in (24, 72, 24))
    first = (x, w1, wd, None, b1, bd, None, hidden, None)
    second = (hidden, w3, b3, x, out)
    for stats, tensors in (
        (emulated_launch(pair.front, first, count_sectors=True), first),
        (emulated_product(pair.product, second, count_sectors=True), second),
    ):
        moved = 32 * (stats.total_sectors.loads + stats.total_sectors.stores)
        least = sum(t.nbytes for t in tensors if t is not None)
        assert least <= moved <= 1.1 * least + 6 * 64


def planned() -> dict[str, tuple[fused.Shape, dict[str, int]]]:
    """The distinct pairs of the full-width network at a batch of 64 or 256, cut down to a tile and a ragged rest."""
    found = {}
    network = [shape for shape in dict.fromkeys(blocks(1.0, 224, 1)) if shape.expands]
    for element, dtype in enumerate(fused.ELEMENTS):
        for gpu, images, shape in itertools.product(GPUS.values(), (64, 256), network):
            pair = fused.choice_for(shape._replace(element=element, images=images), gpu)
            if not isinstance(pair, fused.Pair):
                continue
            front, product = pair.front, pair.product.tile
            height, width = (min(shape.height, n * shape.stride + 3) for n in (front.height, front.width))
            small = shape._replace(element=element, images=front.images + 1, height=height, width=width)
            wish = {"tile": front.tile, "tile_height": front.height, "tile_width": front.width, "splits": 1}
            channels = f"{shape.inputs}-{shape.hidden}-{shape.outputs} s{shape.stride} {dtype}"
            name = f"{channels} tile {front.tile} {front.images}x{front.height}x{front.width}"
            found[name] = small, wish | {"tile_images": front.images, "product": product}
    return found


PLANNED = planned()


def test_pairs_are_planned_in_every_type() -> None:
    assert {shape.element for shape, _ in PLANNED.values()} == {0, 1, 2}


@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("shape", "wish"), PLANNED.values(), ids=PLANNED)
def test_every_pair_of_the_network_is_as_exact_as_plain_torch(
    request: pytest.FixtureRequest,
    emulated: Launches,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
    shape: fused.Shape,
    wish: dict[str, int],
) -> None:
    dtype = list(fused.ELEMENTS)[shape.element]
    if request.config.getoption("--device") != "cuda":
        # Any of the GPUs' plans fits ptxcpu.
        monkeypatch.setattr(fused, "gpu_of", lambda device: GPUS["H100"])
    elif isinstance(fused.pair_for(shape, fused.gpu_of(torch.device("cuda")), **wish), str):
        pytest.skip("another GPU's plan")
    wishing(monkeypatch, cut=1, **wish)
    x = activations(shape.images, shape.inputs, shape.height, shape.width, dtype)
    weights = block(shape.inputs, shape.hidden, shape.outputs, dtype)
    got = fused.inverted_residual_folded(x, *weights, shape.stride, shape.residual)
    assert [plan.tile for plan, _ in emulated] == [wish["tile"], wish["product"]]
    eager = aten.inverted_residual_folded(x, *weights, shape.stride, shape.residual)
    doubled = [t if t is None else t.double() for t in weights]
    exact = aten.inverted_residual_folded(x.double(), *doubled, shape.stride, shape.residual)
    error, theirs = relative_error(got, exact), relative_error(eager, exact)
    print(f"error {error:.2e}, plain torch's {theirs:.2e}, {error / theirs:.2f} times")
    assert error <= 1.3 * theirs + (1e-6 if dtype == FLOAT else 0)
