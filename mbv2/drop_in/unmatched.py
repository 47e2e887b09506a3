"""Why a module keeps its own forward: what is known of other networks' blocks, and depthwise convolutions left over."""

from torch import nn

from mbv2.drop_in.leaves import Mismatch
from mbv2.drop_in.owners import flat, is_sequence, read_sequence
from mbv2.drop_in.patterns import block_at
from mbv2.drop_in.swap import Accelerated

OURS = "is mbv2's own and runs in one operator already"

# By forward: modules that are never swapped, nor anything in them.
FOREIGN = {
    "mbv2.model.InvertedResidual.forward": OURS,
    "mbv2.model.Stem.forward": OURS,
    "torchvision.models.mobilenetv3.InvertedResidual.forward": (
        "is MobileNetV3's block: its hard-swish or ReLU and its squeeze-and-excitation are not in the kernels"
    ),
    "torchvision.models.quantization.mobilenetv2.QuantizableMobileNetV2.forward": (
        "is made for quantisation, whose fuse_model() goes by the classes that a swap would change; "
        "torchvision.models.mobilenet_v2 is the same network without it"
    ),
    "timm.models._efficientnet_blocks.UniversalInvertedResidual.forward": (
        "is MobileNetV4's block, which has other depthwise convolutions and ReLU"
    ),
    "timm.models._efficientnet_blocks.EdgeResidual.forward": "has a dense convolution where the block has a depthwise",
}

_UNPOOLED = "its output is used unpooled as well, and the operator for a head gives the average only"
_APART = "its convolution and BatchNorm are called one by one by the model; no module that holds both can be swapped"

# By forward of the owner, then by name: said if the owner holds blocks that were swapped.
NOTES: dict[str, dict[str, str]] = {
    "timm.models._features.FeatureDictNet.forward": {"conv_stem": _APART},
    "timm.models._features.FeatureListNet.forward": {"conv_stem": _APART},
    "transformers.models.mobilenet_v2.modeling_mobilenet_v2.MobileNetV2Model.forward": {"conv_1x1": _UNPOOLED},
}

# By forward of the owner: the child of which it calls another method than its forward, so that swapping that is no use.
OTHERWISE_CALLED = {"timm.models._features.FeatureGetterNet.forward": "model"}


def why_depthwise_stays(module: nn.Module) -> str | None:
    """A reason for the first depthwise convolution that `module` calls outside fused steps; None if there is none.

    Convolutions are looked for among its children and in Sequentials below, as deeper owners are asked themselves.
    """
    for leaves in _runs(module):
        for at, leaf in enumerate(leaves):
            if _is_depthwise(leaf):
                return _why(leaves, at) if len(leaves) > 1 else f"its forward, {_forward_of(module)}, is not known"
    return None


def _runs(module: nn.Module) -> list[list[nn.Module]]:
    """What is called in order, as far as it is known: each Sequential's leaves, and each other child alone."""
    if isinstance(module, Accelerated):
        # Everything that is known of it is fused.
        steps = read_sequence(module) if isinstance(module, nn.Sequential) else []
        return [] if isinstance(steps, Mismatch) else [[s] for s in steps if isinstance(s, nn.Module)]
    if is_sequence(module):
        return [flat(module)]
    runs = []
    for child in module.children():
        runs += _runs(child) if isinstance(child, nn.Sequential) else [[child]]
    return runs


def _is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def _why(leaves: list[nn.Module], at: int) -> str:
    """What is wrong with the block around a depthwise convolution."""
    expanded = at >= 3 and isinstance(leaves[at - 3], nn.Conv2d) and leaves[at - 3].kernel_size == (1, 1)
    found = block_at(leaves, at - 3 if expanded else at, False)
    if not isinstance(found, Mismatch):
        return "its parts make a block, but something around them was matched first"
    return found.why if found.module is None else f"the {type(found.module).__name__} {found.why}"


def _forward_of(module: nn.Module) -> str:
    return type(module).forward.__qualname__
