"""The training block, stem and head as sequences of stages, forward and backward; the same for every backend.

Plan A of the kernels: saved for backward are the input and the raw convolution outputs y1, y2, y3 in the
activations' type, plus [6, C] statistics; whatever is a function of these is recomputed where it is used.
Where statistics are shared by a process group, the group is asked between the stages: three times forward, three
times backward (twice each for a block without expansion).
"""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mbv2.kernels.dispatch import Stages
from mbv2.kernels.layout import RSTD, SCALE, channels_last


class Norm(NamedTuple):
    """A BatchNorm's part in a stage: gamma, beta [C] or None; running mean and var if those normalise, else None."""

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


def block_forward(
    stages: Stages,
    x: Tensor,
    w1: Tensor | None,
    norm1: Norm,
    wd: Tensor,
    norm2: Norm,
    w3: Tensor,
    norm3: Norm,
    stride: int,
    residual: bool,
    group: str,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor | None, Tensor, Tensor]:
    """(out, y1, y2, y3, bn1, bn2, bn3); without expansion (w1 None) y1 and bn1 are None."""
    x = channels_last(x)
    y1 = bn1 = None
    if w1 is not None:
        y1, moments = stages.expand(x, w1)
        bn1 = _statistics(stages, moments, norm1, x.dtype, group)
    y2, moments = stages.depthwise(x if y1 is None else y1, bn1, wd, stride)
    bn2 = _statistics(stages, moments, norm2, x.dtype, group)
    y3, moments = stages.project(y2, bn2, w3)
    bn3 = _statistics(stages, moments, norm3, x.dtype, group)
    return stages.bn_apply(y3, bn3, x if residual else None, False), y1, y2, y3, bn1, bn2, bn3


def block_backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    y1: Tensor | None,
    y2: Tensor,
    y3: Tensor,
    bn1: Tensor | None,
    bn2: Tensor,
    bn3: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w3: Tensor,
    stride: int,
    residual: bool,
    constant3: bool,
    group: str,
    need: list[bool],
) -> list[Tensor | None]:
    """Gradients dx, dw1, totals1, dwd, totals2, dw3, totals3; None where `need`, in this order, says so.

    totals are (dbeta, dgamma) [2, C]. constant3: bn3 is made of running statistics, so that its sums are wanted for
    gamma3 and beta3 only.
    """
    x, grad = channels_last(x), channels_last(grad)
    need_x, need_w1, need_bn1, need_wd, need_bn2, need_w3, need_bn3 = need
    into_bn1 = need_x or need_w1 or need_bn1
    into_bn2 = into_bn1 or need_wd or need_bn2
    dx = dw1 = totals1 = dwd = totals2 = None
    if constant3 and not need_bn3:
        totals3, coef3 = None, torch.stack((bn3[SCALE], torch.zeros_like(bn3[SCALE]), torch.zeros_like(bn3[SCALE])))
    else:
        totals3, coef3 = _bn_backward(stages, stages.bn_sums(grad, y3, bn3, False), bn3, group)
    dz2, sums2, dw3 = stages.project_backward(grad, y3, coef3, w3, y2, bn2, into_bn2, need_w3)
    if into_bn2:
        totals2, coef2 = _bn_backward(stages, sums2, bn2, group)
    if need_wd or into_bn1:
        a1 = x if y1 is None else y1
        dz1, sums1, dwd = stages.depthwise_backward(dz2, y2, coef2, a1, bn1, wd, stride, into_bn1, need_wd)
    skip = grad if residual else None
    if into_bn1 and y1 is None:
        dx = dz1 if skip is None else dz1 + skip
    elif into_bn1:
        totals1, coef1 = _bn_backward(stages, sums1, bn1, group)
        dx, dw1 = stages.expand_backward(dz1, y1, coef1, w1, x, skip, need_x, need_w1)
    gradients = [dx, dw1, totals1, dwd, totals2, dw3, totals3]
    return [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]


def stem_forward(
    stages: Stages, x: Tensor, weight: Tensor, norm: Norm, stride: int, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(out, y, bn) of convolution 3x3, BatchNorm, ReLU6."""
    x = channels_last(x)
    y, moments = stages.stem(x, weight, stride)
    bn = _statistics(stages, moments, norm, x.dtype, group)
    return stages.bn_apply(y, bn, None, True), y, bn


def stem_backward(
    stages: Stages,
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bn: Tensor,
    weight: Tensor,
    stride: int,
    group: str,
    need: list[bool],
) -> list[Tensor | None]:
    """Gradients dx, dweight, totals (dbeta, dgamma) [2, out]; None where `need`, in this order, says so."""
    x, grad = channels_last(x), channels_last(grad)
    totals, coef = _bn_backward(stages, stages.bn_sums(grad, y, bn, True), bn, group)
    dx = dweight = None
    if need[0] or need[1]:
        dx, dweight = stages.stem_backward(grad, y, bn, coef, x, weight, stride, need[0], need[1])
    gradients = [dx, dweight, totals]
    return [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]


def head_forward(stages: Stages, x: Tensor, weight: Tensor, norm: Norm, group: str) -> tuple[Tensor, Tensor, Tensor]:
    """(pooled [N, out], y, bn) of convolution 1x1, BatchNorm, ReLU6, global average pooling."""
    x = channels_last(x)
    y, moments = stages.expand(x, weight)
    bn = _statistics(stages, moments, norm, x.dtype, group)
    return stages.bn_relu6_pool(y, bn), y, bn


def head_backward(
    stages: Stages, grad: Tensor, x: Tensor, y: Tensor, bn: Tensor, weight: Tensor, group: str, need: list[bool]
) -> list[Tensor | None]:
    """Gradients dx, dweight, totals (dbeta, dgamma) [2, out]; None where `need`, in this order, says so."""
    dz, sums = stages.pool_backward(grad.contiguous(), y, bn)
    totals, coef = _bn_backward(stages, sums, bn, group)
    dx = dweight = None
    if need[0] or need[1]:
        dx, dweight = stages.expand_backward(dz, y, coef, weight, channels_last(x), None, need[0], need[1])
    gradients = [dx, dweight, totals]
    return [g if wanted else None for g, wanted in zip(gradients, need, strict=True)]


def _statistics(stages: Stages, moments: Tensor, norm: Norm, dtype: torch.dtype, group: str) -> Tensor:
    """bn [6, C]: of this batch, of the batch of the whole group, or of the running statistics."""
    if norm.mean is not None and norm.var is not None:
        return stages.bn_constant(norm.mean, norm.var, norm.gamma, norm.beta, norm.eps, dtype)
    if group:
        moments = _gathered(stages.merge_moments(moments), group)
    return stages.bn_finalize(moments, norm.gamma, norm.beta, norm.eps)


def _gathered(moments: Tensor, group: str) -> Tensor:
    """Every rank's [3, C] stacked in rank order, so that all ranks merge the same numbers in the same order."""
    process_group = _resolve(group)
    everyone = [torch.empty_like(moments) for _ in range(dist.get_world_size(process_group))]
    dist.all_gather(everyone, moments.contiguous(), group=process_group)
    parts = torch.stack(everyone)
    if not parts.is_cuda and parts[:, 0, 0].sum() <= 1:
        raise ValueError("Expected more than 1 value per channel when training, over all processes of the group")
    return parts


def _bn_backward(stages: Stages, sums: Tensor, bn: Tensor, group: str) -> tuple[Tensor, Tensor]:
    """This rank's totals (dbeta, dgamma), which DDP averages, and coef of the whole group's totals."""
    totals, coef = stages.bn_backward(sums, bn)
    if group:
        everyone = totals.clone()
        dist.all_reduce(everyone, group=_resolve(group))
        _, coef = stages.bn_backward(torch.stack((everyone[0], everyone[1] / bn[RSTD]))[None], bn)
    return totals, coef


def _resolve(group: str) -> dist.ProcessGroup:
    return dist.distributed_c10d._resolve_process_group(group)
