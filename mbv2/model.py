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


def make_divisible(value: float, divisor: int = 8) -> int:
    """Round channels to a multiple of `divisor`, never more than 10% down (TF-slim's and torchvision's rule)."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


class ConvBNReLU6(nn.Sequential):
    """Convolution, BatchNorm, ReLU6 under torchvision's names 0, 1, 2: the stem, the head, and a block's parts."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU6(),
        )

    def stage(self) -> kernels.ConvBN:
        """This stage's tensors, as the operators take them."""
        return kernels.ConvBN(self[0].weight, kernels.BatchNorm.of(self[1]))


class InvertedResidual(nn.Module):
    """One block; parameters live in `conv` under torchvision's names, the arithmetic in one operator.

    Hooks on the modules inside do not fire, as they are read, not called.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expand_ratio: int) -> None:
        super().__init__()
        hidden = round(inputs * expand_ratio)
        self.stride = stride
        self.use_res_connect = stride == 1 and inputs == outputs
        stages: list[nn.Module] = [] if expand_ratio == 1 else [ConvBNReLU6(inputs, hidden, 1)]
        stages.append(ConvBNReLU6(hidden, hidden, 3, stride, groups=hidden))
        self.conv = nn.Sequential(*stages, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

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

    Raises:
        ValueError: a count, width or offset that makes no network.
    """

    def __init__(
        self, num_classes: int = 1000, width_mult: float = 1.0, dropout: float = 0.2, class_offset: int = 0
    ) -> None:
        super().__init__()
        if num_classes < 1 or not width_mult > 0 or class_offset not in (0, 1) or num_classes <= class_offset:
            raise ValueError(
                f"no such MobileNetV2: num_classes {num_classes} (at least 1 beyond class_offset), "
                f"width_mult {width_mult} (> 0), class_offset {class_offset} (0 or 1)"
            )
        self.num_classes = num_classes
        self.width_mult = width_mult
        self.class_offset = class_offset
        channels = make_divisible(32 * width_mult)
        self.last_channel = make_divisible(1280 * max(1.0, width_mult))
        features: list[nn.Module] = [Stem(3, channels, 3, 2)]
        for expand_ratio, base, repeats, stride in _BLOCKS:
            outputs = make_divisible(base * width_mult)
            for index in range(repeats):
                features.append(InvertedResidual(channels, outputs, stride if index == 0 else 1, expand_ratio))
                channels = outputs
        features.append(ConvBNReLU6(channels, self.last_channel, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(dropout), nn.Linear(self.last_channel, num_classes))
        self.apply(_initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised -> logits [N, num_classes]."""
        for stage in self.features[:-1]:
            x = stage(x)
        return self.classifier(kernels.head(x, self.features[-1].stage()))

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


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, 0, 0.01)
        nn.init.zeros_(module.bias)


def as_channels_last(model: nn.Module) -> nn.Module:
    """Put the model's 4-d parameters into channels_last, the layout its operators work in."""
    return model.to(memory_format=torch.channels_last)


def share_batch_statistics(model: nn.Module) -> nn.Module:
    """Make every BatchNorm take its training statistics over all processes (SyncBN), on CPUs as well as GPUs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.shares_statistics = True
    return model
