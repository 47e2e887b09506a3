"""What the CPU backend can serve, found out without loading the compiled module until there is a tensor for it."""

from types import ModuleType

import torch

_TYPES = (torch.float32, torch.bfloat16)


def refusal(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take activations of `dtype` on `device`, or None when they can."""
    if device.type != "cpu":
        return f"the input is on {device.type}, not on the CPU"
    if dtype not in _TYPES:
        return f"{dtype} has no kernels, only float32 and bfloat16 have"
    # Not at the top: cpu_network imports the dispatcher, which asks here.
    from mbv2.kernels import cpu_network

    return cpu_network.refusal()


def stages() -> ModuleType:
    """The module of stage functions."""
    from mbv2.kernels.cpu import stages

    return stages
