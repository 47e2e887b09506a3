"""BatchNorm with running statistics folded into the convolution before it."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def folded(weight: Tensor, bn: Any) -> tuple[Tensor, Tensor]:
    """A stage's weight with its BatchNorm's scale in it, in the weight's type, and the shift as a bias in float32.

    Args:
        weight: of the convolution.
        bn: a `BatchNorm` (kernels/stages.py) with running statistics.
    """
    # In float64 so that folding adds no error of its own.
    scale = torch.rsqrt(bn.running_var.double() + bn.eps)
    scale = scale if bn.weight is None else scale * bn.weight.double()
    shift = -bn.running_mean.double() * scale
    shift = shift if bn.bias is None else shift + bn.bias.double()
    return (weight.double() * scale.view(-1, 1, 1, 1)).to(weight.dtype).contiguous(), shift.float()
