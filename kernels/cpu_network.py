"""The whole network as one call on a CPU: packed once, then inference through `mbv2._C` in float32 or bfloat16.

`cpu_network` (csrc/ops.cpp, csrc/cpu/) runs stem, blocks, head and classifier without returning to Python between
them. Its weights are packed for one instruction set: the best this machine has, or the one `MBV2_CPU_ISA` names
(avx512, avx2, portable).
"""

import importlib
import os
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mbv2.kernels.dispatch import BackendError

ISAS = ("avx512", "avx2", "portable")
FORMATS = ("float32", "bfloat16", "int8")


class BlockShape(NamedTuple):
    """Channels, stride and shortcut of one inverted residual block; the first block's input is the stem's output."""

    inputs: int
    hidden: int
    outputs: int
    stride: int
    residual: bool


class PackedNetwork(NamedTuple):
    """A network ready to run: weights in number format `format` and in the layout of instruction set `isa`, and its
    shape for the operator.
    """

    packed: Tensor
    plan: Tensor
    classes: int
    isa: str
    format: str = "float32"


_error: ImportError | None = None
_loaded = False


def refusal() -> str | None:
    """Why the compiled kernels cannot be used here, or None."""
    global _error, _loaded
    if _loaded:
        return None
    if _error is None:
        try:
            importlib.import_module("mbv2._C")
        except ImportError as error:
            _error = error
        else:
            _loaded = True
            return None
    return (
        f"mbv2 has no compiled kernels here ({_error}); install it with a C++ compiler and torch present: "
        "MBV2_BUILD=1 pip install --no-build-isolation <the source folder or sdist>"
    )


def isa(format: str = "float32") -> str:
    """The instruction set that will be used for networks in this number format.

    Raises:
        BackendError: no compiled kernels, this machine has no instructions for the format, or `MBV2_CPU_ISA` names
            what it cannot run.
    """
    _require()
    try:
        return torch.ops.mbv2.cpu_isa(format)
    except RuntimeError as error:
        raise BackendError(_first_line(error)) from None


def state() -> str:
    """The instruction set that will be used, or why there is none, in one sentence."""
    try:
        return isa()
    except BackendError as error:
        return f"not usable: {error}"


def usable_isas(format: str = "float32") -> list[str]:
    """The instruction sets that this build and machine can run for networks in this number format, best first."""
    _require()
    asked = os.environ.get("MBV2_CPU_ISA")
    usable = []
    try:
        for name in ISAS:
            os.environ["MBV2_CPU_ISA"] = name
            try:
                usable.append(torch.ops.mbv2.cpu_isa(format))
            except RuntimeError:
                continue
    finally:
        if asked is None:
            del os.environ["MBV2_CPU_ISA"]
        else:
            os.environ["MBV2_CPU_ISA"] = asked
    return usable


def pack(
    weights: Sequence[Tensor],
    blocks: Sequence[BlockShape],
    last_channels: int,
    classes: int,
    format: str = "float32",
) -> PackedNetwork:
    """Lay out a network's float32 weights, BatchNorm folded in, for this machine.

    Args:
        weights: weight and bias of the stem; of each block's expand (the first block has none), depthwise and
            project; of the head; of the classifier.
        blocks: the blocks in order.
        last_channels: outputs of the head.
        classes: outputs of the classifier.
        format: the number format to run it in, one of `FORMATS`. In bfloat16 are the weights of 1x1 convolutions and
            of the classifier, and what blocks hand on; sums, biases, the stem and depthwise convolutions are float32.
            For int8 the weights are what `mbv2.quantize` returns.

    Raises:
        BackendError: as `isa`.
        RuntimeError, ValueError: the weights do not have the blocks' shapes.
    """
    name = isa(format)
    numbers = [classes, last_channels, *(int(number) for block in blocks for number in block)]
    plan = torch.tensor(numbers, dtype=torch.int64)
    packed = torch.ops.mbv2.cpu_pack_network([weight.detach() for weight in weights], plan, name, format)
    return PackedNetwork(packed, plan, classes, name, format)


def run(x: Tensor, network: PackedNetwork) -> Tensor:
    """Float32 pictures [N, 3, H, W], NCHW or channels_last, on the CPU -> logits [N, classes]; no gradients."""
    return torch.ops.mbv2.cpu_network(x, *network)


def _require() -> None:
    reason = refusal()
    if reason is not None:
        raise BackendError(reason)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
