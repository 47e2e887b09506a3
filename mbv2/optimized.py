"""A trained network packed for inference on a CPU: BatchNorm folded, one compiled call from picture to logits."""

from typing import Any

import torch
from torch import Tensor, nn

from mbv2.kernels import cpu_network
from mbv2.model import MobileNetV2


class OptimizedMobileNetV2(nn.Module):
    """What `optimize_for_inference` returns: float32 pictures on the CPU to logits, without gradients.

    It holds a copy of the weights; later changes of the model it was made from do not reach it. It can be pickled
    and copied, and packs itself anew for the machine it is loaded on.

    Attributes:
        num_classes: all logits, an extra class included.
        class_offset: index of the first real class.
        isa: the instruction set it is packed for: avx512, avx2 or portable.
    """

    def __init__(self, model: MobileNetV2) -> None:
        super().__init__()
        self.num_classes = model.num_classes
        self.class_offset = model.class_offset
        self._blocks = _shapes(model)
        self._turns_picture = model.turns_picture
        self._last_channels = model.last_channel
        self._folded = _fold(model)
        self._pack()
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised, NCHW or channels_last -> logits [N, num_classes].

        Raises:
            RuntimeError: gradients are wanted for `x`, or `x` is not a float32 picture on the CPU.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError(
                "an optimized network has no gradients: use torch.no_grad(), or the model it was made from"
            )
        if self._turns_picture:
            x = x.flip(2, 3)
        return torch.ops.mbv2.cpu_network(x, self._packed, self._plan, self.num_classes, self.isa)

    def train(self, mode: bool = True) -> "OptimizedMobileNetV2":
        """Stay in evaluation mode.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError("an optimized network cannot be trained: train the model it was made from")
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_plan", "isa")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedMobileNetV2":
        changed = fn(self._folded[0])
        if changed.dtype != torch.float32 or changed.device.type != "cpu":
            raise RuntimeError("an optimized network stays in float32 on the CPU: move the model it was made from")
        return self

    def _pack(self) -> None:
        network = cpu_network.pack(self._folded, self._blocks, self._last_channels, self.num_classes)
        self._packed, self._plan, self.isa = network.packed, network.plan, network.isa


def optimize_for_inference(model: MobileNetV2) -> OptimizedMobileNetV2:
    """Fold BatchNorm, pack the weights for this CPU, and return a module that runs the network in one call.

    Args:
        model: an `mbv2.MobileNetV2` in evaluation mode, float32, on the CPU.

    Raises:
        TypeError: another kind of model.
        ValueError: the model is in training mode, not float32 or not on the CPU.
        mbv2.kernels.BackendError: this installation has no compiled kernels, or `MBV2_CPU_ISA` cannot be run here.
    """
    if not isinstance(model, MobileNetV2):
        raise TypeError(f"optimize_for_inference takes an mbv2.MobileNetV2, not {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ValueError(
                f"the optimized network is float32 on the CPU, but {name} is {tensor.dtype} on {tensor.device}; "
                "call model.float().cpu() first"
            )
    return OptimizedMobileNetV2(model)


def _shapes(model: MobileNetV2) -> list[cpu_network.BlockShape]:
    return [
        cpu_network.BlockShape(
            project.weight.shape[1] if expand is None else expand.weight.shape[1],
            project.weight.shape[1],
            project.weight.shape[0],
            block.stride,
            block.use_res_connect,
        )
        for block in model.features[1:-1]
        for expand, _, project in [block.stages()]
    ]


@torch.no_grad()
def _fold(model: MobileNetV2) -> list[Tensor]:
    stages = [model.features[0].stage()]
    for block in model.features[1:-1]:
        stages += [stage for stage in block.stages() if stage is not None]
    stages.append(model.features[-1].stage())
    folded = []
    for weight, bn in stages:
        # In float64 so that folding adds no error of its own.
        scale = torch.rsqrt(bn.running_var.double() + bn.eps)
        scale = scale if bn.weight is None else scale * bn.weight.double()
        shift = -bn.running_mean.double() * scale
        shift = shift if bn.bias is None else shift + bn.bias.double()
        folded += [(weight.double() * scale.view(-1, 1, 1, 1)).float().contiguous(), shift.float()]
    classifier = model.classifier[-1]
    return [*folded, classifier.weight.detach().clone(), classifier.bias.detach().clone()]
