"""Stems, blocks and pooled heads, read from a run of modules and computed by one operator each."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from mbv2 import kernels
from mbv2.drop_in.leaves import Mismatch, Stage, is_identity, relu6, stage, type_name, watched

_POOL = "torch.nn.modules.pooling.AdaptiveAvgPool2d"


class Stem(NamedTuple):
    """Dense 3x3 convolution of stride 2, BatchNorm, ReLU6."""

    first: Stage


class Block(NamedTuple):
    """Expand (None without), depthwise, project, and whether the input is added."""

    expand: Stage | None
    depthwise: Stage
    project: Stage
    residual: bool


class Head(NamedTuple):
    """1x1 convolution, BatchNorm, ReLU6, global average; `flat`: the output is [N, C], not [N, C, 1, 1]."""

    last: Stage
    flat: bool


class Apart(NamedTuple):
    """Modules in the place of a stem or head that are called one by one.

    Attributes:
        kind: "stem" or "head".
        modules: in the order in which they are called.
        why: what keeps them from being one.
    """

    kind: str
    modules: tuple[nn.Module, ...]
    why: Mismatch


class Tap(NamedTuple):
    """The value here is one of the outputs, which are a list where there are such steps."""


Fused = Stem | Block | Head
Step = Fused | Apart | Tap | Callable[[Tensor], Tensor]


def stages(step: Fused) -> list[Stage]:
    """The stages that `step` consists of."""
    if isinstance(step, Block):
        return [s for s in (step.expand, step.depthwise, step.project) if s is not None]
    return [step[0]]


def run_all(steps: list[Step], x: Tensor) -> Tensor | list[Tensor]:
    """What the steps make of input x [N, C, H, W]; modules and functions are called."""
    taken = []
    for step in steps:
        if isinstance(step, Tap):
            taken.append(x)
        else:
            x = _run(step, x)
    return taken or x


def _run(step: Step, x: Tensor) -> Tensor:
    if isinstance(step, Block):
        return _run_block(step, x)
    if isinstance(step, Stem):
        turned = step.first.same
        weight, norm = step.first.tensors()
        out = kernels.stem(_turn(x) if turned else x, kernels.ConvBN(_turn(weight) if turned else weight, norm), 2)
        return _turn(out) if turned else out
    if isinstance(step, Head):
        out = kernels.head(x, step.last.tensors())
        return out if step.flat else out[:, :, None, None]
    for module in step.modules if isinstance(step, Apart) else (step,):
        x = module(x)
    return x


def _run_block(block: Block, x: Tensor) -> Tensor:
    stride = block.depthwise.conv.stride[0]
    expand = None if block.expand is None else block.expand.tensors()
    depthwise, project = block.depthwise.tensors(), block.project.tensors()
    # With stride 1 SAME is padding 1.
    turned = block.depthwise.same and stride == 2
    if turned:
        x, depthwise = _turn(x), kernels.ConvBN(_turn(depthwise.weight), depthwise.bn)
    out = kernels.inverted_residual(x, expand, depthwise, project, stride, block.residual)
    return _turn(out) if turned else out


def _turn(x: Tensor) -> Tensor:
    """Turn by 180 degrees.

    TensorFlow's SAME puts the odd zero at the end where padding 1 puts it at the start, so a strided SAME convolution
    is the turned output of a padding-1 convolution on the turned input with the turned kernel, for even and odd sizes
    alike; 1x1 convolutions, BatchNorm and ReLU6 do not see the turn.
    """
    return x.flip((2, 3))


def stem_at(leaves: Sequence[nn.Module], at: int, same: bool = False) -> tuple[Stem, int] | Mismatch:
    """A stem in the run of modules that begins at index `at`, and the index after it."""
    if at + 1 >= len(leaves):
        return Mismatch(None, "ends before a BatchNorm")
    conv = leaves[at]
    first = stage(conv, leaves[at + 1], 3, 2, 1, same)
    if isinstance(first, Mismatch):
        return first
    if conv.stride != (2, 2) or conv.in_channels > 3:
        return Mismatch(conv, "is not a stem: stride 2 over at most 3 channels")
    after = _activated(first, leaves, at + 2)
    return after if isinstance(after, Mismatch) else (Stem(first), after)


def block_at(leaves: Sequence[nn.Module], at: int, residual: bool, same: bool = False) -> tuple[Block, int] | Mismatch:
    """A block in the run of modules that begins at index `at`, and the index after it.

    Args:
        leaves: convolutions, BatchNorms, activations and identities in the order in which they are called.
        residual: the caller adds the block's input to its output.
        same: the caller pads the 3x3 convolution's input as TensorFlow does.
    """
    expand = None
    if at < len(leaves) and getattr(leaves[at], "kernel_size", None) == (1, 1):
        found = _stage_at(leaves, at, 1, 1, 1, False, True)
        if isinstance(found, Mismatch):
            return found
        expand, at = found
    channels = getattr(leaves[at], "in_channels", 1) if at < len(leaves) else 1
    found = _stage_at(leaves, at, 3, 2, channels, same, True)
    if isinstance(found, Mismatch):
        return found
    depthwise, at = found
    if depthwise.conv.out_channels != channels or channels == 1:
        return Mismatch(depthwise.conv, f"makes {depthwise.conv.out_channels} channels of {channels}: not depthwise")
    found = _stage_at(leaves, at, 1, 1, 1, False, False)
    if isinstance(found, Mismatch):
        return found
    project, at = found
    if project.relu6:
        return Mismatch(project.norm, "has an activation after the projection")
    taken = depthwise.conv.in_channels if expand is None else expand.conv.in_channels
    if residual and (depthwise.conv.stride != (1, 1) or project.conv.out_channels != taken):
        return Mismatch(None, "adds its input to an output of another shape")
    return Block(expand, depthwise, project, residual), at


def head_at(leaves: Sequence[nn.Module], at: int) -> tuple[Head, int] | Mismatch:
    """A head with its pooling in the run of modules that begins at index `at`, and the index after it."""
    found = _stage_at(leaves, at, 1, 1, 1, False, True)
    if isinstance(found, Mismatch):
        return found
    last, at = found
    if at == len(leaves):
        return Mismatch(None, "does not pool what its last convolution makes")
    pool = leaves[at]
    if type_name(pool) != _POOL or pool.output_size not in (1, (1, 1)) or watched(pool):
        return Mismatch(pool, "is no global average pooling")
    return Head(last, False), at + 1


def _stage_at(
    leaves: Sequence[nn.Module], at: int, kernel: int, stride: int, groups: int, same: bool, activated: bool
) -> tuple[Stage, int] | Mismatch:
    """A convolution, its BatchNorm and, if `activated`, its ReLU6, and the index after them."""
    if at + 1 >= len(leaves):
        return Mismatch(None, "ends before the projection's BatchNorm")
    found = stage(leaves[at], leaves[at + 1], kernel, stride, groups, same)
    if isinstance(found, Mismatch):
        return found
    if not activated:
        return found, _skip(leaves, at + 2)
    after = _activated(found, leaves, at + 2)
    return after if isinstance(after, Mismatch) else (found, after)


def _activated(found: Stage, leaves: Sequence[nn.Module], at: int) -> int | Mismatch:
    """The index after the stage's ReLU6, which stands at index `at` or in the BatchNorm."""
    if found.relu6:
        return _skip(leaves, at)
    if at == len(leaves):
        return Mismatch(found.norm, "is not followed by ReLU6")
    why = relu6(leaves[at])
    return _skip(leaves, at + 1) if why is None else why


def _skip(leaves: Sequence[nn.Module], at: int) -> int:
    while at < len(leaves) and is_identity(leaves[at]):
        at += 1
    return at


def described(step: Fused) -> tuple[str, str, int]:
    """Kind, channels and stride of a step, for people."""
    parts = stages(step)
    channels = " -> ".join(str(c) for c in [parts[0].conv.in_channels, *(_made(s) for s in parts)])
    if isinstance(step, Block):
        kind = "block with residual" if step.residual else "block"
        return kind, channels, step.depthwise.conv.stride[0]
    return ("stem", channels, 2) if isinstance(step, Stem) else ("head with pooling", channels, 1)


def _made(part: Stage) -> int:
    return part.conv.out_channels
