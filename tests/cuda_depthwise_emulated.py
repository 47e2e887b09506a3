"""The CUDA C++ depthwise kernels launched through ptxcpu instead of a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from ptxcpu import Module
from ptxcpu.nvcc import compile_ptx
from torch import Tensor

from mbv2.kernels.cuda import depthwise as module

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"


@cache
def compiled(name: str, arch: int) -> Module:
    """The PTX of csrc/cuda/depthwise_<name>.cu."""
    source = SOURCES / f"depthwise_{name}.cu"
    return Module(compile_ptx(source, arch, defines=("MBV2_STATIC_REPORT",)), optimise="-O0")


def shared_bytes(ptx: Module, kernel: str) -> int:
    """Dynamic shared memory the kernel's launcher asks for."""
    return int(ptx.memory[f"{kernel}_shared_bytes"].view("int32")[0])


@contextmanager
def emulated(arch: int = 80, **options: Any) -> Iterator[list[Any]]:
    """Inside, the launchers of mbv2.kernels.cuda.depthwise run PTX on CPU tensors; yields the launches' statistics.

    Args:
        arch: that PTX is made for.
        options: of ptxcpu's `launch`.
    """
    log: list[Any] = []

    def submit(
        stage: str, params: Any, arrays: dict[str, Tensor | None], x: Tensor, stride: int, plan: module.Cut
    ) -> None:
        kind = str(x.dtype).removeprefix("torch.")
        kernel = f"mbv2_{stage}_{kind}_s{stride}_{'x' if arrays['bn'] is None else 'bn'}"
        name = "single" if kind == "float32" else "backward" if stage.endswith("backward") else "forward"
        ptx = compiled(name, arch)
        present = {name: array for name, array in arrays.items() if array is not None}
        stats = ptx.launch(
            kernel,
            plan.parts(x.shape[0]) * -(-x.shape[1] // 16),
            128,
            [bytes(params)],
            shared_bytes(ptx, kernel),
            memory=[_dense(array) for array in present.values()],
            **options,
        )
        names = list(present)
        # The only argument is the struct; the arrays come after it.
        stats.sectors = {names[int(index) - 1]: s for index, s in stats.sectors.items() if 0 < int(index) <= len(names)}
        log.append(stats)

    with patch.object(module, "submit", submit):
        yield log


def _dense(array: Tensor) -> Tensor:
    """The same memory as a contiguous tensor."""
    return array.permute(0, 2, 3, 1) if array.dim() == 4 and not array.is_contiguous() else array
