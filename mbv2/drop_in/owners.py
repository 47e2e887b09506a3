"""The modules whose forward is known: which steps it takes, read from the module as it is now.

An owner is known by the function that is its forward, so that a subclass counts as long as it keeps that forward.
`read` says what the forward does as a list of steps, fused ones and plain modules, or why it is not matched.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from mbv2.drop_in.leaves import Mismatch, a, is_identity, type_name, watched
from mbv2.drop_in.patterns import Fused, Step, block_at, head_at, stem_at
from mbv2.drop_in.timm_network import read_timm_features, read_timm_model

Read = Callable[[nn.Module], "list[Step] | Mismatch"]


class Owner(NamedTuple):
    """A kind of module.

    Attributes:
        read: the module's steps.
        opened: what it holds is searched for owners as well.
        calls: other methods that its forward calls, and that a subclass has to leave as they are.
    """

    read: Read
    opened: bool = False
    calls: tuple[str, ...] = ()

    def own(self, module: nn.Module) -> bool:
        """Whether a forward, or a method it calls, was put on the instance."""
        return any(name in module.__dict__ for name in ("forward", *self.calls))


def full_name(method: Any) -> str:
    """A method's name with those of its module and class."""
    return f"{getattr(method, '__module__', '')}.{getattr(method, '__qualname__', '')}"


def owner_of(cls: type[nn.Module]) -> Owner | None:
    """What is known of modules of this class, None if nothing is."""
    name = full_name(cls.forward)
    owner = OWNERS.get(name)
    if owner is None:
        return None
    methods = name.removesuffix("forward")
    return owner if all(full_name(getattr(cls, called)) == methods + called for called in owner.calls) else None


def is_sequence(module: nn.Module) -> bool:
    """Whether a call of this module is nothing but calls of its children in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward and not watched(module)


def flat(sequence: nn.Sequential) -> list[nn.Module]:
    """The modules a Sequential calls, in order, Sequentials inside opened where that changes nothing."""
    leaves: list[nn.Module] = []
    for child in sequence._modules.values():
        if is_sequence(child):
            leaves += flat(child)
        else:
            leaves.append(child)
    return leaves


def only_block(leaves: list[nn.Module], residual: bool, same: bool = False) -> list[Step] | Mismatch:
    """The block that the leaves are, without anything before or after it."""
    found = block_at(leaves, 0, residual, same)
    if isinstance(found, Mismatch):
        return found
    block, after = found
    return [block] if after == len(leaves) else Mismatch(leaves[after], f"is {a(leaves[after])} after the block's end")


def read_sequence(module: nn.Module) -> list[Step] | Mismatch:
    """Steps of a Sequential: every stem, block and pooled head in it, and the modules between them."""
    leaves = flat(module)
    steps: list[Step] = []
    at = 0
    while at < len(leaves):
        found = None
        if isinstance(leaves[at], nn.Conv2d):
            found = _run_at(leaves, at)
        if found is None:
            steps.append(leaves[at])
            at += 1
        else:
            step, at = found
            steps.append(step)
    if any(isinstance(step, Fused) for step in steps):
        return steps
    return Mismatch(None, "holds no stem, block or pooled head")


def _run_at(leaves: list[nn.Module], at: int) -> tuple[Step, int] | None:
    for found in (block_at(leaves, at, False), stem_at(leaves, at), head_at(leaves, at)):
        if not isinstance(found, Mismatch):
            return found
    return None


def read_torchvision_block(module: nn.Module) -> list[Step] | Mismatch:
    """`conv`, a Sequential, and the input where `use_res_connect`."""
    if not is_sequence(module.conv):
        return Mismatch(module.conv, "is no plain Sequential, or has hooks")
    return only_block(flat(module.conv), module.use_res_connect)


def read_torchvision_model(module: nn.Module) -> list[Step] | Mismatch:
    """`features`, the average over all positions, `classifier`: the last convolution is computed with the average."""
    if not is_sequence(module.features):
        return Mismatch(module.features, "is no plain Sequential, or has hooks")
    *body, last = module.features._modules.values()
    if not is_sequence(last):
        return Mismatch(last, "is no plain Sequential, or has hooks")
    leaves = flat(last)
    found = head_at([*leaves, _POOL], 0)
    if isinstance(found, Mismatch):
        return found if found.module is not _POOL else Mismatch(last, "is not 1x1 convolution, BatchNorm and ReLU6")
    return [*body, found[0]._replace(flat=True), module.classifier]


# What torchvision's MobileNetV2 calls as a function.
_POOL = nn.AdaptiveAvgPool2d(1)


def read_timm_block(module: nn.Module) -> list[Step] | Mismatch:
    """timm's InvertedResidual: conv_pw, bn1, conv_dw, bn2, aa, se, conv_pwl, bn3, drop_path."""
    names = ("conv_pw", "bn1", "conv_dw", "bn2", "aa", "se", "conv_pwl", "bn3")
    return _read_timm(module, names)


def read_timm_separable(module: nn.Module) -> list[Step] | Mismatch:
    """timm's DepthwiseSeparableConv: conv_dw, bn1, aa, se, conv_pw, bn2, drop_path."""
    return _read_timm(module, ("conv_dw", "bn1", "aa", "se", "conv_pw", "bn2"))


def _read_timm(module: nn.Module, names: tuple[str, ...]) -> list[Step] | Mismatch:
    if getattr(module, "conv_s2d", None) is not None:
        return Mismatch(module.conv_s2d, "moves space to depth first")
    path, dropping = module.drop_path, None
    if module.has_skip and not is_identity(path):
        if type_name(path) != "timm.layers.drop.DropPath" or watched(path):
            return Mismatch(path, f"is {a(path)} before the addition")
        if path.training and path.drop_prob > 0:
            dropping = Mismatch(path, "drops branches in training; in evaluation the block is fused", passing=True)
    leaves = [leaf for leaf in (getattr(module, name) for name in names) if not is_identity(leaf)]
    found = only_block(leaves, module.has_skip)
    if isinstance(found, Mismatch):
        return found
    return found if dropping is None else dropping


def read_hugging_face_block(module: nn.Module) -> list[Step] | Mismatch:
    """transformers' MobileNetV2InvertedResidual: expand_1x1, conv_3x3, reduce_1x1."""
    layers = [module.expand_1x1, module.conv_3x3, module.reduce_1x1]
    return _read_layers(layers, module.use_residual)


def read_hugging_face_stem(module: nn.Module) -> list[Step] | Mismatch:
    """transformers' MobileNetV2Stem: first_conv and a block, without expansion if `expand_1x1` is None."""
    leaves = _layer(module.first_conv)
    if isinstance(leaves, Mismatch):
        return leaves
    first = stem_at(leaves, 0, module.first_conv.config.tf_padding)
    if isinstance(first, Mismatch):
        return first
    layers = [module.conv_3x3, module.reduce_1x1]
    block = _read_layers(layers if module.expand_1x1 is None else [module.expand_1x1, *layers], False)
    return block if isinstance(block, Mismatch) else [first[0], *block]


def _read_layers(layers: list[nn.Module], residual: bool) -> list[Step] | Mismatch:
    leaves: list[nn.Module] = []
    for layer in layers:
        found = _layer(layer)
        if isinstance(found, Mismatch):
            return found
        leaves += found
    return only_block(leaves, residual, layers[-2].config.tf_padding)


def _layer(layer: nn.Module) -> list[nn.Module] | Mismatch:
    """What transformers' MobileNetV2ConvLayer calls; a missing normalization or activation is no module."""
    if type_name(layer) != f"{_HUGGING_FACE}.MobileNetV2ConvLayer" or watched(layer):
        return Mismatch(layer, f"is {a(layer)}, not a MobileNetV2ConvLayer without hooks")
    return [m for m in (layer.convolution, layer.normalization, layer.activation) if m is not None]


_TORCHVISION = "torchvision.models.mobilenetv2"
_TIMM = "timm.models._efficientnet_blocks"
_TIMM_NETWORK = "timm.models.efficientnet"
_HUGGING_FACE = "transformers.models.mobilenet_v2.modeling_mobilenet_v2"

OWNERS: dict[str, Owner] = {
    "torch.nn.modules.container.Sequential.forward": Owner(read_sequence, opened=True),
    f"{_TORCHVISION}.InvertedResidual.forward": Owner(read_torchvision_block),
    f"{_TORCHVISION}.MobileNetV2.forward": Owner(read_torchvision_model, opened=True, calls=("_forward_impl",)),
    f"{_TIMM}.InvertedResidual.forward": Owner(read_timm_block),
    f"{_TIMM}.DepthwiseSeparableConv.forward": Owner(read_timm_separable),
    f"{_TIMM_NETWORK}.EfficientNet.forward": Owner(
        read_timm_model, opened=True, calls=("forward_features", "forward_head")
    ),
    f"{_TIMM_NETWORK}.EfficientNetFeatures.forward": Owner(read_timm_features, opened=True),
    f"{_HUGGING_FACE}.MobileNetV2InvertedResidual.forward": Owner(read_hugging_face_block),
    f"{_HUGGING_FACE}.MobileNetV2Stem.forward": Owner(read_hugging_face_stem),
}
