"""How a Python function becomes an operator of torch.library."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def operator(function: Callable[..., Any]) -> torch.library.CustomOpDef:
    """Register `function` as the operator mbv2::<its name>; its first argument is a tensor and mutates nothing.

    Autocast does not reach inside: results have the types of the arguments, whatever the caller's context is.
    """

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        with torch.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return function(*args)

    # Weight gradients are laid out like the weight, so a compiler must hand over the strides it traced with.
    tags = (torch.Tag.needs_exact_strides,)
    return torch.library.custom_op(f"mbv2::{function.__name__}", run, mutates_args=(), tags=tags)
