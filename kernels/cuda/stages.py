"""The stage functions of the CUDA C++ backend, named as their plain-torch twins in `kernels/aten.py`.

Stages without a kernel here are Triton's, or plain torch's where Triton is not installed.
"""

from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from mbv2.kernels import aten
from mbv2.kernels.cuda.fused import inverted_residual_folded
from mbv2.kernels.cuda.training import depthwise, depthwise_backward

__all__ = ["depthwise", "depthwise_backward", "inverted_residual_folded"]


def __getattr__(stage: str) -> Callable[..., Any]:
    return getattr(next_best(), stage)


def next_best() -> ModuleType:
    """Who runs a stage that has no kernel here."""
    if find_spec("triton") is None:
        return aten
    from mbv2.kernels.triton import stages

    return stages
