"""The network in torch's own modules, BatchNorm folded, for exporters: no operator of ours is in it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbv2.kernels import ConvBN
from mbv2.model import MobileNetV2


class PaddedConv(nn.Module):
    """Convolution with bias after padding that may be uneven: what TensorFlow's SAME is at a given size."""

    def __init__(self, weight: Tensor, bias: Tensor, stride: int, groups: int, pads: tuple[int, int]) -> None:
        super().__init__()
        outputs, inputs, kernel, _ = weight.shape
        before, after = pads
        self.pads = [0, 0, 0, 0] if before == after else [before, after, before, after]
        padding = before if before == after else 0
        self.conv = nn.Conv2d(inputs * groups, outputs, kernel, stride, padding, groups=groups)
        self.conv.weight.data.copy_(weight)
        self.conv.bias.data.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """[N, in, H, W] -> [N, out, ceil(H / stride), ceil(W / stride)]."""
        return self.conv(F.pad(x, self.pads) if any(self.pads) else x)


class PlainBlock(nn.Module):
    """Expand, depthwise, project, and the shortcut."""

    def __init__(self, stages: list[nn.Module], residual: bool) -> None:
        super().__init__()
        self.stages = nn.Sequential(*stages)
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] -> [N, outputs, H', W']."""
        out = self.stages(x)
        return x + out if self.residual else out


class PlainNetwork(nn.Module):
    """`model` for evaluation at one resolution: the same logits to float32 rounding.

    Args:
        model: in float32.
        resolution: side of the square input; SAME padding depends on it.
    """

    def __init__(self, model: MobileNetV2, resolution: int) -> None:
        super().__init__()
        same, side = model.padding == "same", resolution

        def pads(stride: int) -> tuple[int, int]:
            return (0, 1) if same and stride == 2 and side % 2 == 0 else (1, 1)

        stem = model.features[0]
        layers: list[nn.Module] = [_conv(_upright(stem.stage(), model), 2, 1, pads(2)), nn.ReLU6()]
        side = -(-side // 2)
        for block in model.features[1:-1]:
            expand, depthwise, project = block.stages()
            steps = [] if expand is None else [_conv(expand, 1, 1, (0, 0)), nn.ReLU6()]
            channels = depthwise.weight.shape[0]
            steps += [_conv(_upright(depthwise, model), block.stride, channels, pads(block.stride)), nn.ReLU6()]
            steps.append(_conv(project, 1, 1, (0, 0)))
            layers.append(PlainBlock(steps, block.use_res_connect))
            side = -(-side // block.stride)
        layers += [_conv(model.features[-1].stage(), 1, 1, (0, 0)), nn.ReLU6()]
        self.features = nn.Sequential(*layers)
        last = model.classifier[-1]
        self.classifier = nn.Linear(last.in_features, last.out_features)
        self.classifier.load_state_dict(last.state_dict())
        self.eval().requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, resolution, resolution], normalised -> logits [N, num_classes]."""
        return self.classifier(self.features(x).mean((2, 3)))


def _upright(stage: ConvBN, model: MobileNetV2) -> ConvBN:
    """The stages of a SAME network hand their 3x3 weights out turned; here nothing turns the picture."""
    return stage._replace(weight=stage.weight.flip(2, 3)) if model.turns_picture else stage


@torch.no_grad()
def _conv(stage: ConvBN, stride: int, groups: int, pads: tuple[int, int]) -> PaddedConv:
    bn = stage.bn
    # In float64 so that folding adds no error of its own.
    scale = bn.weight.double() * torch.rsqrt(bn.running_var.double() + bn.eps)
    bias = bn.bias.double() - bn.running_mean.double() * scale
    weight = stage.weight.double() * scale.view(-1, 1, 1, 1)
    return PaddedConv(weight.float(), bias.float(), stride, groups, pads)
