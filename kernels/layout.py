"""Memory layout and number formats that every backend agrees on: dense channels_last tensors, wide statistics.

Statistics of a stage travel as small tensors in the wide type (float32; float64 for float64 inputs):

* moments [G, 3, C]: per part g and channel the count, the mean and M2 (sum of centred squares);
* bn [6, C]: what a BatchNorm applies, rows MEAN ... COUNT below; COUNT 0 marks statistics that are constants
  (running ones), through which no gradient flows;
* sums [G, 2, C]: of dz and of dz * (y - mean), where dz is the gradient at the BatchNorm's output;
* coef [3, C]: A, B, C of BatchNorm's backward as an affine map, dy = A * dz + B * y + C.
"""

import torch
from torch import Tensor

MEAN, VAR, RSTD, SCALE, SHIFT, COUNT = range(6)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type of accumulators and statistics for activations of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def channels_last(x: Tensor) -> Tensor:
    """[N, C, H, W] with exactly the strides of dense NHWC memory; a copy only where the memory is anything else.

    `Tensor.contiguous(memory_format=channels_last)` leaves other strides where N, C, H or W is 1.
    """
    n, c, h, w = x.shape
    strides = (c * h * w, 1, w * c, c)
    if x.stride() == strides:
        return x
    return x.permute(0, 2, 3, 1).contiguous().as_strided((n, c, h, w), strides)


def new_channels_last(like: Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised [N, C, H, W] tensor with dense NHWC memory on `like`'s device."""
    n, c, h, w = shape
    # Not a permuted view: what an operator returns must allow operations in place.
    return like.new_empty_strided((n, c, h, w), (c * h * w, 1, w * c, c), dtype=dtype or like.dtype)


def result_in_channels_last(x: Tensor) -> Tensor:
    """As `channels_last`, and never a view, for the same reason."""
    n, c, h, w = x.shape
    if x.stride() == (c * h * w, 1, w * c, c) and not x._is_view():
        return x
    return new_channels_last(x, (n, c, h, w)).copy_(x)
