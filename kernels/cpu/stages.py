"""The stage functions of the CPU backend, named as their twins in `kernels/aten.py`, which say what they do.

Each is one call into `mbv2._C` (csrc/ops_cpu_training.cpp); moments and sums come back as one part, already merged in
a fixed order. In plain torch are only the picture's gradient, which training does not want, and `bn_constant`.
"""

import torch
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.aten import bn_constant

_ops = torch.ops.mbv2


def stem(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """See `aten.stem`: the picture's patches, gathered in tiles, times the weight."""
    return _ops.cpu_stage_stem(x, weight, stride)


def expand(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `aten.expand`."""
    return _ops.cpu_stage_pointwise(x, None, weight)


def depthwise(y1: Tensor, bn1: Tensor | None, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """See `aten.depthwise`."""
    return _ops.cpu_stage_depthwise(y1, bn1, weight, stride)


def project(y2: Tensor, bn2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `aten.project`."""
    return _ops.cpu_stage_pointwise(y2, bn2, weight)


def merge_moments(moments: Tensor) -> Tensor:
    """See `aten.merge_moments`."""
    return _ops.cpu_stage_merge_moments(moments)


def bn_finalize(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """See `aten.bn_finalize`."""
    return _ops.cpu_stage_bn_finalize(moments, gamma, beta, eps)


def bn_apply(y: Tensor, bn: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """See `aten.bn_apply`."""
    return _ops.cpu_stage_bn_apply(y, bn, residual, relu6)


def bn_relu6_pool(y: Tensor, bn: Tensor) -> Tensor:
    """See `aten.bn_relu6_pool`."""
    return _ops.cpu_stage_bn_relu6_pool(y, bn)


def bn_sums(grad: Tensor, y: Tensor, bn: Tensor, relu6: bool) -> Tensor:
    """See `aten.bn_sums`."""
    return _ops.cpu_stage_bn_sums(grad, y, bn, relu6)


def bn_backward(sums: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """See `aten.bn_backward`."""
    return _ops.cpu_stage_bn_backward(sums, bn)


def project_backward(
    grad: Tensor,
    y3: Tensor,
    coef3: Tensor,
    weight: Tensor,
    y2: Tensor,
    bn2: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `aten.project_backward`."""
    dz2, sums, dweight = _ops.cpu_stage_project_backward(grad, y3, coef3, weight, y2, bn2, need_input, need_weight)
    return dz2 if need_input else None, sums if need_input else None, dweight if need_weight else None


def depthwise_backward(
    dz2: Tensor,
    y2: Tensor,
    coef2: Tensor,
    y1: Tensor,
    bn1: Tensor | None,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `aten.depthwise_backward`."""
    dz1, sums, dweight = _ops.cpu_stage_depthwise_backward(dz2, y2, coef2, y1, bn1, weight, stride, need_weight)
    return (
        dz1 if need_input else None,
        sums if need_input and bn1 is not None else None,
        dweight if need_weight else None,
    )


def expand_backward(
    dz1: Tensor,
    y1: Tensor,
    coef1: Tensor,
    weight: Tensor,
    x: Tensor,
    residual_grad: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See `aten.expand_backward`."""
    dx, dweight = _ops.cpu_stage_expand_backward(dz1, y1, coef1, weight, x, residual_grad, need_input, need_weight)
    return dx if need_input else None, dweight if need_weight else None


def stem_backward(
    grad: Tensor,
    y: Tensor,
    bn: Tensor,
    coef: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """See `aten.stem_backward`."""
    dx = aten.stem_backward(grad, y, bn, coef, x, weight, stride, True, False)[0] if need_input else None
    if not need_weight:
        return dx, None
    return dx, _ops.cpu_stage_stem_weight_backward(grad, y, bn, coef, x, weight, stride)


def pool_backward(grad: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """See `aten.pool_backward`."""
    return _ops.cpu_stage_pool_backward(grad, y, bn)


def stem_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """See `aten.stem_folded`."""
    return _ops.cpu_stage_stem_folded(x, weight, bias, stride)


def pointwise_folded(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool, residual: Tensor | None) -> Tensor:
    """See `aten.pointwise_folded`."""
    return _ops.cpu_stage_pointwise_folded(x, weight, bias, relu6, residual)


def depthwise_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """See `aten.depthwise_folded`."""
    return _ops.cpu_stage_depthwise_folded(x, weight, bias, stride)


def expand_depthwise_folded(x: Tensor, w1: Tensor, b1: Tensor, wd: Tensor, bd: Tensor, stride: int) -> Tensor:
    """See `aten.expand_depthwise_folded`."""
    return depthwise_folded(pointwise_folded(x, w1, b1, True, None), wd, bd, stride)


def depthwise_project_folded(
    x: Tensor, wd: Tensor, bd: Tensor, w3: Tensor, b3: Tensor, stride: int, residual: Tensor | None
) -> Tensor:
    """See `aten.depthwise_project_folded`."""
    return pointwise_folded(depthwise_folded(x, wd, bd, stride), w3, b3, False, residual)


def inverted_residual_folded(
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
    """See `aten.inverted_residual_folded`: hidden rows never leave a core's cache."""
    return _ops.cpu_stage_block_folded(x, w1, b1, wd, bd, w3, b3, stride, residual)


def head_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `aten.head_folded`."""
    return _ops.cpu_stage_head_folded(x, weight, bias)


__all__ = [
    "bn_apply",
    "bn_backward",
    "bn_constant",
    "bn_finalize",
    "bn_relu6_pool",
    "bn_sums",
    "depthwise",
    "depthwise_backward",
    "depthwise_folded",
    "depthwise_project_folded",
    "expand",
    "expand_backward",
    "expand_depthwise_folded",
    "head_folded",
    "inverted_residual_folded",
    "merge_moments",
    "pointwise_folded",
    "pool_backward",
    "project",
    "project_backward",
    "stem",
    "stem_backward",
    "stem_folded",
]
