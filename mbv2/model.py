"""MobileNetV2 as a torch module whose blocks are single calls into `mbv2.kernels`."""

import torch
from torch import Tensor, nn

from mbv2 import kernels

# t (expansion), c (channels), n (repeats), s (stride): table 2 of arXiv 1801.04381.
_BLOCKS = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)

PADDINGS = ("symmetric", "same")


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round channels to a multiple of `divisor`, never more than 10% down (TF-slim's and torchvision's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ConvBNReLU6(nn.Sequential):
    """Convolution, BatchNorm, ReLU6 under torchvision's names 0, 1, 2: the stem, the head, and a block's parts.

    Attributes:
        turned: the operators see pictures turned by 180 degrees, and so get the 3x3 weights turned as well.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        stride: int = 1,
        groups: int = 1,
        turned: bool = False,
        bn_eps: float = 1e-5,
        initialise: bool = True,
    ) -> None:
        super().__init__(
            _convolution(inputs, outputs, kernel, stride, groups, initialise),
            nn.BatchNorm2d(outputs, eps=bn_eps),
            nn.ReLU6(),
        )
        self.turned = turned and kernel > 1

    def stage(self) -> kernels.ConvBN:
        """This stage's tensors, as the operators take them."""
        conv, norm, _ = self
        weight = conv.weight.flip(2, 3) if self.turned else conv.weight
        return kernels.ConvBN(weight, kernels.BatchNorm.of(norm))


class InvertedResidual(nn.Module):
    """One block; parameters live in `conv` under torchvision's names, the arithmetic in one operator.

    Hooks on the modules inside do not fire, as they are read, not called.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        expand_ratio: int,
        turned: bool = False,
        bn_eps: float = 1e-5,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        hidden = round(inputs * expand_ratio)
        self.stride = stride
        self.use_res_connect = stride == 1 and inputs == outputs
        stages: list[nn.Module] = (
            [] if expand_ratio == 1 else [ConvBNReLU6(inputs, hidden, 1, bn_eps=bn_eps, initialise=initialise)]
        )
        stages.append(ConvBNReLU6(hidden, hidden, 3, stride, hidden, turned, bn_eps, initialise))
        project = _convolution(hidden, outputs, 1, initialise=initialise)
        self.conv = nn.Sequential(*stages, project, nn.BatchNorm2d(outputs, eps=bn_eps))

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        return kernels.inverted_residual(x, *self.stages(), self.stride, self.use_res_connect)

    def stages(self) -> tuple[kernels.ConvBN | None, kernels.ConvBN, kernels.ConvBN]:
        """The tensors of expand (None without expansion), depthwise and project, as the operator takes them."""
        *expand, depthwise, project, project_bn = self.conv
        return (
            expand[0].stage() if expand else None,
            depthwise.stage(),
            kernels.ConvBN(project.weight, kernels.BatchNorm.of(project_bn)),
        )


class Stem(ConvBNReLU6):
    """The first 3x3 convolution, stride 2."""

    def forward(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] -> [N, outputs, ceil(H / 2), ceil(W / 2)]."""
        return kernels.stem(x, self.stage(), self[0].stride[0])


class MobileNetV2(nn.Module):
    """MobileNetV2 (Sandler et al. 2018) with torchvision's parameter names and shapes.

    Args:
        num_classes: all logits, an extra class included.
        width_mult: width multiplier (alpha), > 0.
        dropout: probability before the classifier.
        class_offset: index of the first real class: 0, or 1 when logit 0 is a background class (TF).
            1001 classes with offset 0 is MindSpore's layout, whose last logit is unused.
        padding: "symmetric" is one pixel on all sides (torchvision, timm, MindSpore). "same" is TensorFlow's SAME
            (TF, Keras, Hugging Face), which pads an even picture under stride 2 at the bottom and right only.
        bn_eps: added to the variance by every BatchNorm; 1e-3 in TensorFlow's networks.
        initialise: draw random weights (He's normal ones by fan-out, torchvision's choice); False leaves what
            memory held in convolutions and classifier, for weights that are loaded right after.

    The operators know symmetric padding only. SAME is symmetric padding of the picture turned by 180 degrees under
    weights turned likewise, for every size and stride: the model turns the picture once, its stages hand out turned
    3x3 weights, and the pooling undoes the rest. The parameters themselves keep their orientation.

    Raises:
        ValueError: a count, width, offset, padding or epsilon that makes no network.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        width_mult: float = 1.0,
        dropout: float = 0.2,
        class_offset: int = 0,
        padding: str = "symmetric",
        bn_eps: float = 1e-5,
        initialise: bool = True,
    ) -> None:
        super().__init__()
        if num_classes < 1 or not width_mult > 0 or class_offset not in (0, 1) or num_classes <= class_offset:
            raise ValueError(
                f"no such MobileNetV2: num_classes {num_classes} (at least 1 beyond class_offset), "
                f"width_mult {width_mult} (> 0), class_offset {class_offset} (0 or 1)"
            )
        if padding not in PADDINGS or not 0 < bn_eps < 1:
            raise ValueError(
                f"no such MobileNetV2: padding {padding!r} ({' or '.join(PADDINGS)}), bn_eps {bn_eps} (0 < bn_eps < 1)"
            )
        self.padding = padding
        self.bn_eps = bn_eps
        self.num_classes = num_classes
        self.width_mult = width_mult
        self.class_offset = class_offset
        channels = make_divisible(32 * width_mult)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult))
        features: list[nn.Module] = [Stem(3, channels, 3, 2, 1, self.turns_picture, bn_eps, initialise)]
        for expand_ratio, base, repeats, stride in _BLOCKS:
            outputs = make_divisible(base * width_mult)
            for index in range(repeats):
                step = stride if index == 0 else 1
                features.append(
                    InvertedResidual(channels, outputs, step, expand_ratio, self.turns_picture, bn_eps, initialise)
                )
                channels = outputs
        features.append(ConvBNReLU6(channels, self.last_channel, 1, bn_eps=bn_eps, initialise=initialise))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), _linear(self.last_channel, num_classes, initialise))

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised -> logits [N, num_classes]."""
        if self.turns_picture:
            x = x.flip(2, 3)
        for stage in self.features[:-1]:
            x = stage(x)
        return self.classifier(kernels.head(x, self.features[-1].stage()))

    @property
    def turns_picture(self) -> bool:
        """Whether the stages expect the picture turned by 180 degrees, which is how SAME padding is done."""
        return self.padding == "same"

    @property
    def num_real_classes(self) -> int:
        """Classes that a picture can have: the logits without the extra class."""
        if self.class_offset == 0 and self.num_classes == 1001:
            return 1000
        return self.num_classes - self.class_offset

    def real_logits(self, logits: Tensor) -> Tensor:
        """[N, num_classes] -> [N, num_real_classes]: the extra class takes no part in top-k."""
        return logits[:, self.class_offset : self.class_offset + self.num_real_classes]

    def targets(self, labels: Tensor) -> Tensor:
        """Labels counted from 0 over the real classes -> indices of the logits, for the loss."""
        return labels + self.class_offset


class _UndrawnConv2d(nn.Conv2d):
    def reset_parameters(self) -> None:
        pass


class _UndrawnLinear(nn.Linear):
    def reset_parameters(self) -> None:
        pass


def _convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, initialise: bool = True
) -> nn.Conv2d:
    """A torch.nn.Conv2d without bias, padded by half the kernel; its weight as `MobileNetV2` says.

    torch's own would draw weights first, which takes longer than drawing ours, to be thrown away.
    """
    conv = _UndrawnConv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)
    conv.__class__ = nn.Conv2d
    if initialise:
        nn.init.kaiming_normal_(conv.weight, mode="fan_out")
    return conv


def _linear(inputs: int, outputs: int, initialise: bool) -> nn.Linear:
    """A torch.nn.Linear, likewise."""
    linear = _UndrawnLinear(inputs, outputs)
    linear.__class__ = nn.Linear
    if initialise:
        nn.init.normal_(linear.weight, 0, 0.01)
        nn.init.zeros_(linear.bias)
    return linear


def as_channels_last(model: nn.Module) -> nn.Module:
    """Put the model's 4-d parameters into channels_last, the layout its operators work in."""
    return model.to(memory_format=torch.channels_last)


def share_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every BatchNorm take its training statistics over all processes (SyncBN), on CPUs as well as GPUs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.shares_statistics = True
    return model
