"""Plain-torch versions of every operator: the `aten` backend, and what the other backends are held against.

ReLU6 works in place, as in torchvision's model: BatchNorm's backward reads its input, ReLU6's its result, so what lies
between them need not be kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2.kernels.stages import BatchNorm, ConvBN
from mbv2.kernels.sync import sync_batch_norm


def stem(x: Tensor, conv: ConvBN, stride: int = 2) -> Tensor:
    """See `mbv2.kernels.stem`."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.relu6(conv_bn(x, conv, stride=stride, padding=1), inplace=True)


def inverted_residual(
    x: Tensor, expand: ConvBN | None, depthwise: ConvBN, project: ConvBN, stride: int, residual: bool
) -> Tensor:
    """See `mbv2.kernels.inverted_residual`."""
    x = x.contiguous(memory_format=torch.channels_last)
    hidden = x if expand is None else F.relu6(conv_bn(x, expand), inplace=True)
    hidden = F.relu6(conv_bn(hidden, depthwise, stride=stride, padding=1, groups=hidden.shape[1]), inplace=True)
    out = conv_bn(hidden, project)
    return x + out if residual else out


def head(x: Tensor, conv: ConvBN) -> Tensor:
    """See `mbv2.kernels.head`."""
    x = x.contiguous(memory_format=torch.channels_last)
    return F.relu6(conv_bn(x, conv), inplace=True).mean((2, 3))


def conv_bn(x: Tensor, conv: ConvBN, stride: int = 1, padding: int = 0, groups: int = 1) -> Tensor:
    """Convolution without bias, then BatchNorm; the weight's gradient has the weight's strides."""
    weight = _GradLikeParameter.apply(conv.weight) if conv.weight.requires_grad else conv.weight
    return batch_norm(F.conv2d(x, weight, None, stride, padding, groups=groups), conv.bn)


def batch_norm(x: Tensor, bn: BatchNorm) -> Tensor:
    """BatchNorm over [N, C, H, W]; running statistics are updated as torch.nn.BatchNorm2d does."""
    momentum = 0.0
    if bn.update_running:
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
        momentum = bn.momentum if bn.momentum is not None else 1.0 / float(bn.num_batches_tracked)
    if bn.batch_statistics and bn.group is not None and torch.distributed.get_world_size(bn.group) > 1:
        return sync_batch_norm(x, bn, momentum)
    use_running = bn.update_running or not bn.batch_statistics
    return F.batch_norm(
        x,
        bn.running_mean if use_running else None,
        bn.running_var if use_running else None,
        bn.weight,
        bn.bias,
        bn.batch_statistics,
        momentum,
        bn.eps,
    )


class _GradLikeParameter(torch.autograd.Function):
    """Identity whose gradient takes the parameter's strides.

    A convolution's weight gradient comes in whatever layout the backend chose; DDP's buckets are laid out like
    the parameters and copy (and warn) on every mismatch.
    """

    @staticmethod
    def forward(ctx, weight: Tensor) -> Tensor:
        ctx.stride = weight.stride()
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        if grad.stride() == ctx.stride:
            return grad
        laid_out = grad.new_empty_strided(grad.shape, ctx.stride)
        return laid_out.copy_(grad)
