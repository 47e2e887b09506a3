"""The CUDA C++ depthwise kernels launched through ptxcpu instead of a GPU."""

import ctypes
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
_POINTER, _INT = ctypes.c_uint64, ctypes.c_int32


class ForwardParams(ctypes.Structure):
    """`DepthwiseParams` of depthwise_params.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("x", "bn", "weight", "y", "moments")),
        *((name, _INT) for name in ("n", "c", "h", "w", "ho", "wo")),
        ("cut", _INT * 6),
    ]


class BackwardParams(ctypes.Structure):
    """`DepthwiseBackwardParams` of depthwise_params.h."""

    _fields_ = [
        *((name, _POINTER) for name in ("dz2", "y2", "coef", "y1", "bn", "weight", "dz1", "sums", "dweight")),
        *((name, _INT) for name in ("n", "c", "h", "w", "ho", "wo")),
        ("cut", _INT * 6),
    ]


@cache
def compiled(source: str, arch: int = 80) -> Module:
    """The PTX of one file of csrc/cuda."""
    return Module(compile_ptx(SOURCES / source, arch, defines=("MBV2_STATIC_REPORT",)))


def shared_bytes(ptx: Module, kernel: str) -> int:
    """Dynamic shared memory the kernel's launcher asks for."""
    return int(ptx.memory[f"{kernel}_shared_bytes"].view("int32")[0])


@contextmanager
def emulated(count_sectors: bool = False) -> Iterator[list[Any]]:
    """Inside, the launchers of mbv2.kernels.cuda.depthwise run PTX on CPU tensors; yields the launches' statistics."""
    log: list[Any] = []

    def launch(source: str, kernel: str, params: Any, arrays: dict[str, Tensor | None], shape: Any, plan: Any) -> None:
        for name, array in arrays.items():
            setattr(params, name, 0 if array is None else array.data_ptr())
        n, c, h, w = shape
        params.n, params.c, params.h, params.w = n, c, h, w
        params.cut = (_INT * 6)(*plan)
        ptx = compiled(source)
        memory = [_dense(array) for array in arrays.values() if array is not None]
        blocks = plan.parts(n) * -(-c // (16 * plan.slabs))
        names = [name for name, array in arrays.items() if array is not None]
        stats = ptx.launch(
            kernel, blocks, 128 * plan.slabs, [bytes(params)], shared_bytes(ptx, kernel), memory=memory,
            count_sectors=count_sectors,
        )  # fmt: skip
        stats.sectors = {names[int(index) - 1]: s for index, s in stats.sectors.items() if int(index) > 0}
        log.append(stats)

    def forward(x: Tensor, bn: Any, weight: Tensor, y: Tensor, moments: Tensor, stride: int, plan: Any) -> None:
        params = ForwardParams()
        params.ho, params.wo = y.shape[2:]
        kernel = f"mbv2_depthwise_{_kind(x)}_s{stride}_{'x1' if bn is None else 'bn1'}"
        arrays = {"x": x, "bn": bn, "weight": weight.contiguous(), "y": y, "moments": moments}
        launch("depthwise_forward.cu", kernel, params, arrays, x.shape, plan)

    def backward(
        dz2: Tensor, y2: Tensor, coef: Tensor, y1: Tensor, bn: Any, weight: Tensor, dz1: Any, sums: Any, dweight: Any,
        stride: int, plan: Any,
    ) -> None:  # fmt: skip
        params = BackwardParams()
        params.ho, params.wo = y2.shape[2:]
        kernel = f"mbv2_depthwise_backward_{_kind(y1)}_s{stride}_{'x1' if bn is None else 'bn1'}"
        arrays = {
            "dz2": dz2, "y2": y2, "coef": coef, "y1": y1, "bn": bn, "weight": weight.contiguous(), "dz1": dz1,
            "sums": sums, "dweight": dweight,
        }  # fmt: skip
        launch("depthwise_backward.cu", kernel, params, arrays, y1.shape, plan)

    with patch.object(module, "_forward", forward), patch.object(module, "_backward", backward):
        yield log


def _kind(x: Tensor) -> str:
    return str(x.dtype).removeprefix("torch.")


def _dense(array: Tensor) -> Tensor:
    """The same memory as a contiguous tensor, whatever the strides."""
    return array.permute(0, 2, 3, 1) if array.dim() == 4 and not array.is_contiguous() else array
