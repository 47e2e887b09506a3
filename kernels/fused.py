"""The public operators by way of torch.library: what every backend but plain torch runs through.

Outside the operators stay autocast's casts, the update of running statistics, BatchNorm's folding for inference,
and the checks whose errors torch.nn.BatchNorm2d would raise.
"""

import torch
from torch import Tensor

from mbv2.kernels import library, library_folded
from mbv2.kernels.layout import COUNT, MEAN, VAR, channels_last, wide
from mbv2.kernels.stages import BatchNorm, ConvBN


def stem(x: Tensor, conv: ConvBN, stride: int = 2) -> Tensor:
    """See `mbv2.kernels.stem`."""
    x, weight = _cast(x, conv.weight)
    if not _differentiable(x, conv):
        return library_folded.stem_folded(x, *_folded(weight, conv.bn, x.dtype), stride)
    n, _, h, w = x.shape
    values = n * _strided(h, stride) * _strided(w, stride)
    _check_values(conv, values)
    out, _, bn = library.stem_train(x, weight, *_norm(conv.bn), stride, _group(conv))
    _update(conv.bn, bn, values)
    return out


def inverted_residual(
    x: Tensor, expand: ConvBN | None, depthwise: ConvBN, project: ConvBN, stride: int, residual: bool
) -> Tensor:
    """See `mbv2.kernels.inverted_residual`."""
    given = x
    x, w1, wd, w3 = _cast(x, None if expand is None else expand.weight, depthwise.weight, project.weight)
    # A float32 input and a float16 branch add up to float32 in eager autocast.
    inside = residual and given.dtype == x.dtype
    if not _differentiable(x, expand, depthwise, project):
        first = (None, None) if expand is None else _folded(w1, expand.bn, x.dtype)
        out = library_folded.inverted_residual(
            x, *first, *_folded(wd, depthwise.bn, x.dtype), *_folded(w3, project.bn, x.dtype), stride, inside
        )
        return given + out if residual and not inside else out
    n, _, h, w = x.shape
    before, after = n * h * w, n * _strided(h, stride) * _strided(w, stride)
    _check_values(expand, before)
    _check_values(depthwise, after)
    _check_values(project, after)
    out, _, _, _, bn1, bn2, bn3 = library.inverted_residual_train(
        x,
        w1,
        *((None, None, None, None, 0.0) if expand is None else _norm(expand.bn)),
        wd,
        *_norm(depthwise.bn),
        w3,
        *_norm(project.bn),
        stride,
        inside,
        _group(expand, depthwise, project),
    )
    if expand is not None:
        _update(expand.bn, bn1, before)
    _update(depthwise.bn, bn2, after)
    _update(project.bn, bn3, after)
    return given + out if residual and not inside else out


def head(x: Tensor, conv: ConvBN) -> Tensor:
    """See `mbv2.kernels.head`."""
    x, weight = _cast(x, conv.weight)
    if not _differentiable(x, conv):
        return library_folded.head_folded(x, *_folded(weight, conv.bn, x.dtype))
    values = x.shape[0] * x.shape[2] * x.shape[3]
    _check_values(conv, values)
    out, _, bn = library.head_train(x, weight, *_norm(conv.bn), _group(conv))
    _update(conv.bn, bn, values)
    return out


def _strided(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _cast(x: Tensor, *weights: Tensor | None) -> tuple[Tensor | None, ...]:
    """Input in channels_last and weights, in autocast's type where it is on, as for torch's convolutions."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        weights = tuple(None if w is None else w.to(dtype) for w in weights)
    for weight in weights:
        if weight is not None and weight.dtype != x.dtype:
            raise ValueError(f"input is {x.dtype} but a weight is {weight.dtype}; cast one, or use torch.autocast")
    return channels_last(x), *(None if w is None else _dense(w) for w in weights)


def _dense(weight: Tensor) -> Tensor:
    """Kernels read a weight's memory in order; in either of torch's layouts it has no holes."""
    if weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last):
        return weight
    return weight.contiguous()


def _differentiable(x: Tensor, *convs: ConvBN | None) -> bool:
    """Whether this call needs the training operator: for batch statistics, or for gradients."""
    present = [conv for conv in convs if conv is not None]
    if any(conv.bn.batch_statistics for conv in present):
        return True
    tensors = [x, *(t for conv in present for t in (conv.weight, conv.bn.weight, conv.bn.bias) if t is not None)]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _folded(weight: Tensor, bn: BatchNorm, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weight in `dtype` and bias in the wide type, with running statistics, gamma and beta multiplied in."""
    scale = torch.rsqrt(bn.running_var.to(wide(dtype)) + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight
    bias = -bn.running_mean * scale if bn.bias is None else bn.bias - bn.running_mean * scale
    return (weight * scale.view(-1, 1, 1, 1)).to(dtype), bias.to(wide(dtype))


def _norm(bn: BatchNorm) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, float]:
    mean, var = (None, None) if bn.batch_statistics else (bn.running_mean, bn.running_var)
    return bn.weight, bn.bias, mean, var, bn.eps


def _group(*convs: ConvBN | None) -> str:
    """Name of the process group that shares batch statistics, "" for none.

    Raises:
        ValueError: the stages of one operator have different groups.
    """
    norms = [conv.bn for conv in convs if conv is not None and conv.bn.batch_statistics]
    names = {bn.group.group_name if _shared(bn) else "" for bn in norms}
    if len(names) > 1:
        raise ValueError("the BatchNorms of one block share statistics over different process groups; use one group")
    return names.pop() if names else ""


def _shared(bn: BatchNorm) -> bool:
    return bn.group is not None and torch.distributed.get_world_size(bn.group) > 1


def _check_values(conv: ConvBN | None, values: int) -> None:
    if conv is not None and conv.bn.batch_statistics and values == 1 and not _shared(conv.bn):
        raise ValueError(f"Expected more than 1 value per channel when training, got one for {conv.weight.shape[0]}")


def _update(bn: BatchNorm, statistics: Tensor, values: int) -> None:
    """Move running statistics towards the batch's, with the unbiased variance, as torch.nn.BatchNorm2d does."""
    if not bn.update_running or bn.running_mean is None:
        return
    with torch.no_grad():
        momentum: float | Tensor = bn.momentum if bn.momentum is not None else 0.0
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                momentum = 1.0 / bn.num_batches_tracked.to(bn.running_mean.dtype)
        count = statistics[COUNT] if _shared(bn) else values
        mean, unbiased = statistics[MEAN], statistics[VAR] * (count / (count - 1))
        if mean.dtype != bn.running_mean.dtype:
            mean, unbiased = mean.to(bn.running_mean.dtype), unbiased.to(bn.running_mean.dtype)
        bn.running_mean.lerp_(mean, momentum)
        bn.running_var.lerp_(unbiased, momentum)
