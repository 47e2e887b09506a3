"""A trained network made ready for inference on a GPU: BatchNorm folded once, one operator call a block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mbv2.folding import folded
from mbv2.kernels import fused  # noqa: F401  registers the operators
from mbv2.model import MobileNetV2

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class OptimizedCudaMobileNetV2(nn.Module):
    """What `optimize_for_inference` returns for a model on a GPU: pictures to logits, without gradients.

    It holds folded copies of the weights as buffers; later changes of the model it was made from do not reach it. A
    block is one operator: one launch of the fused kernel in CUDA C++ where it is compiled and takes the block, else
    what the next backend makes of it. Nothing in it waits for the GPU or asks a driver for memory, so after a first
    call it can be captured in a CUDA graph, and `torch.compile` sees a chain of known operators.

    Attributes:
        num_classes: all logits, an extra class included.
        num_real_classes: the logits without the extra class.
        class_offset: index of the first real class.
    """

    def __init__(self, model: MobileNetV2) -> None:
        super().__init__()
        self.num_classes = model.num_classes
        self.num_real_classes = model.num_real_classes
        self.class_offset = model.class_offset
        self._blocks = [(block.stride, block.use_res_connect) for block in model.features[1:-1]]
        self._turns_picture = model.turns_picture
        self._stem_stride = model.features[0][0].stride[0]
        stages = [("stem", model.features[0].stage()), ("head", model.features[-1].stage())]
        for index, block in enumerate(model.features[1:-1]):
            names = ("expand", "depthwise", "project")
            stages += [(f"{name}{index}", stage) for name, stage in zip(names, block.stages(), strict=True)]
        for name, stage in stages:
            # The first block has no expansion; a buffer of None for it would trip torch.export.
            if stage is not None:
                weight, bias = folded(*stage)
                self.register_buffer(f"{name}_weight", weight)
                self.register_buffer(f"{name}_bias", bias)
        self.register_buffer("classifier_weight", model.classifier[-1].weight.detach().clone())
        self.register_buffer("classifier_bias", model.classifier[-1].bias.detach().clone())
        self.eval()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Images [N, 3, H, W], normalised, in the model's type on its device -> logits [N, num_classes].

        channels_last input needs no copy. Gradients end here.
        """
        if self._turns_picture:
            x = x.flip(2, 3)
        x = torch.ops.mbv2.stem_folded(x, self.stem_weight, self.stem_bias, self._stem_stride)
        for index, (stride, residual) in enumerate(self._blocks):
            parts = [getattr(self, f"{name}{index}_{part}", None) for name in _STAGES for part in ("weight", "bias")]
            x = torch.ops.mbv2.inverted_residual(x, *parts, stride, residual)
        x = torch.ops.mbv2.head_folded(x, self.head_weight, self.head_bias)
        return F.linear(x, self.classifier_weight, self.classifier_bias)

    def real_logits(self, logits: Tensor) -> Tensor:
        """[N, num_classes] -> [N, num_real_classes], as `MobileNetV2.real_logits`."""
        return logits[:, self.class_offset : self.class_offset + self.num_real_classes]

    def targets(self, labels: Tensor) -> Tensor:
        """Labels counted from 0 over the real classes -> indices of the logits, as `MobileNetV2.targets`."""
        return labels + self.class_offset

    def train(self, mode: bool = True) -> "OptimizedCudaMobileNetV2":
        """Stay in evaluation mode.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError("an optimized network cannot be trained: train the model it was made from")
        return super().train(False)

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedCudaMobileNetV2":
        if fn(self.stem_weight[:0]).dtype != self.stem_weight.dtype:
            raise RuntimeError("an optimized network keeps its type: convert the model it was made from")
        return super()._apply(fn, recurse)


_STAGES = ("expand", "depthwise", "project")


def check(model: MobileNetV2) -> None:
    """See that a model can be optimized for the GPU it is on.

    Raises:
        ValueError: its convolutions are of a type without kernels or of several, or not all of it is on one GPU.
    """
    tensors = [*model.named_parameters(), *model.named_buffers()]
    devices = {tensor.device for _, tensor in tensors}
    if len(devices) > 1:
        raise ValueError(
            f"the model is spread over {', '.join(sorted(map(str, devices)))}; move it to one device first"
        )
    dtypes = {name: weight.dtype for name, weight in model.named_parameters() if weight.dim() > 1}
    if len(set(dtypes.values())) > 1 or next(iter(dtypes.values())) not in DTYPES:
        raise ValueError(
            "the optimized network is float16, bfloat16 or float32 throughout, but the model's weights are "
            f"{', '.join(sorted({str(dtype) for dtype in dtypes.values()}))}"
        )
