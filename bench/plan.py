"""What the training block's kernels move between DRAM and the chip at least, as formulas; nothing is measured here.

Sizes are elements per image: X the block's input, E1 the expanded tensor y1, E2 the depthwise result y2, O the
projected y3. Every tensor a kernel needs is read once and every result written once: no L2 reuse between kernels, and
none needed inside one. Weights, statistics and partial sums are left out: they do not grow with the batch, or stay
below a tenth of the rest.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from mbv2.model import InvertedResidual, MobileNetV2

# A wider y3's gradient is written once, else every tile of hidden channels would compute it again.
WIDEST_FUSED_PROJECT = 64
# Accumulators of dW1 that fit into a program's registers next to those of dx; more make the products separate kernels.
LARGEST_FUSED_EXPAND = 192 * 32
# MB per image for the 17 blocks of the full-width network at 224, 16-bit activations: forward, backward. The first two
# are what the operators of torch move, and what is left of it when pointwise ones are fused (a model, not measured).
EAGER, COMPILED = (109.4, 148.6), (63.4, 114.7)
GATE = (29.0, 58.0)

# What blocks may fetch over the distinct sectors. Halos of strips of rows and columns; and for products whose channels
# take several tiles, each of which reads all of its rows, what L2 delivers over what DRAM does.
MOST_HALO, MOST_PRODUCT = 1.5, 4.0
SECTOR = 32  # bytes

FORWARD = ("expand", "depthwise", "project", "bn_finalize", "bn_apply")
BACKWARD = ("bn_sums", "project_backward", "depthwise_backward", "expand_backward", "bn_backward")


@dataclass(frozen=True)
class Block:
    """One inverted residual of a network; `side` is the height and width of its input."""

    cin: int
    hidden: int
    cout: int
    stride: int
    side: int
    expands: bool

    @property
    def side_out(self) -> int:
        return (self.side - 1) // self.stride + 1

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.cin == self.cout

    @property
    def elements(self) -> dict[str, int]:
        """Elements per image of each kind of tensor."""
        inside, outside = self.side**2, self.side_out**2
        return {
            "X": self.cin * inside,
            "E1": self.hidden * inside,
            "E2": self.hidden * outside,
            "O": self.cout * outside,
        }

    def __str__(self) -> str:
        return f"{self.cin}-{self.hidden}-{self.cout} s{self.stride} {self.side}"


@dataclass(frozen=True)
class Kernel:
    """One kernel of the plan: the stage it belongs to (kernels/aten.py), and the kinds of tensors it moves."""

    stage: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]

    def bytes(self, block: Block, itemsize: int) -> int:
        """Per image."""
        return sum(block.elements[kind] for kind in self.reads + self.writes) * itemsize


def network(width: float = 1.0, resolution: int = 224) -> list[Block]:
    """The blocks of a network, in order."""
    with torch.device("meta"):
        features = MobileNetV2(width_mult=width).features
    side, blocks = (resolution - 1) // 2 + 1, []
    for feature in features:
        if isinstance(feature, InvertedResidual):
            first, last = feature.conv[0][0], feature.conv[-2]
            expands = first.groups == 1
            block = Block(first.in_channels, last.in_channels, last.out_channels, feature.stride, side, expands)
            blocks.append(block)
            side = block.side_out
    return blocks


def forward(block: Block) -> Iterator[Kernel]:
    """Convolutions normalise and clamp what they read, and take the statistics of what they write."""
    if block.expands:
        yield Kernel("expand", ("X",), ("E1",))
    yield Kernel("depthwise", ("E1",), ("E2",))
    yield Kernel("project", ("E2",), ("O",))
    yield Kernel("bn_apply", ("O", "X") if block.residual else ("O",), ("O",))


def backward(block: Block) -> Iterator[Kernel]:
    """Gradients at a convolution's output, dy = A dz + B y + C, are computed where they are used, save one."""
    yield Kernel("bn_sums", ("O", "O"), ())
    if block.cout <= WIDEST_FUSED_PROJECT:
        yield Kernel("project_backward", ("O", "O", "E2"), ("E2",))
    else:
        yield Kernel("project_backward", ("O", "O"), ("O",))  # dy3
        yield Kernel("project_backward", ("O", "E2"), ("E2",))  # dz2
        yield Kernel("project_backward", ("O", "E2"), ())  # dW3
    yield Kernel("depthwise_backward", ("E2", "E2", "E1"), ("E1",))
    if not block.expands:
        return
    past = ("X",) if block.residual else ()  # the gradient that reaches the input past the block
    if block.hidden * block.cin <= LARGEST_FUSED_EXPAND:
        yield Kernel("expand_backward", ("E1", "E1", "X", *past), ("X",))
    else:
        yield Kernel("expand_backward", ("E1", "E1", *past), ("X",))  # dx
        yield Kernel("expand_backward", ("E1", "E1", "X"), ())  # dW1


def planned(block: Block, itemsize: int = 2) -> dict[str, int]:
    """Bytes per image of each stage, forward stages first."""
    total: dict[str, int] = {}
    for kernel in (*forward(block), *backward(block)):
        total[kernel.stage] = total.get(kernel.stage, 0) + kernel.bytes(block, itemsize)
    return total
