"""The static gate on the fused block's machine code, per architecture: what `bench.resources_cuda` finds wrong."""

import json
from typing import Any

import pytest
import torch
from emulated_cuda import block, emulated, wishing  # noqa: F401
from ptxcpu.nvcc import find_nvcc
from stage_check import activations

from bench import fused_counts, resources_cuda, roofline, sass
from bench.occupancy import ARCHITECTURES
from mbv2.kernels.cuda import fused

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
slow = pytest.mark.slow


@pytest.fixture
def counted(request: pytest.FixtureRequest, emulated: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:  # noqa: F811
    """The emulated launches with what they did, which a GPU does not tell."""
    if request.config.getoption("--device") == "cuda":
        pytest.skip("a GPU does not count its instructions")
    return emulated


# Tiles with the depthwise stage, the kernel that adds partial sums, the products.
KERNELS = len(fused_counts.tiles()) + 1 + len(fused_counts.product_tiles())


def test_the_largest_tile_keeps_the_gate() -> None:
    found = resources_cuda.rows(torch.float16, ARCHITECTURES[80], NVCC, only_tile=0)
    assert list(found) == ["0"]
    row = found["0"]
    assert row["faults"] == [] and row["registers"] <= 128 and row["plans"] > 0 and row["tensor_core"] >= 48


def test_a_pairs_kernels_keep_the_gate() -> None:
    [row] = resources_cuda.rows(torch.float16, ARCHITECTURES[80], NVCC, only_tile=8).values()
    assert row["faults"] == [] and row["registers"] <= 80 and row["plans"] > 0
    shapes = resources_cuda.used_by(torch.float16, ARCHITECTURES[80])
    found = resources_cuda.products(torch.float16, ARCHITECTURES[80], NVCC, shapes)
    assert len(found) == len(fused_counts.product_tiles()) and sum(row["plans"] for row in found.values()) > 0
    for name, row in found.items():
        assert row["faults"] == [] and row["registers"] <= 128, name
        # A pass over 32 channels: next to its tensor-core instructions copies, operands and the loop.
        assert row["counts"]["chunk"] <= 2 * row["tensor_core"] + 70, name


def test_a_worse_kernel_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources_cuda.BUDGET, torch.float16, {4: (5.0, 5.0), 2: (5.0, 5.0)})
    monkeypatch.setattr(resources_cuda, "WARPS_AT_LEAST", 17)
    faults = resources_cuda.rows(torch.float16, ARCHITECTURES[80], NVCC, only_tile=0)["0"]["faults"]
    assert len(faults) == 3 and "the budget is 5.0" in faults[0] and "warps an SM" in faults[2]


@pytest.mark.parametrize(("size", "stride"), [((8, 28), 1), ((15, 28), 2), ((5, 9), 1)], ids=str)
def test_products_counted_in_machine_code_times_their_runs_are_those_that_run(
    size: tuple[int, int],
    stride: int,
    counted: list[tuple[fused.Plan, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_product(this: sass.Instruction) -> bool:
        return this.opcode == "HMMA"

    _, listing = resources_cuda.kernels(torch.float16, 80, NVCC, only_tile=0)["0"]
    products = fused_counts.counts(listing, is_product)
    everything = fused_counts.counts(listing)
    assert 0 < sum(products.values()) < sum(everything.values())
    assert all(count <= everything[part] for part, count in products.items())
    wishing(
        monkeypatch, tile=0, splits=1, tile_height=(size[0] - 1) // stride + 1, tile_width=(size[1] - 1) // stride + 1
    )
    x = activations(2, 24, *size, torch.float16)
    fused.inverted_residual_folded(x, *block(24, 72, 16, torch.float16), stride, False)
    [(plan, stats)] = counted
    shape = fused.Shape(0, 2, *size, 24, 72, 16, stride, True, False)
    assert fused_counts.executed(shape, plan, {"0": products}) == 32 * stats.mma


@pytest.mark.parametrize(("size", "stride"), [((8, 14), 1), ((5, 9), 2)], ids=str)
def test_a_pairs_products_counted_in_machine_code_times_their_runs_are_those_that_run(
    size: tuple[int, int],
    stride: int,
    counted: list[tuple[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def is_product(this: sass.Instruction) -> bool:
        return this.opcode == "HMMA"

    _, front = resources_cuda.kernels(torch.float16, 80, NVCC, only_tile=8)["8"]
    _, product = resources_cuda.kernels(torch.float16, 80, NVCC, kind="product")["0"]
    counts = {
        "8": fused_counts.counts(front, is_product),
        "product0": fused_counts.product_counts(product, is_product),
    }
    high, wide = ((side - 1) // stride + 1 for side in size)
    wishing(monkeypatch, cut=1, tile=8, splits=1, tile_height=high, tile_width=wide, product=0)
    x = activations(2, 24, *size, torch.float16)
    # 96 hidden channels: a product's steps past the last channel would be counted and not run.
    fused.inverted_residual_folded(x, *block(24, 96, 16, torch.float16), stride, False)
    [(plan, stats), (second, its_stats)] = counted
    shape = fused.Shape(0, 2, *size, 24, 96, 16, stride, True, False)
    pair = fused.Pair(plan, second, 0)
    assert fused_counts.pair_executed(shape, pair, counts) == (32 * stats.mma, 32 * its_stats.mma)


def test_the_committed_figures_are_of_the_predicted_gpus_and_without_fault() -> None:
    known = json.loads(resources_cuda.RESULTS.read_text())
    assert {gpu.name for gpu in roofline.GPUS} <= set(known) == {f"sm_{number}" for number in ARCHITECTURES}
    for arch, types in known.items():
        assert set(types) == {str(dtype).removeprefix("torch.") for dtype in resources_cuda.NAMES}, arch
        for name, tiles in types.items():
            assert len(tiles) == KERNELS, (arch, name)
            assert not [(arch, name, tile, row["faults"]) for tile, row in tiles.items() if row["faults"]]
            assert all(row["local_memory"] == 0 for row in tiles.values()), (arch, name)


# Compiling a type for an architecture takes minutes on a busy machine.
@slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.float16, 90), *((dtype, 120) for dtype in resources_cuda.NAMES), (torch.bfloat16, 80), (torch.float32, 80)],
    ids=str,
)
def test_every_tile_keeps_the_gate(dtype: torch.dtype, arch: int) -> None:
    found = resources_cuda.rows(dtype, ARCHITECTURES[arch], NVCC)
    assert len(found) == KERNELS
    assert [f"{tile}: {fault}" for tile, row in found.items() for fault in row["faults"]] == []
