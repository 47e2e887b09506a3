"""What the Triton backend can serve, found out without importing Triton until there is a tensor it might take."""

import os
import sys
from importlib.util import find_spec
from types import ModuleType

import torch

# mma.sync for bfloat16 and cp.async begin there.
_OLDEST = (8, 0)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take activations of `dtype` on `device`, or None when they can."""
    # The CPU comes first: it asks at every call, and the answer must cost nothing.
    if device.type != "cuda":
        reason = _refusal_off_gpu(device, dtype)
        if reason is not None or _interpreting():
            return reason
    elif find_spec("triton") is None:
        return "the package triton is not installed"
    elif torch.version.hip is not None:
        return "the kernels were written for NVIDIA GPUs"
    elif (capability := torch.cuda.get_device_capability(device)) < _OLDEST:
        return f"compute capability {capability[0]}.{capability[1]} is below {_OLDEST[0]}.{_OLDEST[1]}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{dtype} has no kernels, only float32, float16 and bfloat16 have"
    return None


def stages() -> ModuleType:
    """The module of stage functions."""
    from mbv2.kernels.triton import stages

    return stages


def _refusal_off_gpu(device: torch.device, dtype: torch.dtype) -> str | None:
    """Tensors elsewhere are taken in Triton's interpreter, or by a Triton driver whose device they are on."""
    if _interpreting():
        return "Triton's interpreter computes bfloat16 wrongly" if dtype == torch.bfloat16 else None
    elsewhere = f"the input is on {device.type}, not on a CUDA GPU"
    # Where nobody has imported Triton yet, nobody has given it another driver.
    if "triton" not in sys.modules:
        return elsewhere
    import triton

    # Not `driver.active`, which looks for a GPU anew at every call where there is none.
    driver = getattr(triton.runtime.driver, "_active", None)
    return None if driver is not None and driver.get_active_torch_device().type == device.type else elsewhere


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
