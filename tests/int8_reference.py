"""The int8 network's arithmetic in plain torch, in whole numbers that float64 holds: what its kernels must equal.

Written from the rules in csrc/cpu/microkernels_int8.h, not from the kernels.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2.kernels.cpu_network import BlockShape


def logits(numbers: Sequence[Tensor], blocks: Sequence[BlockShape], x: Tensor) -> Tensor:
    """Logits [N, classes] in float32 of pictures [N, 3, H, W].

    The stem's sums are in float64, the kernels' in float32: they agree where its products and sums are exact there.
    """
    *_, last = layers(numbers, blocks, x)
    return last


def layers(numbers: Sequence[Tensor], blocks: Sequence[BlockShape], x: Tensor) -> Iterator[Tensor]:
    """The depthwise convolution's and the block's numbers of every block, the pooled features, the logits."""
    stages = iter(zip(numbers[::2], numbers[1::2], strict=True))
    weight, outputs = next(stages)
    x = saturate16(F.conv2d(x.double(), weight.double(), outputs[0].double(), 2, 1).float().round()).clamp_min(0)
    for index, block in enumerate(blocks):
        hidden = x
        if index > 0:
            hidden = narrow(*sums(x, *next(stages))).clamp_min(0)
        hidden = depthwise(hidden, *next(stages), block.stride)
        yield hidden
        weight, outputs = next(stages)
        out = narrow(*sums(hidden, weight, outputs))
        if block.residual:
            scaled = x if index == 0 else x * 128
            out = saturate16(out + multiply_high(scaled, column(outputs[2])))
        out = saturate16(out + column(outputs[3]))
        x = torch.floor(out / 64).clamp(0, 255)
        yield x
    weight, outputs = next(stages)
    hidden = narrow(*sums(x, weight, outputs)).clamp_min(0)
    pixels = torch.tensor(hidden.shape[2] * hidden.shape[3], dtype=torch.float32)
    x = (hidden.sum((2, 3)).float() * (outputs[2] / pixels)).round().clamp_max(255).double()
    yield x
    weight, outputs = next(stages)
    total, outputs = sums(x[:, :, None, None], weight[:, :, None, None], outputs)
    yield (total.float() * column(outputs[1]))[:, :, 0, 0]


def column(values: Tensor) -> Tensor:
    """One value of each channel, to be applied to [N, channels, H, W]."""
    return values.view(1, -1, 1, 1)


def sums(x: Tensor, weight: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Whole sums of a 1x1 convolution, and the numbers of the outputs."""
    assert ((weight == weight.round()) & (weight.abs() <= 127)).all()
    total = F.conv2d(x, weight.double(), outputs[0].double())
    assert (total.abs() < 2**31).all()
    return total, outputs


def narrow(total: Tensor, outputs: Tensor) -> Tensor:
    """Sums times the multipliers in float32, rounded half to even, in 16 bits."""
    return saturate16((total.float() * column(outputs[1])).round())


def saturate16(x: Tensor) -> Tensor:
    return x.double().clamp(-32768, 32767)


def multiply_high(x: Tensor, factor: Tensor) -> Tensor:
    """The upper 16 bits but one of the product of 16-bit numbers, halves rounded up."""
    return torch.floor((x * factor.double() + 16384) / 32768)


def depthwise(x: Tensor, weight: Tensor, outputs: Tensor, stride: int) -> Tensor:
    """8-bit outputs [N, C, H', W'] of hidden channels."""
    height, width = x.shape[2:]
    padded = F.pad(x, (1, 1, 1, 1))
    total = column(outputs[0]).double()
    for row in range(3):
        for col in range(3):
            part = padded[:, :, row : row + height : stride, col : col + width : stride]
            total = saturate16(total + multiply_high(part, column(weight[:, 0, row, col])))
    return multiply_high(total, column(outputs[1])).clamp(0, 255)
