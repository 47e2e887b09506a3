"""BatchNorm with running statistics folded into the convolution before it."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def scale_and_shift(bn: Any) -> tuple[Tensor, Tensor]:
    """What BatchNorm with running statistics multiplies by and adds, in float64: folding adds no error of its own.

    Args:
        bn: a `BatchNorm` (kernels/stages.py) with running statistics.
    """
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    return scale, shift if bn.bias is None else shift + bn.bias.double()


@torch.no_grad()
def folded(weight: Tensor, bn: Any) -> tuple[Tensor, Tensor]:
    """A stage's weight with its BatchNorm's scale in it, in the weight's type, and the shift as a bias in float32.

    Args:
        weight: of the convolution.
        bn: a `BatchNorm` (kernels/stages.py) with running statistics.
    """
    scale, shift = scale_and_shift(bn)
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(), shift.float()
