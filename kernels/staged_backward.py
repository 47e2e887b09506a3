"""The backward halves of the staged operators (`staged`), each an operator of its own, without a derivative of its own.

They take and return tensors as the forward halves do. A result nobody asked for is an empty tensor of size [0].
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels.dispatch import Stages, stages_for
from mbv2.kernels.layout import SCALE, channels_last, new_channels_last, wide
from mbv2.kernels.registration import Operator, operator


def affine_bn(scale: Tensor, shift: Tensor, dtype: torch.dtype) -> Tensor:
    """bn [6, C] that applies scale and shift and has no statistics, so that sums are of dz and of dz * y."""
    scale, shift = scale.to(wide(dtype)), shift.to(wide(dtype))
    zero, one = torch.zeros_like(scale), torch.ones_like(scale)
    return torch.stack((zero, one, one, scale, shift, zero))


def _once(function: Callable[..., Any]) -> Operator:
    op = operator(function)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        name = function.__name__.removesuffix("_backward")
        raise NotImplementedError(f"double backward of mbv2::{name} is not supported; use backend 'aten'")

    op.register_autograd(refuse)
    return op


@_once
def expand_backward(
    grad: Tensor, y: Tensor, coef: Tensor, weight: Tensor, x: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of the 1x1 convolution from grad and coef, dy = A * grad + B * y + C."""
    stages = stages_for("expand_backward", x)
    grad, y, x = channels_last(grad), channels_last(y), channels_last(x)
    dx, dweight = stages.expand_backward(grad, y, coef, weight.contiguous(), x, None, need_input, need_weight)
    return _given(dx, x), _like(dweight, weight)


@expand_backward.register_fake
def _(
    grad: Tensor, y: Tensor, coef: Tensor, weight: Tensor, x: Tensor, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return _fake_dense(x, need_input), _fake_like(weight, need_weight)


@_once
def depthwise_backward(
    grad: Tensor,
    y2: Tensor,
    coef: Tensor,
    y1: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy1, dscale, dshift, dweight) of relu6(scale * y1 + shift) and the depthwise convolution, or without scale."""
    stages = stages_for("depthwise_backward", y1)
    grad, y2, y1 = channels_last(grad), channels_last(y2), channels_last(y1)
    bn = None if scale is None or shift is None else affine_bn(scale, shift, y1.dtype)
    dz, sums, dweight = stages.depthwise_backward(
        grad, y2, coef, y1, bn, weight.contiguous(), stride, need_input, need_weight
    )
    return *_prologue(stages, dz, sums, y1, bn), _like(dweight, weight)


@depthwise_backward.register_fake
def _(
    grad: Tensor,
    y2: Tensor,
    coef: Tensor,
    y1: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dscale, dshift = _fake_vectors(y1, need_input and scale is not None)
    return _fake_dense(y1, need_input), dscale, dshift, _fake_like(weight, need_weight)


@_once
def project_backward(
    grad: Tensor,
    y3: Tensor,
    coef: Tensor,
    weight: Tensor,
    y2: Tensor,
    scale: Tensor,
    shift: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dy2, dscale, dshift, dweight) of relu6(scale * y2 + shift) and the 1x1 convolution."""
    stages = stages_for("project_backward", y2)
    grad, y3, y2 = channels_last(grad), channels_last(y3), channels_last(y2)
    bn = affine_bn(scale, shift, y2.dtype)
    dz, sums, dweight = stages.project_backward(grad, y3, coef, weight.contiguous(), y2, bn, need_input, need_weight)
    return *_prologue(stages, dz, sums, y2, bn), _like(dweight, weight)


@project_backward.register_fake
def _(
    grad: Tensor,
    y3: Tensor,
    coef: Tensor,
    weight: Tensor,
    y2: Tensor,
    scale: Tensor,
    shift: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _fake_dense(y2, need_input), *_fake_vectors(y2, need_input), _fake_like(weight, need_weight)


@_once
def stem_backward(
    grad: Tensor, y: Tensor, coef: Tensor, x: Tensor, weight: Tensor, stride: int, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) of the dense 3x3 convolution from grad and coef, dy = A * grad + B * y + C."""
    stages = stages_for("stem_backward", x)
    grad, y, x = channels_last(grad), channels_last(y), channels_last(x)
    # The stage masks by ReLU6 of scale * y + shift; 0 * y + 3 is never masked.
    zero = torch.zeros_like(coef[0])
    bn = affine_bn(zero, zero + 3, y.dtype)
    dx, dweight = stages.stem_backward(grad, y, bn, coef, x, weight.contiguous(), stride, need_input, need_weight)
    return _given(dx, x), _like(dweight, weight)


@stem_backward.register_fake
def _(
    grad: Tensor, y: Tensor, coef: Tensor, x: Tensor, weight: Tensor, stride: int, need_input: bool, need_weight: bool
) -> tuple[Tensor, Tensor]:
    return _fake_dense(x, need_input), _fake_like(weight, need_weight)


@_once
def bn_apply_backward(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, relu6: bool, need_input: bool, need_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dscale, dshift) of scale * y + shift, with ReLU6 after it if asked."""
    stages = stages_for("bn_apply_backward", y)
    grad, y = channels_last(grad), channels_last(y)
    bn = affine_bn(scale, shift, y.dtype)
    sums = stages.bn_sums(grad, y, bn, relu6) if need_vectors else None
    if not need_input:
        return _given(None, y), *_vectors(stages, sums, y, bn)
    dz = grad.to(bn.dtype)
    if relu6:
        z = y.to(bn.dtype) * _vector(scale) + _vector(shift)
        dz = dz.masked_fill((z <= 0) | (z >= 6), 0)
    return channels_last((dz * _vector(scale)).to(y.dtype)), *_vectors(stages, sums, y, bn)


@bn_apply_backward.register_fake
def _(
    grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor, relu6: bool, need_input: bool, need_vectors: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_dense(y, need_input), *_fake_vectors(y, need_vectors)


@_once
def bn_relu6_pool_backward(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dy, dscale, dshift) of the mean over H and W of relu6(scale * y + shift), from grad [N, C]."""
    stages = stages_for("bn_relu6_pool_backward", y)
    y, bn = channels_last(y), affine_bn(scale, shift, y.dtype)
    dz, sums = stages.pool_backward(grad.contiguous(), y, bn)
    return _prologue(stages, dz, sums, y, bn)


@bn_relu6_pool_backward.register_fake
def _(grad: Tensor, y: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_dense(y, True), *_fake_vectors(y, True)


def _prologue(
    stages: Stages, dz: Tensor | None, sums: Tensor | None, y: Tensor, bn: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    # From the gradient at scale * y + shift to those at y, scale and shift.
    dy = dz if dz is None or bn is None else channels_last((dz.to(bn.dtype) * _vector(bn[SCALE])).to(y.dtype))
    return _given(dy, y), *_vectors(stages, sums, y, bn)


def _vectors(stages: Stages, sums: Tensor | None, y: Tensor, bn: Tensor | None) -> tuple[Tensor, Tensor]:
    if sums is None or bn is None:
        return y.new_empty(0, dtype=wide(y.dtype)), y.new_empty(0, dtype=wide(y.dtype))
    dshift, dscale = stages.bn_backward(sums, bn)[0]
    return dscale.clone(), dshift.clone()


def _vector(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def _given(result: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if result is None else result


def _like(gradient: Tensor | None, weight: Tensor) -> Tensor:
    # In the weight's own strides where those are dense.
    if gradient is None:
        return weight.new_empty(0)
    laid_out = torch.empty_like(weight)
    return gradient if gradient.stride() == laid_out.stride() else laid_out.copy_(gradient)


def _fake_dense(like: Tensor, needed: bool) -> Tensor:
    return new_channels_last(like, like.shape) if needed else like.new_empty(0)


def _fake_vectors(y: Tensor, needed: bool) -> tuple[Tensor, Tensor]:
    size = y.shape[1] if needed else 0
    return y.new_empty(size, dtype=wide(y.dtype)), y.new_empty(size, dtype=wide(y.dtype))


def _fake_like(weight: Tensor, needed: bool) -> Tensor:
    return torch.empty_like(weight) if needed else weight.new_empty(0)
