"""From a trained network to the whole numbers that the int8 kernels compute with (csrc/cpu/microkernels_int8.h).

Weights of 1x1 convolutions and of the classifier have 8 bits, one scale per output; what they read has 8 bits, one
scale and zero point per channel, which cost nothing: the weights that read a channel take its scale (cross-layer
equalisation, arXiv 1906.04721), and shortcuts have a factor per channel. Between expansion and depthwise convolution,
and inside the latter, values are 16-bit fixed point. Ranges hold all that was seen on pictures: few values lie far
out, but cutting them off costs more than it gains the others. Weights are rounded one input after the other, the error
of each handed on to the inputs that correlate with it (GPTQ, arXiv 2210.17323), and the bias takes what is left of the
mean.

So that AVX2 can add the products of four inputs in 16 bits, the positive weights of inputs 8k, 8k + 1, 8k + 4 and
8k + 5 of one output sum to at most 128, the negative ones too, and likewise those of 8k + 2, 8k + 3, 8k + 6, 8k + 7.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2.kernels.cpu_network import BlockShape

# Hidden channels are 16-bit numbers of which this one stands for 6.
HIDDEN = 32767
# The most that the weights of one sign of four inputs sum to: 255 times it fits 16 bits.
GROUP_SUM = 128
MOST_PICTURES = 200
_SAMPLES = 64  # pixels of a picture that statistics are taken of
# Ranges are those seen times this, for pictures unlike those measured on.
_MARGIN = 1.1
# No channel's range is below this share of the tensor's widest: other pictures may use it more, and the weights that
# read it keep their precision beside others.
_FLATTEST = 0.5
_BLOCK = 64  # inputs whose errors are handed on together; a multiple of 8
_BIAS_LIMIT = 2**23  # so that it is a whole number in float32


@dataclass
class Statistics:
    """What one tensor of activations looked like: each channel's extremes, or zero where that is beyond them, and
    samples [n, channels] of pixels."""

    low: Tensor = field(default_factory=lambda: torch.zeros(1))
    high: Tensor = field(default_factory=lambda: torch.zeros(1))
    samples: list[Tensor] = field(default_factory=list)

    def add(self, x: Tensor) -> None:
        """Count in activations [N, channels, H, W] or [N, channels]."""
        pixels = x.flatten(2) if x.dim() > 2 else x[:, :, None]
        self.low = torch.minimum(self.low, pixels.amin((0, 2)))
        self.high = torch.maximum(self.high, pixels.amax((0, 2)))
        step = max(1, pixels.shape[2] // _SAMPLES)
        self.samples.append(pixels[:, :, ::step].transpose(1, 2).reshape(-1, pixels.shape[1]).clone())


@dataclass
class Scale:
    """The step of each channel's 8-bit numbers and the number that stands for zero, [channels] in float64."""

    step: Tensor
    zero: Tensor


def pictures_of(calibration: Tensor | Iterable[Tensor]) -> Iterator[Tensor]:
    """Batches of at most 200 pictures in all.

    Raises:
        TypeError, ValueError: what was given holds no pictures.
    """
    if isinstance(calibration, Tensor):
        calibration = calibration.split(25) if calibration.dim() else (calibration,)
    seen = 0
    for batch in calibration:
        if not isinstance(batch, Tensor):
            raise TypeError(f"calibration takes batches of normalised pictures as tensors, not {type(batch).__name__}")
        if batch.dim() != 4 or batch.shape[1] != 3:
            raise ValueError(f"calibration takes pictures [N, 3, H, W], not {list(batch.shape)}")
        batch = batch[: MOST_PICTURES - seen]
        if len(batch):
            yield batch.float()
        seen += len(batch)
        if seen >= MOST_PICTURES:
            break
    if seen == 0:
        raise ValueError("calibration has no pictures: give some hundred normalised ones of the kind to be recognised")


@torch.no_grad()
def calibrate(folded: Sequence[Tensor], blocks: Sequence[BlockShape], batches: Iterable[Tensor]) -> list[Statistics]:
    """Run the float network on pictures and look at every tensor that will have 8 bits.

    Returns:
        One of each block's depthwise convolution and one of its output, in order, and one of the pooled features.
    """
    found = [Statistics() for _ in range(2 * len(blocks) + 1)]
    for x in batches:
        if not x.isfinite().all():
            raise ValueError("a picture of the calibration is not finite")
        for statistics, tensor in zip(found, _activations(folded, blocks, x), strict=True):
            statistics.add(tensor)
    return found


def _activations(folded: Sequence[Tensor], blocks: Sequence[BlockShape], x: Tensor) -> Iterator[Tensor]:
    stages = iter(zip(folded[::2], folded[1::2], strict=True))
    x = F.conv2d(x, *next(stages), stride=2, padding=1).clamp_(0, 6)
    for index, block in enumerate(blocks):
        hidden = x if index == 0 else F.conv2d(x, *next(stages)).clamp_(0, 6)
        hidden = F.conv2d(hidden, *next(stages), block.stride, 1, 1, block.hidden).clamp_(0, 6)
        yield hidden
        out = F.conv2d(hidden, *next(stages))
        x = x + out if block.residual else out
        yield x
    yield F.conv2d(x, *next(stages)).clamp_(0, 6).mean((2, 3))


@torch.no_grad()
def quantize(folded: Sequence[Tensor], blocks: Sequence[BlockShape], found: Sequence[Statistics]) -> list[Tensor]:
    """The numbers of every convolution and of the classifier, as `cpu_network.pack` takes them for int8.

    Args:
        folded: float weights and biases, BatchNorm folded in.
        blocks: the blocks in order.
        found: what `calibrate` returned.

    Returns:
        For each of `folded`'s weights the same shape in whole numbers (the stem's stay fractions), and in place of its
        bias [4, outputs]: bias, multiplier, the shortcut's multiplier (of the head: the mean's), offset.

    Raises:
        ValueError: the network's sums leave what the kernels can hold.
    """
    if not all(tensor.isfinite().all() for tensor in folded):
        raise ValueError("the network has weights that are not finite: int8 has no numbers for them")
    stages = iter(zip(folded[::2], folded[1::2], strict=True))
    weight, bias = next(stages)
    result = [weight * (HIDDEN / 6), _outputs(bias * (HIDDEN / 6))]
    scale = None
    for index, block in enumerate(blocks):
        inside, outside = found[2 * index : 2 * index + 2]
        if index > 0:
            result += _pointwise(*next(stages), scale, found[2 * index - 1], HIDDEN / 6)
        weight, bias = next(stages)
        taps, of_outputs, after = _depthwise(weight, bias, _scale(inside).step)
        result += [taps, of_outputs]
        before, scale = scale, _scale(outside)
        if block.residual:
            # A shortcut is only ever scaled down.
            scale = _scale(outside, before.step if before is not None else torch.tensor(6 * 64 / HIDDEN))
        result += _pointwise(*next(stages), after, inside, 64 / scale.step)
        offset = 64 * scale.zero + 32
        if block.residual:
            if before is None:
                shortcut = (6 * 64 / scale.step).round()
            else:
                shortcut = (before.step / scale.step * 16384).round()
                offset = offset - (before.zero * shortcut / 256).round()
            result[-1][2] = shortcut.clamp(max=HIDDEN)
        result[-1][3] = offset
    result += _pointwise(*next(stages), scale, found[-2], HIDDEN / 6)
    # Each channel has but one value a picture: too few to know its extremes by.
    widest = found[-1].high.max().double().clamp_min(1e-6) / 255
    pooled = Scale(widest.expand(len(found[-1].high)), torch.zeros(()))
    result[-1][2] = 6 / HIDDEN / pooled.step
    result += _pointwise(*next(stages), pooled, found[-1], 1.0)
    return [tensor.float().contiguous() for tensor in result]


def _outputs(bias: Tensor, multiplier: Tensor | float = 0.0) -> Tensor:
    outputs = torch.zeros(4, len(bias), dtype=torch.float64)
    outputs[0], outputs[1] = bias, multiplier
    return outputs


def _scale(found: Statistics, least: Tensor | None = None) -> Scale:
    """Steps of numbers 0..255 for all that was seen of each channel and somewhat more, none finer than `least`."""
    low, high = found.low.double() * _MARGIN, found.high.double() * _MARGIN
    width = high - low
    step = torch.maximum(width, _FLATTEST * width.max().clamp_min(1e-6)) / 255
    if least is not None:
        step = torch.maximum(step, least.double())
    return Scale(step, (-low / step).round())


def _depthwise(weight: Tensor, bias: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Scale]:
    """Taps, numbers of the outputs, and the scale that the outputs really have."""
    taps, bias = weight.double().flatten(1), bias.double()
    rises, falls = 6 * taps.clamp_min(0).sum(1), -6 * taps.clamp_max(0).sum(1)
    most = torch.stack([bias.abs(), 6 * taps.abs().amax(1), bias + rises, falls - bias]).amax(0)
    # No sum leaves 16 bits; 50 of them are for rounding.
    unit = most / (HIDDEN - 50)
    step = torch.maximum(step, unit * (32768 / HIDDEN))
    multiplier = (unit / step * 32768).ceil().clamp(1, HIDDEN)
    unit = multiplier * step / 32768
    whole = (taps * (6 * 32768 / HIDDEN) / unit[:, None]).round()
    return whole.view(weight.shape), _outputs((bias / unit).round(), multiplier), Scale(step, torch.zeros_like(step))


def _pointwise(
    weight: Tensor, bias: Tensor, scale: Scale, found: Statistics, gain: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Whole weights, and the numbers of the outputs, whose sums times the multiplier are the outputs times `gain`."""
    samples, steps = torch.cat(found.samples), scale.step
    mean = samples.mean(0, dtype=torch.float64)
    covariance = torch.cov((samples / steps.float()).T, correction=0).view(len(steps), -1).double()
    scaled, bias = weight.double().flatten(1) * steps, bias.double()
    step = _weight_steps(scaled.float(), covariance.diagonal().float()).double()
    step = torch.maximum(step, bias.abs() / _BIAS_LIMIT)
    whole = _round((scaled / step[:, None]).float(), covariance).double()
    bias = bias + (scaled - whole * step[:, None]) @ (mean / steps)
    bias = (bias / step - (whole * scale.zero).sum(1)).round().clamp(-2 * _BIAS_LIMIT, 2 * _BIAS_LIMIT)
    multiplier = step * gain
    if not ((bias.abs() + 255 * whole.abs().sum(1)) * multiplier < 2**31).all():
        raise ValueError("the weights are too large, or activations vanish: sums leave the range of the int8 kernels")
    return whole.view(weight.shape), _outputs(bias, multiplier)


def _grouped(weight: Tensor) -> Tensor:
    """[outputs, inputs] as [outputs, groups, 4]: the inputs whose weights have a bounded sum together."""
    padded = F.pad(weight, (0, -weight.shape[1] % 8))
    return padded.view(len(weight), -1, 2, 2, 2).transpose(2, 3).reshape(len(weight), -1, 4)


def _weight_steps(weight: Tensor, variance: Tensor) -> Tensor:
    """The step of each output's weights [outputs, inputs] that leaves the least error, the group sums being kept."""
    grouped, importance = _grouped(weight), _grouped(variance[None])
    largest = weight.abs().amax(1).clamp_min(1e-30)
    best, steps = torch.full_like(largest, float("inf")), largest / 127
    for factor in (4 * 0.91**power for power in range(22)):
        step = largest * factor / 127
        whole = (grouped / step[:, None, None]).clamp_(-127, 127)
        rises, falls = whole.clamp_min(0), whole.clamp_max(0)
        whole = _shrunk(rises) + _shrunk(falls)
        error = (whole.round_().mul_(step[:, None, None]).sub_(grouped).square_() * importance).sum((1, 2))
        steps, best = torch.where(error < best, step, steps), torch.minimum(error, best)
    return steps


def _shrunk(part: Tensor) -> Tensor:
    """Weights of one sign [outputs, groups, 4], made smaller where they sum to more than they may."""
    return part * (GROUP_SUM / part.sum(2, keepdim=True).abs().clamp_min(1e-30)).clamp_max(1)


def _round(weight: Tensor, covariance: Tensor) -> Tensor:
    """Weights [outputs, inputs], in steps, to whole numbers that keep the group sums; the error of each input is made
    up for by the inputs after it, as their covariance allows."""
    outputs, columns = weight.shape
    damp = 0.01 * covariance.diagonal().mean().clamp_min(1e-12)
    regular = covariance + damp * torch.eye(columns, dtype=covariance.dtype)
    factor = torch.linalg.cholesky(torch.linalg.inv(regular), upper=True).float().numpy()
    # By numpy, whose calls cost a fraction of torch's on so little.
    left = np.ascontiguousarray(weight.T.numpy())
    result = np.zeros_like(left)
    for first in range(0, columns, _BLOCK):
        last = min(first + _BLOCK, columns)
        errors = np.zeros((last - first, outputs), left.dtype)
        for k in range(first, last):
            result[k] = _whole_of(left, result, k)
            errors[k - first] = (left[k] - result[k]) / factor[k, k]
            left[k:last] -= factor[k, k:last, None] * errors[k - first]
        left[last:] -= factor[first:last, last:].T @ errors
    return torch.from_numpy(result.T.copy())


def _whole_of(left: np.ndarray, result: np.ndarray, k: int) -> np.ndarray:
    """Whole weights of input `k`: what its group may still sum to is shared with the inputs after it."""
    first = k - k % 8 + k % 4 // 2 * 2
    group = [g for g in (first, first + 1, first + 4, first + 5) if g < len(left)]
    done, open_ = result[[g for g in group if g < k]], left[[g for g in group if g >= k]]
    room = GROUP_SUM - np.maximum(done, 0).sum(0), GROUP_SUM + np.minimum(done, 0).sum(0)
    wanted = np.maximum(open_, 0).sum(0), -np.minimum(open_, 0).sum(0)
    share = [np.minimum(have / np.maximum(want, 1e-30), 1) for have, want in zip(room, wanted, strict=True)]
    whole = np.rint(left[k] * np.where(left[k] > 0, share[0], share[1]))
    return np.clip(whole, np.maximum(-room[1], -127), np.minimum(room[0], 127))
