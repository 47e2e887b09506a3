"""What every reader of a foreign format hands over, and its way into our names."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Output channels of the 52 convolutions are checked against the layout of table 2 of arXiv 1801.04381.
BLOCKS = 17
# Strides of the depthwise convolutions, block by block.
STRIDES = (1, 2, 1, 2, 1, 1, 2, 1, 1, 1, 1, 1, 1, 2, 1, 1, 1)
_EPS_WITHOUT_BN = 1e-5


class Malformed(Exception):
    """A file that breaks the rules of its format; the message says where."""


class NotThisNetwork(Exception):
    """A sound file of something other than a MobileNetV2 that we can hold; the message says what differs."""


class Norm(NamedTuple):
    """One BatchNorm's tensors, [C] each."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    var: Tensor


@dataclass(frozen=True)
class Network:
    """A MobileNetV2 of any format, in one orientation: weights [out, in / groups, k, k].

    Attributes:
        weights: of the 52 convolutions in the order they run: stem; depthwise and project of the first block;
            expand, depthwise and project of the 16 others; head.
        norms: of the BatchNorm after each; None where the format has folded it away and `biases` hold the rest.
        biases: [C] each, for folded formats only.
        classifier, bias: [classes, C] and [classes].
        facts: what the file says for certain, by the names `mbv2.weights.Weights.meta` uses.
        notes: sentences the user should read.
    """

    weights: Sequence[Tensor]
    norms: Sequence[Norm] | None
    classifier: Tensor
    bias: Tensor
    biases: Sequence[Tensor] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def stage_names() -> list[tuple[str, str]]:
    """torchvision's (convolution, BatchNorm) prefixes of the 52 stages, in the order they run."""
    names = [("features.0.0", "features.0.1")]
    for block in range(1, BLOCKS + 1):
        conv = f"features.{block}.conv"
        if block > 1:
            names += [(f"{conv}.0.0", f"{conv}.0.1"), (f"{conv}.1.0", f"{conv}.1.1"), (f"{conv}.2", f"{conv}.3")]
        else:
            names += [(f"{conv}.0.0", f"{conv}.0.1"), (f"{conv}.1", f"{conv}.2")]
    return [*names, (f"features.{BLOCKS + 1}.0", f"features.{BLOCKS + 1}.1")]


def gather(
    tensors: Mapping[str, Tensor],
    stages: Sequence[tuple[str, str]],
    norm_names: tuple[str, str, str, str] = ("weight", "bias", "running_mean", "running_var"),
    conv_name: str = "weight",
) -> tuple[list[Tensor], list[Norm]]:
    """The convolutions' weights and the BatchNorms' tensors under the names of `stages`.

    Raises:
        NotThisNetwork: one is missing.
    """
    try:
        weights = [tensors[f"{conv}.{conv_name}"] for conv, _ in stages]
        norms = [Norm(*(tensors[f"{norm}.{name}"] for name in norm_names)) for _, norm in stages]
    except KeyError as error:
        raise NotThisNetwork(f"no tensor {error.args[0]}") from error
    return weights, norms


def unused(tensors: Mapping[str, Tensor], used: Sequence[str], endings: tuple[str, ...] = ()) -> None:
    """Refuse a file with tensors that no part of a MobileNetV2 takes.

    Raises:
        NotThisNetwork: there is one that does not end in one of `endings`.
    """
    known = set(used)
    left = [name for name in tensors if name not in known and not name.endswith(endings or ("\0",))]
    if left:
        raise NotThisNetwork(f"{len(left)} tensors have no place in a MobileNetV2, the first {left[0]}")


def state_dict(network: Network) -> dict[str, Tensor]:
    """The network in torchvision's names, float32.

    A folded BatchNorm becomes one that does nothing in evaluation: gamma 1, beta the bias, mean 0, variance 1 - eps.

    Raises:
        NotThisNetwork: the number, rank or channels of the tensors are not a MobileNetV2's.
    """
    _check_shapes(network)
    state: dict[str, Tensor] = {}
    eps = network.facts.get("bn_eps", _EPS_WITHOUT_BN)
    for index, (conv, norm) in enumerate(stage_names()):
        weight = network.weights[index]
        channels = weight.shape[0]
        if network.norms is not None:
            values = network.norms[index]
        else:
            one = torch.ones(channels)
            values = Norm(one, network.biases[index], torch.zeros(channels), one - eps)
        state[f"{conv}.weight"] = _plain(weight)
        for name, value in zip(("weight", "bias", "running_mean", "running_var"), values, strict=True):
            if value.shape != (channels,):
                raise NotThisNetwork(f"{norm}.{name} is {list(value.shape)}, its convolution has {channels} channels")
            state[f"{norm}.{name}"] = _plain(value)
        state[f"{norm}.num_batches_tracked"] = torch.zeros((), dtype=torch.int64)
    state["classifier.1.weight"] = _plain(network.classifier)
    state["classifier.1.bias"] = _plain(network.bias)
    for name, value in state.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise NotThisNetwork(f"{name} holds values that are not finite")
    return state


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32).contiguous().clone()


def _check_shapes(network: Network) -> None:
    names = stage_names()
    if len(network.weights) != len(names):
        raise NotThisNetwork(f"{len(network.weights)} convolutions before the classifier; MobileNetV2 has {len(names)}")
    inputs = 3
    for index, ((name, _), weight) in enumerate(zip(names, network.weights, strict=True)):
        is_depthwise = 0 < index < len(names) - 1 and index % 3 == 1
        kernel = 3 if index == 0 or is_depthwise else 1
        fits = weight.dim() == 4 and tuple(weight.shape[1:]) == (1 if is_depthwise else inputs, kernel, kernel)
        if not fits or (is_depthwise and weight.shape[0] != inputs):
            raise NotThisNetwork(f"{name} (convolution {index + 1}) is {list(weight.shape)}")
        inputs = weight.shape[0]
    if network.norms is None and len(network.biases) != len(names):
        raise NotThisNetwork(f"{len(network.biases)} biases for {len(names)} convolutions")
    if network.classifier.dim() != 2 or network.classifier.shape[1] != inputs:
        raise NotThisNetwork(f"the classifier is {list(network.classifier.shape)}, the head has {inputs} channels")
    if network.bias.shape != (network.classifier.shape[0],):
        raise NotThisNetwork(f"the classifier's bias is {list(network.bias.shape)}")
