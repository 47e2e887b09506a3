"""Every stage of the training block in plain torch, forward and backward: what the other backends are held against.

The function names, arguments and results here are the contract of a backend's stages (`kernels/triton` has the
same ones). Activations are [N, C, H, W] in dense channels_last; `layout` describes moments, bn, sums and coef.
Raw convolution outputs y are rounded to the activation type and statistics are taken from the rounded values, as
BatchNorm sees them; normalise + ReLU6 is recomputed from y wherever it is needed, and never stored.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2.kernels.layout import COUNT, MEAN, RSTD, SCALE, SHIFT, result_in_channels_last, wide

# --- forward -------------------------------------------------------------------------------------------------


def stem(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Dense 3x3 convolution, padding 1. Returns raw y [N, out, Ho, Wo] and its moments [G, 3, out]."""
    return _with_moments(F.conv2d(x, weight, None, stride, 1))


def expand(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """1x1 convolution (also the head's). Returns raw y1 [N, hidden, H, W] and its moments [G, 3, hidden]."""
    return _with_moments(F.conv2d(x, weight))


def depthwise(y1: Tensor, bn1: Tensor | None, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """relu6(bn1(y1)), then depthwise 3x3, padding 1 (zeros after the activation).

    bn1 None: y1 is the block's input and is taken as it is (a block without expansion).
    Returns raw y2 [N, hidden, Ho, Wo] and its moments.
    """
    return _with_moments(F.conv2d(_activation(y1, bn1), weight, None, stride, 1, groups=y1.shape[1]))


def project(y2: Tensor, bn2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """relu6(bn2(y2)), then 1x1 convolution. Returns raw y3 [N, out, Ho, Wo] and its moments."""
    return _with_moments(F.conv2d(_activation(y2, bn2), weight))


def merge_moments(moments: Tensor) -> Tensor:
    """[G, 3, C] -> [3, C]: parts merged in order of g by Chan's formula; parts of count 0 change nothing."""
    count, mean, m2 = moments[0]
    for n, m, s in moments[1:]:
        total = count + n
        share = torch.where(total > 0, n / total.clamp(min=1), torch.zeros_like(total))
        delta = m - mean
        mean, m2, count = mean + delta * share, m2 + s + delta * delta * count * share, total
    return torch.stack((count, mean, m2))


def bn_finalize(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """bn [6, C] from moments [G, 3, C]: biased variance, scale = gamma * rstd, shift = beta - mean * scale."""
    count, mean, m2 = merge_moments(moments)
    return _bn(mean, m2 / count, count, gamma, beta, eps)


def bn_constant(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """bn [6, C] of the running statistics, with COUNT 0; `dtype` is the activations'."""
    mean, var = mean.to(wide(dtype)), var.to(wide(dtype))
    return _bn(mean, var, torch.zeros_like(mean), gamma, beta, eps)


def bn_apply(y: Tensor, bn: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """scale * y + shift, then ReLU6 if asked, then plus residual; rounded once, to y's type."""
    z = _normalised(y, bn)
    z = F.relu6(z) if relu6 else z
    return result_in_channels_last((z if residual is None else z + residual).to(y.dtype))


def bn_relu6_pool(y: Tensor, bn: Tensor) -> Tensor:
    """Mean over H and W of relu6(bn(y)), [N, C] in y's type."""
    return F.relu6(_normalised(y, bn)).mean((2, 3)).to(y.dtype)


# --- backward ------------------------------------------------------------------------------------------------


def bn_sums(grad: Tensor, y: Tensor, bn: Tensor, relu6: bool) -> Tensor:
    """sums [G, 2, C] of dz = grad (masked by ReLU6 if asked) and of dz * (y - mean)."""
    return _sums(_masked(grad, y, bn) if relu6 else grad.to(bn.dtype), y, bn)


def bn_backward(sums: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """Parts [G, 2, C] added in order -> (totals [2, C] = (dbeta, dgamma), coef [3, C]).

    Where statistics are shared by a process group, call it once for this rank's totals and once with the group's:
    `sums` of one part whose second row is dgamma / rstd.
    """
    total = sums[0].clone()
    for part in sums[1:]:
        total += part
    dbeta, centred = total
    rstd, scale, count = bn[RSTD], bn[SCALE], bn[COUNT]
    dgamma = centred * rstd
    per_value = torch.where(count > 0, 1 / count.clamp(min=1), torch.zeros_like(count))
    b = -scale * rstd * dgamma * per_value
    c = -scale * dbeta * per_value - b * bn[MEAN]
    return torch.stack((dbeta, dgamma)), torch.stack((scale, b, c))


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
    """From the gradient at bn3's output: (dz2 at bn2's output, its sums [G, 2, hidden], dweight like weight)."""
    dy3 = _affine(grad, y3, coef3)
    da2, dweight = _conv_backward(dy3, _activation(y2, bn2), weight, 1, 0, 1, need_input, need_weight)
    if da2 is None:
        return None, None, dweight
    dz2 = _masked(da2, y2, bn2)
    return result_in_channels_last(dz2.to(y2.dtype)), _sums(dz2.to(y2.dtype), y2, bn2), dweight


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
    """From dz2: (dz1 at bn1's output, its sums, dweight). bn1 None: (dx, None, dweight), nothing masked."""
    dy2 = _affine(dz2, y2, coef2)
    a1 = _activation(y1, bn1)
    da1, dweight = _conv_backward(dy2, a1, weight, stride, 1, y1.shape[1], need_input, need_weight)
    if da1 is None:
        return None, None, dweight
    if bn1 is None:
        return result_in_channels_last(da1), None, dweight
    dz1 = _masked(da1, y1, bn1).to(y1.dtype)
    return result_in_channels_last(dz1), _sums(dz1, y1, bn1), dweight


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
    """From dz1: (dx, dweight); residual_grad, the gradient that reaches x past the block, is added to dx."""
    dx, dweight = _conv_backward(_affine(dz1, y1, coef1), x, weight, 1, 0, 1, need_input, need_weight)
    if dx is not None and residual_grad is not None:
        dx = dx + residual_grad
    return (None if dx is None else result_in_channels_last(dx)), dweight


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
    """From the gradient at relu6(bn(y)): (dx, dweight) of the dense 3x3 convolution."""
    dy = _affine(_masked(grad, y, bn), y, coef)
    dx, dweight = _conv_backward(dy, x, weight, stride, 1, 1, need_input, need_weight)
    return (None if dx is None else result_in_channels_last(dx)), dweight


def pool_backward(grad: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient [N, C] at the pooled output: (dz at bn's output [N, C, H, W], its sums)."""
    spread = (grad.to(bn.dtype) / (y.shape[2] * y.shape[3]))[:, :, None, None].expand(y.shape)
    dz = result_in_channels_last(_masked(spread, y, bn).to(y.dtype))
    return dz, _sums(dz, y, bn)


# --- inference, BatchNorm folded into weight and bias ------------------------------------------------------------


def stem_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """relu6(conv3x3(x) + bias); bias is in the wide type, as in all functions below."""
    return result_in_channels_last(F.relu6(_conv_bias(x, weight, bias, stride, 1, 1)).to(x.dtype))


def pointwise_folded(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool, residual: Tensor | None) -> Tensor:
    """conv1x1(x) + bias, then ReLU6 if asked, then plus residual."""
    y = _conv_bias(x, weight, bias, 1, 0, 1)
    y = F.relu6(y) if relu6 else y
    return result_in_channels_last((y if residual is None else y + residual).to(x.dtype))


def depthwise_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """relu6(depthwise3x3(x) + bias)."""
    return result_in_channels_last(F.relu6(_conv_bias(x, weight, bias, stride, 1, x.shape[1])).to(x.dtype))


def expand_depthwise_folded(x: Tensor, w1: Tensor, b1: Tensor, wd: Tensor, bd: Tensor, stride: int) -> Tensor:
    """The first two stages of a block; the expanded tensor is not stored by the kernels that fuse them."""
    return depthwise_folded(pointwise_folded(x, w1, b1, True, None), wd, bd, stride)


def depthwise_project_folded(
    x: Tensor, wd: Tensor, bd: Tensor, w3: Tensor, b3: Tensor, stride: int, residual: Tensor | None
) -> Tensor:
    """The last two stages of a block; x is the expanded, activated tensor."""
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
    """A whole block; w1 and b1 None for one without expansion."""
    hidden = x if w1 is None else pointwise_folded(x, w1, b1, True, None)
    return depthwise_project_folded(hidden, wd, bd, w3, b3, stride, x if residual else None)


def head_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over H and W of relu6(conv1x1(x) + bias), [N, out]."""
    return F.relu6(_conv_bias(x, weight, bias, 1, 0, 1)).mean((2, 3)).to(x.dtype)


# --- shared pieces -----------------------------------------------------------------------------------------------


def _vector(row: Tensor) -> Tensor:
    return row.view(1, -1, 1, 1)


def _normalised(y: Tensor, bn: Tensor) -> Tensor:
    return y.to(bn.dtype) * _vector(bn[SCALE]) + _vector(bn[SHIFT])


def _activation(y: Tensor, bn: Tensor | None) -> Tensor:
    return y if bn is None else F.relu6(_normalised(y, bn)).to(y.dtype)


def _with_moments(y: Tensor) -> tuple[Tensor, Tensor]:
    y = result_in_channels_last(y)
    values = y.to(wide(y.dtype))
    # An empty part has a mean as well, or merging it would spread its NaN.
    mean = values.mean((0, 2, 3)) if values.numel() else values.new_zeros(y.shape[1])
    m2 = (values - _vector(mean)).square().sum((0, 2, 3))
    count = torch.full_like(mean, y.shape[0] * y.shape[2] * y.shape[3])
    return y, torch.stack((count, mean, m2))[None]


def _bn(mean: Tensor, var: Tensor, count: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    rstd = torch.rsqrt(var + eps)
    scale = rstd if gamma is None else rstd * gamma.to(rstd.dtype)
    shift = -mean * scale if beta is None else beta.to(rstd.dtype) - mean * scale
    return torch.stack((mean, var, rstd, scale, shift, count))


def _masked(grad: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    # As torch's hardtanh_backward on a GPU: a NaN lets the gradient through.
    z = _normalised(y, bn)
    return grad.to(bn.dtype).masked_fill((z <= 0) | (z >= 6), 0)


def _sums(dz: Tensor, y: Tensor, bn: Tensor) -> Tensor:
    dz = dz.to(bn.dtype)
    centred = y.to(bn.dtype) - _vector(bn[MEAN])
    return torch.stack((dz.sum((0, 2, 3)), (dz * centred).sum((0, 2, 3))))[None]


def _affine(dz: Tensor, y: Tensor, coef: Tensor) -> Tensor:
    a, b, c = coef
    return (_vector(a) * dz.to(coef.dtype) + _vector(b) * y.to(coef.dtype) + _vector(c)).to(y.dtype)


def _conv_bias(x: Tensor, weight: Tensor, bias: Tensor, stride: int, padding: int, groups: int) -> Tensor:
    # The sum is rounded once more than in the kernels, as an eager convolution's result is.
    return F.conv2d(x, weight, None, stride, padding, groups=groups).to(bias.dtype) + _vector(bias)


def _conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, groups: int, need_input: bool, need_weight: bool
) -> tuple[Tensor | None, Tensor | None]:
    dx, dweight, _ = torch.ops.aten.convolution_backward(
        grad,
        x,
        weight,
        None,
        [stride, stride],
        [padding, padding],
        [1, 1],
        False,
        [0, 0],
        groups,
        [need_input, need_weight, False],
    )
    if dweight is not None:
        dweight = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device=weight.device).copy_(
            dweight
        )
    return dx, dweight
