"""The stage calls of training and inference of the published variants, on tensors that have shapes and no memory."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import block
from mbv2.kernels.layout import new_channels_last, wide
from mbv2.model import InvertedResidual, MobileNetV2, Stem
from mbv2.zoo import VARIANTS

TRAINING, INFERENCE = "training", "inference"
# Parts of moments and sums as later stages get them; no code depends on the number.
_PARTS = 1024


@dataclass(frozen=True)
class Call:
    """One call of a stage function: its name and arguments."""

    stage: str
    args: tuple[Any, ...]

    @property
    def key(self) -> tuple[Any, ...]:
        """Equal for calls that launch the same code on the same shapes."""
        return self.stage, *((tuple(a.shape), a.dtype) if isinstance(a, Tensor) else a for a in self.args)

    def __str__(self) -> str:
        tensors = [a for a in self.args if isinstance(a, Tensor)]
        shown = ["x".join(map(str, t.shape)) for t in tensors if t.dim() == 4] or [
            "x".join(map(str, t.shape)) for t in tensors[:1]
        ]
        flags = "".join("ny"[a] for a in self.args if isinstance(a, bool))
        numbers = [str(a) for a in self.args if type(a) is int]
        return " ".join([self.stage, *shown, *numbers, flags]).strip()


class _Recorder:
    """Stands in for a backend's stages: notes every call, and gives empty tensors of the right shapes."""

    def __init__(self) -> None:
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            this = Call(stage, args)
            self.calls.setdefault(this.key, this)
            return _results(stage, args)

        return call


def _results(stage: str, args: tuple[Any, ...]) -> Any:
    """What the stage function returns, see kernels/aten.py."""
    first = args[0]
    if stage in ("stem", "expand", "depthwise", "project"):
        stride = args[-1] if isinstance(args[-1], int) else 1
        y = _convolved(first, next(a for a in reversed(args) if isinstance(a, Tensor)), stride)
        return y, _small(first, _PARTS, 3, y.shape[1])
    if stage == "bn_finalize":
        return _small(first, 6, first.shape[-1])
    if stage == "bn_sums":
        return _small(first, _PARTS, 2, first.shape[1])
    if stage == "bn_backward":
        return _small(first, 2, first.shape[-1]), _small(first, 3, first.shape[-1])
    if stage == "project_backward":
        return args[4], _small(first, _PARTS, 2, args[4].shape[1]), args[3]
    if stage == "depthwise_backward":
        return args[3], None if args[4] is None else _small(first, _PARTS, 2, first.shape[1]), args[5]
    if stage == "expand_backward":
        return args[4], args[3]
    if stage == "stem_backward":
        return args[4], args[5]
    if stage == "pool_backward":
        return args[1], _small(first, _PARTS, 2, first.shape[1])
    if stage in ("bn_relu6_pool", "head_folded"):
        return first.new_empty((first.shape[0], first.shape[1] if stage == "bn_relu6_pool" else args[1].shape[0]))
    if stage == "stem_folded":
        return _convolved(first, args[1], args[3])
    if stage == "inverted_residual_folded":
        return _convolved(first, args[5], args[7])
    assert stage == "bn_apply", stage
    return first


def _convolved(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    n, _, h, w = x.shape
    return new_channels_last(x, (n, weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1))


def _small(like: Tensor, *shape: int) -> Tensor:
    return like.new_empty(shape, dtype=wide(like.dtype))


def calls(
    alpha: float, resolution: int, batch: int, dtype: torch.dtype, phases: tuple[str, ...] = (TRAINING, INFERENCE)
) -> list[Call]:
    """Distinct stage calls of one training step, then of one prediction, of a network."""
    with torch.device("meta"):
        model = MobileNetV2(width_mult=alpha)
    recorder = _Recorder()
    for phase in phases:
        x = new_channels_last(torch.empty(0, device="meta", dtype=dtype), (batch, 3, resolution, resolution))
        for feature in model.features:
            run = _train if phase == TRAINING else _infer
            x = run(recorder, feature, x)
    return list(recorder.calls.values())


def variants() -> Iterator[tuple[float, int]]:
    """(alpha, resolution) of the published networks, the full-width one at 224 first."""
    pairs = [(variant.alpha, variant.resolution) for variant in VARIANTS.values()]
    yield from sorted(pairs, key=lambda pair: (pair != (1.0, 224), -pair[1], -pair[0]))


def _train(stages: Any, feature: torch.nn.Module, x: Tensor) -> Tensor:
    """Forward and backward of one feature; its input needs a gradient unless it is the picture."""
    if isinstance(feature, Stem):
        weight, norm, _ = _part(feature[0], feature[1], x.dtype)
        stride = feature[0].stride[0]
        out, y, bn = block.stem_forward(stages, x, weight, norm, stride, "")
        for need_input in (False, True):
            block.stem_backward(stages, out, x, y, bn, weight, stride, "", [need_input, True, True])
        return out
    if isinstance(feature, InvertedResidual):
        parts = _parts(feature, x.dtype)
        (w1, norm1, _), (wd, norm2, _), (w3, norm3, _) = parts
        stride, residual = feature.stride, feature.use_res_connect
        out, y1, y2, y3, bn1, bn2, bn3 = block.block_forward(
            stages, x, w1, norm1, wd, norm2, w3, norm3, stride, residual, ""
        )
        block.block_backward(
            stages, out, x, y1, y2, y3, bn1, bn2, bn3, w1, wd, w3, stride, residual, False, "", [True] * 7
        )
        return out
    weight, norm, _ = _part(feature[0], feature[1], x.dtype)
    out, y, bn = block.head_forward(stages, x, weight, norm, "")
    block.head_backward(stages, out, x, y, bn, weight, "", [True] * 3)
    return out


def _infer(stages: Any, feature: torch.nn.Module, x: Tensor) -> Tensor:
    if isinstance(feature, Stem):
        weight, _, bias = _part(feature[0], feature[1], x.dtype)
        return stages.stem_folded(x, weight, bias, feature[0].stride[0])
    if isinstance(feature, InvertedResidual):
        (w1, _, b1), (wd, _, bd), (w3, _, b3) = _parts(feature, x.dtype)
        return stages.inverted_residual_folded(x, w1, b1, wd, bd, w3, b3, feature.stride, feature.use_res_connect)
    weight, _, bias = _part(feature[0], feature[1], x.dtype)
    return stages.head_folded(x, weight, bias)


def _part(conv: torch.nn.Module, norm: torch.nn.Module, dtype: torch.dtype) -> tuple[Tensor, block.Norm, Tensor]:
    """A stage's weight in the activations' type, its BatchNorm, and the bias it has once that is folded."""
    bias = torch.empty(conv.out_channels, dtype=wide(dtype), device="meta")
    return conv.weight.detach().to(dtype), block.Norm(norm.weight, norm.bias, None, None, norm.eps), bias


def _parts(feature: InvertedResidual, dtype: torch.dtype) -> tuple[tuple[Any, block.Norm, Any], ...]:
    *expand, depthwise, project, project_bn = feature.conv
    none = (None, block.Norm(None, None, None, None, 0.0), None)
    return (
        _part(expand[0][0], expand[0][1], dtype) if expand else none,
        _part(depthwise[0], depthwise[1], dtype),
        _part(project, project_bn, dtype),
    )
