"""The modules a pattern is made of: which convolutions, BatchNorms and activations the operators can stand for.

Everything is read from the modules' types and attributes as they are now. A type is known by its full name, so that
timm, transformers and torchvision are not imported for it; a subclass may compute anything and is not known.
"""

from typing import NamedTuple

from torch import nn

from mbv2 import kernels

_CONV = "torch.nn.modules.conv.Conv2d"
_CONV_SAME = "timm.layers.conv2d_same.Conv2dSame"
_BATCH_NORMS = ("torch.nn.modules.batchnorm.BatchNorm2d", "torch.nn.modules.batchnorm.SyncBatchNorm")
_FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d", "timm.layers.norm_act.FrozenBatchNormAct2d")
# BatchNorms that apply their attributes `drop` and `act`.
_WITH_ACTIVATION = (
    "timm.layers.norm_act.BatchNormAct2d",
    "timm.layers.norm_act.SyncBatchNormAct",
    "timm.layers.norm_act.FrozenBatchNormAct2d",
)
_RELU6 = ("torch.nn.modules.activation.ReLU6", "torch.nn.modules.activation.Hardtanh")
_IDENTITY = "torch.nn.modules.linear.Identity"


class Mismatch(NamedTuple):
    """Why something is not what the operators compute.

    Attributes:
        module: the one at fault, None for the whole.
        why: a clause about it.
        passing: only in the present mode; a swapped forward would match in evaluation.
    """

    module: nn.Module | None
    why: str
    passing: bool = False


class Stage(NamedTuple):
    """A convolution and the BatchNorm after it.

    Attributes:
        same: the convolution pads as TensorFlow's SAME does, which at stride 2 is not padding 1.
        relu6: the BatchNorm's module applies ReLU6 as well.
    """

    conv: nn.Module
    norm: nn.Module
    same: bool
    relu6: bool

    def tensors(self) -> kernels.ConvBN:
        """The stage as the operators take it, in the BatchNorm's present mode."""
        norm = self.norm
        if isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm):
            return kernels.ConvBN(self.conv.weight, kernels.BatchNorm.of(norm))
        frozen = kernels.BatchNorm(
            norm.weight, norm.bias, norm.running_mean, norm.running_var, None, 0.0, norm.eps, False, False
        )
        return kernels.ConvBN(self.conv.weight, frozen)


def type_name(module: nn.Module) -> str:
    """The full name of a module's type."""
    cls = type(module)
    return cls.__module__ + "." + cls.__qualname__


def watched(module: nn.Module) -> bool:
    """Whether a call of this module does more than its forward: hooks (pruning and old weight norm are hooks too), or
    a forward put on the instance.
    """
    state = module.__dict__
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


def stage(conv: nn.Module, norm: nn.Module, kernel: int, stride: int, groups: int, same: bool) -> Stage | Mismatch:
    """A convolution and a BatchNorm as a stage.

    Args:
        conv: expected to be bias-free, `kernel` x `kernel`, with `groups` groups, strides up to `stride`.
        norm: expected to be a BatchNorm, frozen or not.
        same: whoever calls the convolution pads its input as TensorFlow does, so that it does not pad itself.
    """
    name = type_name(conv)
    if name not in (_CONV, _CONV_SAME):
        return Mismatch(conv, f"is {a(conv)}, not a plain Conv2d")
    if watched(conv):
        return Mismatch(conv, "has hooks, which only the original forward calls")
    why = _why_not_conv(conv, kernel, stride, groups, 0 if same or name == _CONV_SAME else kernel // 2)
    if why is not None:
        return Mismatch(conv, why)
    relu6 = _relu6_inside(norm)
    if isinstance(relu6, Mismatch):
        return relu6
    return Stage(conv, norm, same or name == _CONV_SAME, relu6)


def relu6(module: nn.Module) -> Mismatch | None:
    """None if `module` is ReLU6, else what it is."""
    if type_name(module) not in _RELU6:
        return Mismatch(module, f"is {a(module)} where the block has ReLU6")
    if module.min_val != 0 or module.max_val != 6:
        return Mismatch(module, f"clamps to [{module.min_val}, {module.max_val}], not [0, 6]")
    return Mismatch(module, "has hooks, which only the original forward calls") if watched(module) else None


def is_identity(module: nn.Module) -> bool:
    """Whether `module` passes its input through and nobody watches it."""
    return type_name(module) == _IDENTITY and not watched(module)


def a(module: nn.Module) -> str:
    """The module's class with its article."""
    name = type(module).__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _why_not_conv(conv: nn.Conv2d, kernel: int, stride: int, groups: int, padding: int) -> str | None:
    if conv.kernel_size != (kernel, kernel):
        return f"is a {conv.kernel_size[0]}x{conv.kernel_size[1]} convolution, not {kernel}x{kernel}"
    if conv.bias is not None:
        return "has a bias"
    if conv.dilation != (1, 1):
        return f"is dilated by {conv.dilation[0]}"
    if conv.groups != groups:
        return f"has {conv.groups} groups, not {groups}"
    if conv.stride not in ((1, 1), (stride, stride)):
        return f"has stride {conv.stride[0]}x{conv.stride[1]}"
    if conv.padding_mode != "zeros":
        return f"has padding mode {conv.padding_mode}"
    # torch's own "same" is symmetric, as it takes stride 1 only.
    given = {"same": (kernel // 2,) * 2, "valid": (0, 0)}.get(conv.padding, conv.padding)
    return None if given == (padding, padding) else f"has padding {conv.padding}, not {padding}"


def _relu6_inside(norm: nn.Module) -> bool | Mismatch:
    name = type_name(norm)
    if name not in _BATCH_NORMS and name not in _FROZEN and name not in _WITH_ACTIVATION:
        return Mismatch(norm, f"is {a(norm)} where the block has a BatchNorm")
    if watched(norm):
        return Mismatch(norm, "has hooks, which only the original forward calls")
    if name not in _WITH_ACTIVATION:
        return False
    # timm's SyncBatchNormAct has both only if timm's own conversion made it.
    drop, act = getattr(norm, "drop", None), getattr(norm, "act", None)
    if drop is not None and not is_identity(drop):
        return Mismatch(norm, f"applies {a(drop)}")
    if act is None or is_identity(act):
        return False
    why = relu6(act)
    return True if why is None else why
