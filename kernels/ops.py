"""The public operators: one call per stem, inverted-residual block and head."""

from types import ModuleType

import torch
from torch import Tensor

from mbv2.kernels import reference
from mbv2.kernels.cpu import support as cpu_support
from mbv2.kernels.cuda import support as cuda_support
from mbv2.kernels.dispatch import Backend, asked, choose, count, register
from mbv2.kernels.stages import ConvBN
from mbv2.kernels.triton import support


def stem(x: Tensor, conv: ConvBN, stride: int = 2) -> Tensor:
    """Dense 3x3 convolution, padding 1, with BatchNorm and ReLU6.

    Args:
        x: [N, in, H, W], floating point.
        conv: weight [out, in, 3, 3].
        stride: 1 or 2.

    Returns:
        [N, out, ceil(H / stride), ceil(W / stride)], channels_last.
    """
    return _way("stem", x).stem(x, conv, stride)


def inverted_residual(
    x: Tensor, expand: ConvBN | None, depthwise: ConvBN, project: ConvBN, stride: int, residual: bool
) -> Tensor:
    """One inverted-residual block (Sandler et al. 2018, arXiv 1801.04381).

    expand 1x1, BN, ReLU6; depthwise 3x3 (padding 1), BN, ReLU6; project 1x1, BN; plus the input.

    Args:
        x: [N, C, H, W], floating point.
        expand: weight [hidden, C, 1, 1]; None for a block without expansion (hidden = C).
        depthwise: weight [hidden, 1, 3, 3].
        project: weight [out, hidden, 1, 1].
        stride: of the depthwise convolution, 1 or 2.
        residual: add x to the result (stride 1 and out = C only).

    Returns:
        [N, out, ceil(H / stride), ceil(W / stride)], channels_last.

    Raises:
        ValueError: the stages' channels do not fit together, or a residual where shapes differ.
    """
    hidden = x.shape[1] if expand is None else expand.weight.shape[0]
    if depthwise.weight.shape[0] != hidden or project.weight.shape[1] != hidden:
        raise ValueError(
            f"inverted_residual: expand gives {hidden} channels, depthwise has {depthwise.weight.shape[0]}, "
            f"project takes {project.weight.shape[1]}; they must be equal"
        )
    if residual and (stride != 1 or project.weight.shape[0] != x.shape[1]):
        raise ValueError(
            f"inverted_residual: a residual needs stride 1 and equal channels, not stride {stride} "
            f"and {x.shape[1]} -> {project.weight.shape[0]}"
        )
    return _way("inverted_residual", x).inverted_residual(x, expand, depthwise, project, stride, residual)


def head(x: Tensor, conv: ConvBN) -> Tensor:
    """1x1 convolution, BatchNorm, ReLU6 and global average pooling.

    Args:
        x: [N, C, H, W], floating point.
        conv: weight [out, C, 1, 1].

    Returns:
        [N, out].
    """
    return _way("head", x).head(x, conv)


def is_fused(operator: str, x: Tensor) -> bool:
    """Whether an operator called on `x` now has more to offer than the modules it stands for.

    That is, whether kernels would run it, or plain torch was asked for by name; not where "auto" ends in plain torch.

    Raises:
        BackendError: a backend was asked for by name and cannot serve this call.
    """
    return _choice(operator, x) != "aten" or asked() == "aten"


def _choice(operator: str, x: Tensor) -> str:
    # Kernels get autocast's type, whatever the input's is.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return choose(operator, x, torch.get_autocast_dtype(x.device.type))
    return choose(operator, x)


def _way(operator: str, x: Tensor) -> ModuleType:
    """Plain torch, which autograd and compilers see through, or the operators of torch.library."""
    if _choice(operator, x) != "aten":
        # Registering the operators takes as long as importing everything else here.
        from mbv2.kernels import fused

        return fused
    count(operator, "aten")
    return reference


register("cuda", Backend(cuda_support.refusal, cuda_support.stages))
register("triton", Backend(support.refusal, support.stages))
register("cpu", Backend(cpu_support.refusal, cpu_support.stages))
