"""The launches of the fused block run by ptxcpu: the same plans and parameter structs, with nvcc's PTX for sm_80.

With --device cuda the same tests launch on the GPU.
"""

import functools
import hashlib
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from ptxcpu import Module
from ptxcpu.build import cache_dir
from ptxcpu.nvcc import compile_ptx, find_nvcc
from stage_check import assert_as_good_as_eager
from torch import Tensor

from mbv2.files import write_atomic
from mbv2.kernels import aten, layout
from mbv2.kernels.cuda import fused

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NAMES = {0: "half", 1: "bfloat16", 2: "float"}
A100 = fused.Gpu(80, 108, 163 << 10, 164 << 10)
H100 = fused.Gpu(90, 132, 227 << 10, 228 << 10)
RTX4090 = fused.Gpu(89, 128, 99 << 10, 100 << 10)
GPUS = {"A100": A100, "H100": H100, "RTX 4090": RTX4090}
_POINTERS = 9
_launch, _launch_product = fused.launch, fused.launch_product


@functools.cache
def module(element: int, tile: int | None, kind: str = "fused") -> Module:
    """The PTX of one tile's kernel (None: of all), and of the one that adds partial sums; of kind "product" of all.

    It is kept next to ptxcpu's own products, since nvcc takes longer than anything else here.
    """
    source = SOURCES / f"{kind}_{NAMES[element]}.cu"
    known = hashlib.sha256(f"{tile} {_nvcc_version()}".encode())
    headers = {"fused": ("fused_*.*h",), "product": ("fused_params.h", "fused_tensor.cuh", "product*.*h")}[kind]
    shared = SOURCES / "element_kernels.cuh"
    for file in (source, shared, *sorted(path for name in headers for path in SOURCES.glob(name))):
        known.update(file.read_bytes())
    kept = cache_dir() / f"{kind}_{known.hexdigest()[:32]}.ptx"
    if not kept.exists():
        defines = {} if tile is None else {"MBV2_ONLY_TILE": tile}
        write_atomic(kept, compile_ptx(source, 80, defines=defines).encode())
    return Module(kept.read_text())


@functools.cache
def _nvcc_version() -> str:
    return subprocess.run([find_nvcc(), "--version"], capture_output=True, text=True, check=True).stdout


def emulated_launch(
    plan: fused.Plan, tensors: tuple[Tensor | None, ...], all_tiles: bool = False, **options: Any
) -> Any:
    """As `fused.launch`, on CPU tensors; returns what ptxcpu counted of the fused kernel.

    `all_tiles`: by the PTX of all tiles, which is quicker where a test goes through most of them.

    The results and the partial sums are poisoned first, so that what no thread wrote shows as NaN.
    """
    for written in tensors[7:]:
        if written is not None:
            written.fill_(float("nan"))
    memory = [t for t in tensors if t is not None]
    addresses = struct.pack(f"{_POINTERS}Q", *(0 if t is None else t.data_ptr() for t in tensors))
    params = addresses + plan.params[len(addresses) :]
    compiled = module(plan.element, None if all_tiles else plan.tile)
    name = f"fused_{NAMES[plan.element]}"
    stats = compiled.launch(
        f"{name}_{plan.tile}", plan.blocks, plan.threads, [params], plan.shared_bytes, memory=memory, **options
    )
    if plan.partial_bytes:
        out = tensors[7]
        assert out is not None
        compiled.launch(f"{name}_sum", -(-out.numel() // 1024), 256, [params], memory=memory)
    return stats


def emulated_product(
    plan: fused.Product, tensors: tuple[Tensor | None, ...], all_tiles: bool = False, **options: Any
) -> Any:
    """As `fused.launch_product`, on CPU tensors; returns what ptxcpu counted."""
    out = tensors[-1]
    assert out is not None
    out.fill_(float("nan"))
    addresses = struct.pack("5Q", *(0 if t is None else t.data_ptr() for t in tensors))
    params = addresses + plan.params[len(addresses) :]
    memory = [t for t in tensors if t is not None]
    name = f"product_{NAMES[plan.element]}_{plan.tile}"
    return module(plan.element, None if all_tiles else plan.tile, "product").launch(
        name, plan.blocks, plan.threads, [params], plan.shared_bytes, memory=memory, **options
    )


def launched_product(mode: str, plan: fused.Product, tensors: tuple[Tensor | None, ...], **options: Any) -> Any:
    """As `launched`, for a pair's second launch."""
    if mode != "cuda":
        return emulated_product(plan, tensors, **options)
    there = tuple(None if t is None else t.cuda() for t in tensors)
    out, written = tensors[-1], there[-1]
    assert out is not None and written is not None
    written.fill_(float("nan"))
    _launch_product(plan, there)
    out.copy_(written)
    return None


def launched(mode: str, plan: fused.Plan, tensors: tuple[Tensor | None, ...], **options: Any) -> Any:
    """As `emulated_launch`; in mode "cuda" on the GPU, with the results copied back, and nothing counted."""
    if mode != "cuda":
        return emulated_launch(plan, tensors, **options)
    there = tuple(None if t is None else t.cuda() for t in tensors)
    for mine, written in zip(tensors[7:], there[7:], strict=True):
        if mine is not None and written is not None:
            written.fill_(float("nan"))
    _launch(plan, there)
    for mine, written in zip(tensors[7:], there[7:], strict=True):
        if mine is not None and written is not None:
            mine.copy_(written)
    return None


@pytest.fixture
def emulated(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """The fused stage on CPU tensors; the list gets every plan and what its launch did.

    Planned for an A100 and run by ptxcpu, or with --device cuda planned for the GPU and run there.
    """
    mode = request.config.getoption("--device")
    if mode == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda, but torch sees no GPU")
    launches: list[tuple[Any, Any]] = []
    limits = fused.gpu_of(torch.device("cuda")) if mode == "cuda" else A100
    options = {} if mode == "cuda" else OPTIONS
    monkeypatch.setattr(fused, "gpu_of", lambda device: limits)
    monkeypatch.setattr(
        fused, "launch", lambda plan, tensors: launches.append((plan, launched(mode, plan, tensors, **options)))
    )
    monkeypatch.setattr(
        fused,
        "launch_product",
        lambda plan, tensors: launches.append((plan, launched_product(mode, plan, tensors, **options))),
    )
    return launches


OPTIONS: dict[str, Any] = {"count_sectors": True}


def wishing(monkeypatch: pytest.MonkeyPatch, **wish: int) -> None:
    """Have the planner choose among plans with this cut, tile, tile size or number of splits only; one launch unless
    the cut is wished."""
    planner = fused.choice_for
    monkeypatch.setattr(fused, "choice_for", lambda shape, gpu: planner(shape, gpu, **{"cut": 0} | wish))


def block(cin: int, hidden: int, cout: int, dtype: torch.dtype, expands: bool = True) -> tuple[Tensor | None, ...]:
    """w1, b1, wd, bd, w3, b3 with unit gain; the biases put activations on both sides of 0 and 6."""
    generator = torch.Generator().manual_seed(cin + hidden)

    def weight(*size: int) -> Tensor:
        return (torch.randn(size, generator=generator) / torch.Size(size[1:]).numel() ** 0.5).to(dtype)

    def bias(size: int) -> Tensor:
        return torch.randn(size, generator=generator) * 2 + 1

    w1, b1 = (weight(hidden, cin, 1, 1), bias(hidden)) if expands else (None, None)
    return w1, b1, weight(hidden, 1, 3, 3), bias(hidden), weight(cout, hidden, 1, 1), bias(cout)


def run(x: Tensor, weights: tuple[Tensor | None, ...], stride: int, residual: bool) -> Tensor:
    """The stage's result, held against plain torch by the policy of `stage_check`."""
    got = fused.inverted_residual_folded(x, *weights, stride, residual)
    eager = aten.inverted_residual_folded(x, *weights, stride, residual)
    doubled = [t if t is None else t.double() for t in weights]
    exact = aten.inverted_residual_folded(x.double(), *doubled, stride, residual)
    assert got.stride() == layout.channels_last(eager).stride() and got.dtype == eager.dtype
    assert_as_good_as_eager("fused block", got, eager, exact, x.dtype)
    return got
