"""A stand-in for a GPU, so that the GPU bench can be rehearsed without one: kernels' PTX runs on the CPU.

Triton compiles for sm_80 and nvcc's PTX is that of the CUDA C++ sources; ptxcpu, which belongs to the tests, executes
both on CPU tensors. The planner is told of an A100. What this proves is that every step runs; times mean nothing.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

_TESTS = str(Path(__file__).resolve().parents[1] / "tests")


def missing() -> str | None:
    """Why CUDA C++ kernels cannot be rehearsed here, or None."""
    _find_tests()
    from ptxcpu.nvcc import find_nvcc

    if find_nvcc() is None:
        return "nvcc is not installed"
    try:
        import mbv2._C  # noqa: F401
    except ImportError as error:
        return f"mbv2._C cannot be imported: {error}"
    return None


@contextmanager
def gpu(cuda: bool = True) -> Iterator[None]:
    """Inside, Triton's kernels and, with `cuda`, those in CUDA C++ take CPU tensors; "cuda" is a backend for them."""
    _find_tests()
    from ptxcpu.triton_driver import emulated as triton_emulated

    with triton_emulated(80):
        if not cuda:
            yield
            return
        import cuda_depthwise_emulated
        import emulated_cuda

        from mbv2.kernels import dispatch
        from mbv2.kernels.cuda import fused, stages

        def launch(plan: fused.Plan, tensors: tuple[Any, ...]) -> None:
            emulated_cuda.emulated_launch(plan, tensors, all_tiles=True)

        def launch_product(plan: fused.Product, tensors: tuple[Any, ...]) -> None:
            emulated_cuda.emulated_product(plan, tensors, all_tiles=True)

        backend = dispatch.Backend(lambda device, dtype: None, lambda: stages)
        with (
            cuda_depthwise_emulated.emulated(),
            patch.object(fused, "gpu_of", lambda device: emulated_cuda.A100),
            patch.object(fused, "launch", launch),
            patch.object(fused, "launch_product", launch_product),
            patch.object(torch.cuda, "get_device_capability", lambda device=None: (8, 0)),
            patch.dict(dispatch._backends, {"cuda": backend}),
        ):
            yield


def _find_tests() -> None:
    if _TESTS not in sys.path:
        sys.path.append(_TESTS)
