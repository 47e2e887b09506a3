"""Formats that hold a graph instead of names: the convolutions in running order, and what they say of the network."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from mbv2.convert.network import BLOCKS, STRIDES, Network, Norm, NotThisNetwork


class Convolution(NamedTuple):
    """One convolution of a graph.

    Attributes:
        weight: [out, in / groups, k, k].
        bias: [out], or None.
        stride: in both directions.
        pads: pixels added at the top and at the bottom (left and right are the same), or None for TensorFlow's SAME.
        norm: the BatchNorm after it, or None where it is folded in.
        eps: that BatchNorm's, 0 without.
    """

    weight: Tensor
    bias: Tensor | None
    stride: int
    pads: tuple[int, int] | None
    norm: Norm | None = None
    eps: float = 0.0


def assemble(
    convs: Sequence[Convolution], classifier: Tensor, bias: Tensor, facts: dict[str, Any], notes: tuple[str, ...] = ()
) -> Network:
    """The network these convolutions make, with its padding found out.

    Raises:
        NotThisNetwork: other strides or paddings than a MobileNetV2's, or BatchNorm in some stages only.
    """
    wanted = [2, 1, 1]
    for stride in STRIDES[1:]:
        wanted += [1, stride, 1]
    wanted.append(1)
    if [conv.stride for conv in convs] != wanted:
        raise NotThisNetwork(
            f"{len(convs)} convolutions of strides {[conv.stride for conv in convs][:9]}...; MobileNetV2 has "
            f"{3 * BLOCKS + 1} of strides {wanted[:9]}..."
        )
    facts = {**facts, "padding": _padding(convs)}
    norms = [conv.norm for conv in convs]
    if all(norm is None for norm in norms):
        biases = [conv.weight.new_zeros(conv.weight.shape[0]) if conv.bias is None else conv.bias for conv in convs]
        facts["folded"] = True
        return Network([conv.weight for conv in convs], None, classifier, bias, biases, facts, notes)
    eps = {round(conv.eps, 9) for conv in convs}
    if any(norm is None for norm in norms) or any(conv.bias is not None for conv in convs) or len(eps) != 1:
        raise NotThisNetwork("BatchNorm is folded into some convolutions and not into others")
    facts["bn_eps"] = eps.pop()
    return Network([conv.weight for conv in convs], norms, classifier, bias, facts=facts, notes=notes)


def _padding(convs: Sequence[Convolution]) -> str:
    found = set()
    for conv in convs:
        if conv.weight.dim() == 4 and conv.weight.shape[2] == 3:
            if conv.stride == 2:
                found.add("same" if conv.pads in (None, (0, 1)) else "symmetric" if conv.pads == (1, 1) else "other")
            elif conv.pads not in (None, (1, 1)):
                found.add("other")
    if found not in ({"same"}, {"symmetric"}):
        raise NotThisNetwork("its 3x3 convolutions are padded neither by one pixel on each side nor by SAME")
    return found.pop()
