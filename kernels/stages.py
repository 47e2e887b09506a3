"""What an operator is told about one convolution and its BatchNorm: tensors and numbers, no modules."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class BatchNorm(NamedTuple):
    """One BatchNorm's tensors, [C] each, and its numbers; semantics are exactly torch.nn.BatchNorm2d's.

    Attributes:
        weight, bias: scale and shift (gamma, beta), or None.
        running_mean, running_var: updated in place when `update_running`; None: batch statistics always.
        num_batches_tracked: int64 scalar, counted up when `update_running`.
        momentum: weight of the new batch; None: cumulative average.
        eps: added to the variance.
        batch_statistics: normalise with this batch's mean and biased variance instead of the running ones.
        update_running: whether this call updates the running statistics.
        group: process group over which batch statistics are shared (SyncBatchNorm), or None.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    momentum: float | None
    eps: float
    batch_statistics: bool
    update_running: bool
    group: Any = None

    @classmethod
    def of(cls, module: nn.BatchNorm2d | nn.SyncBatchNorm) -> "BatchNorm":
        """Read a BatchNorm module in its present mode (train or eval).

        Batch statistics are shared by a SyncBatchNorm's group, or by all processes where a plain BatchNorm2d has
        the attribute `shares_statistics` (DistributedDataParallel refuses SyncBatchNorm on CPUs).
        """
        group = None
        if module.training and torch.distributed.is_available() and torch.distributed.is_initialized():
            if isinstance(module, nn.SyncBatchNorm):
                group = module.process_group or torch.distributed.group.WORLD
            elif getattr(module, "shares_statistics", False):
                group = torch.distributed.group.WORLD
        return cls(
            module.weight,
            module.bias,
            module.running_mean,
            module.running_var,
            module.num_batches_tracked,
            module.momentum,
            module.eps,
            module.training or module.running_mean is None,
            module.training and module.track_running_stats,
            group,
        )


class ConvBN(NamedTuple):
    """A bias-free convolution's weight ([out, in, k, k], or [C, 1, 3, 3] depthwise) and the BatchNorm after it."""

    weight: Tensor
    bn: BatchNorm
