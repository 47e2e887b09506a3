"""The whole-stage operators for inference in torch.library (namespace `mbv2`): BatchNorm folded into weight and bias.

Weights are in the activations' type, biases in float32 (float64 for float64 activations). They have gradients too,
computed by plain torch, for whoever fine-tunes a folded network; the training operators are the fast way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.dispatch import stages_for
from mbv2.kernels.layout import channels_last, new_channels_last
from mbv2.kernels.registration import operator


@operator
def inverted_residual(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    bd: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    residual: bool,
) -> Tensor:
    """One block: relu6(w1 x + b1), relu6(wd * + bd), w3 + b3, plus x if `residual`; w1 and b1 None: no expansion."""
    stages = stages_for("inverted_residual", x)
    return stages.inverted_residual_folded(channels_last(x), w1, b1, wd, bd, w3, b3, stride, residual)


@inverted_residual.register_fake
def _(x, w1, b1, wd, bd, w3, b3, stride, residual):
    n, _, h, w = x.shape
    return new_channels_last(x, (n, w3.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1))


@operator
def stem_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """relu6(conv3x3(x) + bias)."""
    return stages_for("stem_folded", x).stem_folded(channels_last(x), weight, bias, stride)


@stem_folded.register_fake
def _(x, weight, bias, stride):
    n, _, h, w = x.shape
    return new_channels_last(x, (n, weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1))


@operator
def head_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over H and W of relu6(conv1x1(x) + bias), [N, out]."""
    return stages_for("head_folded", x).head_folded(channels_last(x), weight, bias)


@head_folded.register_fake
def _(x, weight, bias):
    return x.new_empty((x.shape[0], weight.shape[0]))


def _recomputed(plain: Callable[..., Tensor]) -> Callable[..., Any]:
    """A backward that runs `plain` again under autograd."""

    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors = iter(ctx.saved_tensors)
        with torch.enable_grad():
            inputs = [
                next(tensors).detach().requires_grad_(need) if is_tensor else value
                for is_tensor, value, need in zip(ctx.is_tensor, ctx.values, ctx.needs_input_grad, strict=True)
            ]
            wanted = [value for value, need in zip(inputs, ctx.needs_input_grad, strict=True) if need]
            gradients = iter(torch.autograd.grad(plain(*inputs), wanted, grad))
        return tuple(next(gradients) if need else None for need in ctx.needs_input_grad)

    return backward


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.values = [None if isinstance(value, Tensor) else value for value in inputs]
    ctx.save_for_backward(*[value for value in inputs if isinstance(value, Tensor)])


inverted_residual.register_autograd(_recomputed(aten.inverted_residual_folded), setup_context=_save)
stem_folded.register_autograd(_recomputed(aten.stem_folded), setup_context=_save)
head_folded.register_autograd(_recomputed(aten.head_folded), setup_context=_save)
