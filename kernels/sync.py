"""BatchNorm with statistics shared by a process group, on any device and backend (gloo on CPUs included).

torch.nn.SyncBatchNorm refuses CPU tensors. The exchange: forward, every rank's (count, mean, M2) gathered and
merged in rank order with Chan's formula, so each rank computes the same bits; backward, one sum of two [C] vectors.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from mbv2.kernels.stages import BatchNorm


def sync_batch_norm(x: Tensor, bn: BatchNorm, momentum: float) -> Tensor:
    """Normalise [N, C, H, W] with the mean and biased variance over all ranks of `bn.group`.

    Raises:
        ValueError: one value per channel in all ranks together.
    """
    return _SyncBatchNorm.apply(
        x, bn.weight, bn.bias, bn.running_mean, bn.running_var, momentum, bn.eps, bn.update_running, bn.group
    )


def _per_channel(vector: Tensor) -> Tensor:
    return vector.view(1, -1, 1, 1)


def _merge(moments: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(count, mean, biased variance) of all ranks from each rank's [1 + 2C] of count, mean and M2."""
    channels = (moments[0].numel() - 1) // 2
    count, mean, m2 = moments[0][0], moments[0][1 : 1 + channels], moments[0][1 + channels :]
    for other in moments[1:]:
        n, m, s = other[0], other[1 : 1 + channels], other[1 + channels :]
        total = count + n
        share = torch.where(total > 0, n / total.clamp(min=1), torch.zeros_like(total))
        delta = m - mean
        mean = mean + delta * share
        m2 = m2 + s + delta * delta * count * share
        count = total
    return count, mean, m2 / count


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, update_running, group):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        values = x.to(wide)
        n = x.numel() // x.shape[1]
        mean = values.mean((0, 2, 3)) if n else values.new_zeros(x.shape[1])
        m2 = (values - _per_channel(mean)).square().sum((0, 2, 3))
        mine = torch.cat([mean.new_tensor([float(n)]), mean, m2])
        everyone = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, mine, group=group)
        count, mean, var = _merge(everyone)
        if not x.is_cuda and count <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        rstd = torch.rsqrt(var + eps)
        if update_running and running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, rstd, count)
        ctx.group = group
        ctx.has_bias = bias is not None
        out = (values - _per_channel(mean)) * _per_channel(rstd)
        if weight is not None:
            out = out * _per_channel(weight.to(wide))
        if bias is not None:
            out = out + _per_channel(bias.to(wide))
        return out.to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, mean, rstd, count = ctx.saved_tensors
        grad_wide = grad.to(mean.dtype)
        normalised = (x.to(mean.dtype) - _per_channel(mean)) * _per_channel(rstd)
        sum_grad = grad_wide.sum((0, 2, 3))
        sum_grad_normalised = (grad_wide * normalised).sum((0, 2, 3))
        # The parameters' gradients stay this rank's own sums: DDP averages them like every other gradient.
        grad_weight = None if weight is None else sum_grad_normalised.to(weight.dtype)
        grad_bias = sum_grad.to(weight.dtype if weight is not None else x.dtype) if ctx.has_bias else None
        shared = torch.cat([sum_grad, sum_grad_normalised])
        dist.all_reduce(shared, group=ctx.group)
        mean_grad, mean_grad_normalised = (shared / count).chunk(2)
        scale = rstd if weight is None else rstd * weight.to(rstd.dtype)
        centred = grad_wide - _per_channel(mean_grad) - normalised * _per_channel(mean_grad_normalised)
        grad_x = (centred * _per_channel(scale)).to(x.dtype)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None, None
