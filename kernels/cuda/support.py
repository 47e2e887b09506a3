"""What the CUDA C++ backend can serve, found out without importing anything until there is a tensor on a GPU."""

import functools
import importlib
from types import ModuleType

import torch

# mma.sync for bfloat16 and cp.async begin there.
_OLDEST = (8, 0)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take activations of `dtype` on `device`, or None when they can."""
    # The CPU comes first: it asks at every call, and the answer must cost nothing.
    if device.type != "cuda":
        return f"the input is on {device.type}, not on a CUDA GPU"
    if (reason := missing()) is not None:
        return reason
    if torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    if (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} has no kernels, only float32, float16 and bfloat16 have"
    return None


def stages() -> ModuleType:
    """The module of stage functions."""
    from mbv2.kernels.cuda import stages

    return stages


@functools.cache
def missing() -> str | None:
    """Why the compiled modules cannot be used here, or None."""
    try:
        importlib.import_module("mbv2._C")
        importlib.import_module("mbv2._cuda")
    except ImportError as error:
        return (
            f"mbv2 has no compiled CUDA kernels here ({error}); install it where nvcc and torch are: "
            "MBV2_BUILD=1 pip install --no-build-isolation <the source folder or sdist>"
        )
    return None
