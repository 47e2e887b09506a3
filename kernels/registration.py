"""How a Python function becomes an operator of torch.library.

This is what `torch.library.custom_op` does, less what that costs: its first call imports the compiler, which takes
seconds; its autograd asks the schema for defaults that no operator here has, in time quadratic in the number of
arguments (half of a small block's forward pass); and it looks for results that alias arguments at every call, where
opcheck does that once, in a test.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("mbv2", "FRAGMENT")
# Weight gradients are laid out like the weight, so a compiler must hand over the strides it traced with.
_TAGS = (torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag)


class Operator:
    """The operator mbv2::<a function's name>, which mutates nothing; call it as the function.

    Attributes:
        overload: what torch's own tools (opcheck, export) take.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__name__
        _library.define(self._name + torch.library.infer_schema(function, mutates_args=()), tags=_TAGS)
        _library.impl(self._name, _kernel(function), "CompositeExplicitAutograd")
        self.overload = getattr(torch.ops.mbv2, self._name).default
        self.__name__, self.__doc__ = function.__name__, function.__doc__

    def __call__(self, *args: Any) -> Any:
        """Through torch's dispatcher: autograd, autocast and compilers see one operator."""
        return self.overload(*args)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Use `function` for tensors that have shapes and no memory."""
        return torch.library.register_fake(f"mbv2::{self._name}", function, lib=_library)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., None] | None = None
    ) -> None:
        """Use `backward(ctx, *grads)`; `setup_context(ctx, inputs, output)` saves for it. See torch.library."""
        _library.impl(self._name, _differentiable(self.overload, backward, setup_context), "Autograd", with_keyset=True)


def operator(function: Callable[..., Any]) -> Operator:
    """Register `function` as the operator mbv2::<its name>; its first argument is a tensor and mutates nothing.

    Autocast does not reach inside: results have the types of the arguments, whatever the caller's context is.
    """
    return Operator(function)


def _kernel(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` without autocast, on the first argument's device, and never traced by the compiler."""

    def run(*args: Any) -> Any:
        device = args[0].device.type
        if device == "cpu" and not torch.is_autocast_enabled("cpu"):
            return function(*args)
        with torch.autocast(device, enabled=False), torch.cuda.device_of(args[0]):
            return function(*args)

    untraced: Callable[..., Any] | None = None

    def kernel(*args: Any) -> Any:
        nonlocal untraced
        # Nothing traces before somebody imported the compiler.
        if "torch._dynamo" not in sys.modules:
            return run(*args)
        if untraced is None:
            untraced = torch._dynamo.disable(run)
        return untraced(*args)

    return kernel


def _differentiable(
    overload: torch._ops.OpOverload, backward: Callable[..., Any], setup_context: Callable[..., None] | None
) -> Callable[..., Any]:
    """The operator's kernel for tensors that may need gradients."""

    def forward(ctx: Any, *args: Any) -> Any:
        *args, keyset = args
        with torch._C._AutoDispatchBelowAutograd():
            output = overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)
        if setup_context is not None:
            setup_context(ctx, tuple(args), output)
        return output

    def gradients(ctx: Any, *grads: Any) -> Any:
        needed = ctx.needs_input_grad
        ctx.needs_input_grad = needed[:-1]  # the last one is the keyset's
        try:
            given = backward(ctx, *grads)
        finally:
            ctx.needs_input_grad = needed
        return *(given if isinstance(given, tuple) else (given,)), None

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradients)}
    function = type(f"{overload.__name__}_function", (torch.autograd.Function,), members)

    def autograd(keyset: Any, *args: Any) -> Any:
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*args):
            return function.apply(*args, keyset)
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    return autograd
