"""Arithmetic that every kernel shares: ReLU6 as torch has it, rounded division, Chan's merge, types of accumulators."""

import torch
import triton
import triton.language as tl

from mbv2.kernels.triton import tuning


@triton.jit
def relu6(z, cap):
    """min(max(z, 0), cap), NaN where z is NaN, as torch's with cap 6; cap 0 zeroes a position outside the image."""
    z = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(z, cap, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divide(a, b):
    """a / b to the nearest; a plain division is approximate in float32."""
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def chan_merge(count, mean, m2, new_count, new_mean, new_m2):
    """(count, mean, M2) of two groups of values together; a group of none changes nothing."""
    total = count + new_count
    share = tl.where(new_count > 0, divide(new_count, tl.maximum(total, 1.0)), 0.0)
    delta = new_mean - mean
    return total, mean + delta * share, m2 + new_m2 + delta * delta * count * share


def arithmetic(dtype: torch.dtype) -> dict[str, object]:
    """The constants PRECISION and ACC of a kernel for activations of `dtype`."""
    accumulator = tl.float64 if dtype == torch.float64 else tl.float32
    return {"PRECISION": tuning.dot_precision(dtype), "ACC": accumulator}
