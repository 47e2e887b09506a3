"""A trained network packed for inference on a CPU: BatchNorm folded, one compiled call from picture to logits."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mbv2.errors import UserError
from mbv2.folding import scale_and_shift
from mbv2.kernels import BackendError, cpu_network
from mbv2.model import MobileNetV2

FORMATS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.int8: "int8"}


class OptimizedMobileNetV2(nn.Module):
    """What `optimize_for_inference` returns: float32 pictures on the CPU to float32 logits, without gradients.

    It holds a copy of the weights; later changes of the model it was made from do not reach it. It can be pickled
    and copied, and packs itself anew for the machine it is loaded on.

    Attributes:
        num_classes: all logits, an extra class included.
        num_real_classes: the logits without the extra class.
        class_offset: index of the first real class.
        dtype: what it computes in: torch.float32, torch.bfloat16 (with float32 sums) or torch.int8.
        isa: the instruction set it is packed for: avx512, avx2 or portable.
    """

    def __init__(
        self,
        model: MobileNetV2,
        dtype: torch.dtype = torch.float32,
        calibration: Tensor | Iterable[Tensor] | str | Path | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = model.num_classes
        self.num_real_classes = model.num_real_classes
        self.class_offset = model.class_offset
        self._blocks = block_shapes(model)
        self._turns_picture = model.turns_picture
        self._last_channels = model.last_channel
        self.dtype = dtype
        self._format = FORMATS[dtype]
        if dtype == torch.int8:
            assert calibration is not None
            self._folded = int8_numbers(model, calibration)
        else:
            self._folded = fold(model)
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
        return torch.ops.mbv2.cpu_network(x, self._packed, self._plan, self.num_classes, self.isa, self._format)

    def real_logits(self, logits: Tensor) -> Tensor:
        """[N, num_classes] -> [N, num_real_classes], as `MobileNetV2.real_logits`."""
        return logits[:, self.class_offset : self.class_offset + self.num_real_classes]

    def targets(self, labels: Tensor) -> Tensor:
        """Labels counted from 0 over the real classes -> indices of the logits, as `MobileNetV2.targets`."""
        return labels + self.class_offset

    def train(self, mode: bool = True) -> "OptimizedMobileNetV2":
        """Stay in evaluation mode.

        Raises:
            RuntimeError: training mode is asked for.
        """
        if mode:
            raise RuntimeError("an optimized network cannot be trained: train the model it was made from")
        return super().train(False)

    def __getstate__(self) -> dict[str, Any]:
        kept = {name: value for name, value in self.__dict__.items() if name not in ("_packed", "_plan", "isa")}
        # Pickled one by one, views of one piece of memory would each take all of it along.
        return {**kept, "_folded": [tensor.clone() for tensor in self._folded]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Those that were stored before there was another format say nothing of it.
        self.__dict__.update({"dtype": torch.float32, "_format": "float32", **state})
        self._pack()

    def _apply(self, fn: Any, recurse: bool = True) -> "OptimizedMobileNetV2":
        changed = fn(self._folded[0])
        if changed.dtype != torch.float32 or changed.device.type != "cpu":
            raise RuntimeError(
                f"an optimized network stays in {self._format} on the CPU: move the model it was made from"
            )
        return self

    def _pack(self) -> None:
        network = cpu_network.pack(self._folded, self._blocks, self._last_channels, self.num_classes, self._format)
        self._packed, self._plan, self.isa = network.packed, network.plan, network.isa


def optimize_for_inference(
    model: MobileNetV2,
    dtype: torch.dtype | None = None,
    calibration: Tensor | Iterable[Tensor] | str | Path | None = None,
) -> nn.Module:
    """Fold BatchNorm, pack the weights for the device, and return a module that runs the network fast there.

    Args:
        model: an `mbv2.MobileNetV2` in evaluation mode: float32 on the CPU, or float16, bfloat16 or float32 on a GPU.
        dtype: what a network on the CPU computes in: float32, which is the default; bfloat16, for CPUs with
            AVX512_BF16; or int8. Pictures and logits are float32 in each. A network on a GPU computes in the model's
            type.
        calibration: with int8, some hundred pictures of the kind to be recognised, normalised as they will be: a tensor
            [N, 3, H, W] or batches of that shape. The ranges of 8-bit numbers are measured on the first 200. Or the
            path of a file with the model's weights and its int8 numbers, as `mbv2 export --format int8` writes it.

    Returns:
        An `OptimizedMobileNetV2`, or for a GPU an `mbv2.optimized_cuda.OptimizedCudaMobileNetV2`.

    Raises:
        TypeError: another kind of model.
        ValueError: the model is in training mode, not float32 or not on the CPU, there is no network in `dtype`, or
            int8 is without calibration, calibration without int8 or without pictures.
        mbv2.UserError: the file of `calibration` has no int8 numbers, or those of other weights.
        mbv2.kernels.BackendError: this installation has no compiled kernels, this machine has no instructions for
            `dtype`, or `MBV2_CPU_ISA` cannot be run here.
    """
    if not isinstance(model, MobileNetV2):
        raise TypeError(f"optimize_for_inference takes an mbv2.MobileNetV2, not {type(model).__name__}")
    if any(module.training for module in model.modules()):
        raise ValueError("the model is in training mode; call model.eval() first")
    weight = model.classifier[-1].weight
    if weight.device.type == "cuda":
        from mbv2 import optimized_cuda

        if calibration is not None:
            raise ValueError("only an int8 network is calibrated, and it runs on the CPU: call model.float().cpu()")
        if dtype not in (None, weight.dtype):
            raise ValueError(
                f"on a GPU the optimized network is in the model's type, {weight.dtype}; call model.to({dtype}), or "
                "model.float().cpu() for an int8 network"
            )
        optimized_cuda.check(model)
        return optimized_cuda.OptimizedCudaMobileNetV2(model)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and (tensor.dtype != torch.float32 or tensor.device.type != "cpu"):
            raise ValueError(
                f"the optimized network is float32 on the CPU, but {name} is {tensor.dtype} on {tensor.device}; "
                "call model.float().cpu() first"
            )
    if dtype is not None and dtype not in FORMATS:
        raise ValueError(f"there is no optimized network in {dtype} on the CPU, but in {', '.join(map(str, FORMATS))}")
    if dtype == torch.int8 and calibration is None:
        raise ValueError(
            "an int8 network takes its ranges from pictures: give calibration some hundred normalised ones"
        )
    if dtype != torch.int8 and calibration is not None:
        raise ValueError("only an int8 network is calibrated: give dtype=torch.int8 with calibration")
    return OptimizedMobileNetV2(model, dtype or torch.float32, calibration)


def fastest(
    model: MobileNetV2, device: torch.device, autocast: torch.dtype | None = None
) -> tuple[MobileNetV2 | OptimizedMobileNetV2, str]:
    """What `mbv2 eval` and `mbv2 infer` run, and its name: on a CPU the packed network, unless the environment or
    this installation says otherwise.

    Args:
        model: in evaluation mode or not; it is put into evaluation mode.
        device: where the pictures will be; the model is moved there.
        autocast: the type of mixed precision; the packed network has bfloat16, where the CPU has instructions for it.

    Raises:
        UserError: `MBV2_CPU_ISA` names what this machine cannot run.
    """
    model = model.eval().to(device, memory_format=torch.channels_last)
    asked = os.environ.get("MBV2_BACKEND", "auto")
    if device.type != "cpu":
        return model, f"operators on {device.type}"
    if asked != "auto":
        return model, f"operators one by one, as MBV2_BACKEND={asked}"
    if autocast not in (None, torch.bfloat16):
        return model, "operators one by one, for mixed precision in float16"
    if cpu_network.refusal() is not None:
        return model, "operators one by one, as this installation has no compiled kernels (mbv2 doctor says why)"
    try:
        cpu_network.isa()
    except BackendError as error:
        raise UserError(str(error)) from error
    if autocast is None:
        fast = optimize_for_inference(model)
        return fast, f"one compiled network ({fast.isa})"
    try:
        fast = optimize_for_inference(model, torch.bfloat16)
    except BackendError as error:
        return model, f"operators one by one, for mixed precision ({error})"
    return fast, f"one compiled network in bfloat16 ({fast.isa})"


def int8_numbers(model: MobileNetV2, calibration: Tensor | Iterable[Tensor] | str | Path) -> list[Tensor]:
    """The whole numbers that `model` is computed with in int8, as `cpu_network.pack` takes them.

    Args:
        model: float32 on the CPU, in evaluation mode.
        calibration: see `optimize_for_inference`.

    Raises:
        TypeError, ValueError: no pictures, or weights that int8 cannot hold.
        UserError: no such numbers in the file.
    """
    from mbv2 import int8_file, quantize

    if isinstance(calibration, str | Path):
        return int8_file.read(calibration, model)
    folded, blocks = fold(model), block_shapes(model)
    batches = quantize.pictures_of(calibration)
    if model.turns_picture:
        batches = (batch.flip(2, 3) for batch in batches)
    return quantize.quantize(folded, blocks, quantize.calibrate(folded, blocks, batches))


def block_shapes(model: MobileNetV2) -> list[cpu_network.BlockShape]:
    """The blocks of `model` in order, as `cpu_network.pack` takes them."""
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
def fold(model: MobileNetV2) -> list[Tensor]:
    """Weight and bias of every convolution and of the classifier with BatchNorm folded in, as `cpu_network.pack` takes
    them.
    """
    stages = [model.features[0].stage()]
    for block in model.features[1:-1]:
        stages += [stage for stage in block.stages() if stage is not None]
    stages.append(model.features[-1].stage())
    classifier = model.classifier[-1]
    # By numpy, on this thread: waking torch's thread pool for so little takes longer than the work. And all in one
    # piece of memory, for which numpy asks for large pages.
    room = np.empty(sum(weight.numel() for weight, _ in stages) + classifier.weight.numel(), np.float32)
    folded, begin = [], 0
    for weight, bn in stages:
        scale, shift = scale_and_shift(bn)
        place = room[begin : begin + weight.numel()].reshape(weight.shape)
        np.multiply(weight.detach().numpy(), scale.view(-1, 1, 1, 1).numpy(), out=place, casting="same_kind")
        folded += [torch.from_numpy(place), shift.float()]
        begin += weight.numel()
    last = room[begin:].reshape(classifier.weight.shape)
    last[...] = classifier.weight.detach().numpy()
    return [*folded, torch.from_numpy(last), classifier.bias.detach().clone()]
