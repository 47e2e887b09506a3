"""The static gate on the fused block's machine code, per architecture: what `bench.resources_cuda` finds wrong."""

import pytest
import torch
from ptxcpu.nvcc import find_nvcc

from bench import resources_cuda
from bench.occupancy import ARCHITECTURES

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
NVCC = find_nvcc()
pytestmark = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
slow = pytest.mark.slow


def test_the_largest_tile_keeps_the_gate() -> None:
    found = resources_cuda.rows(torch.float16, ARCHITECTURES[80], NVCC, only_tile=0)
    assert list(found) == ["0"]
    row = found["0"]
    assert row["faults"] == [] and row["registers"] <= 128 and row["plans"] > 0 and row["tensor_core"] >= 48


def test_a_worse_kernel_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(resources_cuda.BUDGET, torch.float16, {4: (5.0, 5.0), 2: (5.0, 5.0)})
    monkeypatch.setattr(resources_cuda, "WARPS_AT_LEAST", 17)
    faults = resources_cuda.rows(torch.float16, ARCHITECTURES[80], NVCC, only_tile=0)["0"]["faults"]
    assert len(faults) == 3 and "warps an SM" in faults[0] and "the budget is 5.0" in faults[1]


@slow
@pytest.mark.parametrize(
    ("dtype", "arch"), [(torch.float16, 90), (torch.float16, 120), (torch.bfloat16, 80), (torch.float32, 80)], ids=str
)
def test_every_tile_keeps_the_gate(dtype: torch.dtype, arch: int) -> None:
    found = resources_cuda.rows(dtype, ARCHITECTURES[arch], NVCC)
    assert len(found) == 8
    assert [f"{tile}: {fault}" for tile, row in found.items() for fault in row["faults"]] == []
