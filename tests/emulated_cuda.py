"""The launches of the fused block run by ptxcpu: the same plans and parameter structs, with nvcc's PTX for sm_80."""

import functools
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxcpu import Module
from ptxcpu.nvcc import compile_ptx
from torch import Tensor

from mbv2.kernels.cuda import fused

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NAMES = {0: "half", 1: "bfloat16", 2: "float"}
A100 = fused.Gpu(80, 108, 163 << 10, 164 << 10)
H100 = fused.Gpu(90, 132, 227 << 10, 228 << 10)
RTX4090 = fused.Gpu(89, 128, 99 << 10, 100 << 10)
GPUS = {"A100": A100, "H100": H100, "RTX 4090": RTX4090}
_POINTERS = 9


@functools.cache
def module(element: int, tile: int) -> Module:
    """The PTX of one tile's kernel, and of the one that adds partial sums."""
    return Module(compile_ptx(SOURCES / f"fused_{NAMES[element]}.cu", 80, defines={"MBV2_ONLY_TILE": tile}))


def emulated_launch(plan: fused.Plan, tensors: tuple[Tensor | None, ...], **options: Any) -> Any:
    """As `fused.launch`, on CPU tensors; returns what ptxcpu counted of the fused kernel.

    The results and the partial sums are poisoned first, so that what no thread wrote shows as NaN.
    """
    for written in tensors[7:]:
        if written is not None:
            written.fill_(float("nan"))
    memory = [t for t in tensors if t is not None]
    addresses = struct.pack(f"{_POINTERS}Q", *(0 if t is None else t.data_ptr() for t in tensors))
    params = addresses + plan.params[len(addresses) :]
    compiled = module(plan.element, plan.tile)
    name = f"fused_{NAMES[plan.element]}"
    stats = compiled.launch(
        f"{name}_{plan.tile}", plan.blocks, plan.threads, [params], plan.shared_bytes, memory=memory, **options
    )
    if plan.splits > 1:
        out = tensors[7]
        assert out is not None
        compiled.launch(f"{name}_sum", -(-out.numel() // 1024), 256, [params], memory=memory)
    return stats


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[fused.Plan, Any]]:
    """The fused stage on CPU tensors, planned for an A100; the list gets every plan and what its launch did."""
    launches: list[tuple[fused.Plan, Any]] = []
    monkeypatch.setattr(fused, "gpu_of", lambda device: A100)
    monkeypatch.setattr(
        fused, "launch", lambda plan, tensors: launches.append((plan, emulated_launch(plan, tensors, **OPTIONS)))
    )
    return launches


OPTIONS: dict[str, Any] = {"count_sectors": True}


def wishing(monkeypatch: pytest.MonkeyPatch, **wish: int) -> None:
    """Have the planner choose among plans with this tile, tile size or number of splits only."""
    planner = fused.plan_for
    monkeypatch.setattr(fused, "plan_for", lambda shape, gpu: planner(shape, gpu, **wish))


def block(cin: int, hidden: int, cout: int, dtype: torch.dtype, expands: bool = True) -> tuple[Tensor | None, ...]:
    """w1, b1, wd, bd, w3, b3 with unit gain; the biases put activations on both sides of 0 and 6."""
    generator = torch.Generator().manual_seed(cin + hidden)

    def weight(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / torch.Size(size[1:]).numel() ** 0.5).to(dtype)

    def bias(size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 2 + 1

    w1, b1 = (weight(hidden, cin, 1, 1), bias(hidden)) if expands else (None, None)
    return w1, b1, weight(hidden, 1, 3, 3), bias(hidden), weight(cout, hidden, 1, 1), bias(cout)
