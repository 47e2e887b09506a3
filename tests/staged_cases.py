"""Arguments for every staged operator, and the operator written in plain torch."""

from collections.abc import Callable
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2.kernels import staged
from mbv2.kernels.layout import wide

Make = Callable[..., Tensor]


def of(dtype: torch.dtype = torch.float64, grad: bool = True, seed: int = 0) -> Make:
    """A maker of random leaf tensors: make(shape), make(shape, around=1) for values about 1."""
    seeds = count(1000 * seed)

    def make(*shape: int, around: float = 0.0) -> Tensor:
        generator = torch.Generator().manual_seed(next(seeds))
        values = torch.randn(shape, generator=generator, dtype=torch.float64) + around
        return values.to(dtype).requires_grad_(grad)

    return make


def vector(make: Make, size: int, around: float) -> Tensor:
    """A maker's [C] in the wide type."""
    leaf = make(size, around=around)
    return leaf.detach().to(wide(leaf.dtype)).requires_grad_(leaf.requires_grad)


def expand_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), make(4, c, 1, 1)


def depthwise_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), vector(make, c, 2), vector(make, c, 2), make(c, 1, 3, 3), 1


def depthwise_bare_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), None, None, make(c, 1, 3, 3), 2


def project_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), vector(make, c, 2), vector(make, c, 2), make(5, c, 1, 1)


def stem_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), make(2, c, 3, 3), 2


def bn_finalize_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return vector(make, c, 0), vector(make, c, 9), float(max(n * h * w, 2)), make(c, around=1), make(c), 1e-3


def bn_finalize_bare_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return vector(make, c, 0), vector(make, c, 9), float(max(n * h * w, 2)), None, None, 1e-3


def bn_apply_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), vector(make, c, 2), vector(make, c, 2), make(n, c, h, w), False


def bn_apply_relu6_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), vector(make, c, 2), vector(make, c, 2), None, True


def bn_relu6_pool_args(make: Make, n: int, c: int, h: int, w: int) -> tuple[Any, ...]:
    return make(n, c, h, w), vector(make, c, 2), vector(make, c, 2)


def column(v: Tensor) -> Tensor:
    return v[:, None, None]


def with_statistics(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = y.mean((0, 2, 3))
    return y, mean, (y - column(mean)).square().sum((0, 2, 3))


def activation(y: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    return y if scale is None or shift is None else F.relu6(column(scale) * y + column(shift))


def plain_expand(x: Tensor, weight: Tensor) -> Any:
    return with_statistics(F.conv2d(x, weight))


def plain_depthwise(y1: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, stride: int) -> Any:
    return with_statistics(F.conv2d(activation(y1, scale, shift), weight, None, stride, 1, groups=y1.shape[1]))


def plain_project(y2: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> Any:
    return with_statistics(F.conv2d(activation(y2, scale, shift), weight))


def plain_stem(x: Tensor, weight: Tensor, stride: int) -> Any:
    return with_statistics(F.conv2d(x, weight, None, stride, 1))


def plain_bn_finalize(
    mean: Tensor, m2: Tensor, number: float, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> Any:
    var = m2 / number
    scale = (var + eps).rsqrt() * (1 if gamma is None else gamma)
    return scale, (0 if beta is None else beta) - mean * scale, var


def plain_bn_apply(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    z = activation(y, scale, shift) if relu6 else column(scale) * y + column(shift)
    return z if residual is None else z + residual


def plain_bn_relu6_pool(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return activation(y, scale, shift).mean((2, 3))


CASES = {
    "expand": (staged.expand, plain_expand, expand_args),
    "depthwise": (staged.depthwise, plain_depthwise, depthwise_args),
    "depthwise_bare": (staged.depthwise, plain_depthwise, depthwise_bare_args),
    "project": (staged.project, plain_project, project_args),
    "stem": (staged.stem, plain_stem, stem_args),
    "bn_finalize": (staged.bn_finalize, plain_bn_finalize, bn_finalize_args),
    "bn_finalize_bare": (staged.bn_finalize, plain_bn_finalize, bn_finalize_bare_args),
    "bn_apply": (staged.bn_apply, plain_bn_apply, bn_apply_args),
    "bn_apply_relu6": (staged.bn_apply, plain_bn_apply, bn_apply_relu6_args),
    "bn_relu6_pool": (staged.bn_relu6_pool, plain_bn_relu6_pool, bn_relu6_pool_args),
}
ONCE = [name for name in CASES if not name.startswith("bn_finalize")]


def results(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def differentiable(args: tuple[Any, ...]) -> list[Tensor]:
    return [a for a in args if isinstance(a, Tensor) and a.requires_grad]


def gradients(outputs: tuple[Tensor, ...], args: tuple[Any, ...], grads: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(outputs, differentiable(args), grads)


def as_double(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().double().requires_grad_(value.requires_grad)


def assert_near(got: Tensor, exact: Tensor, tolerance: float) -> None:
    """The worst difference, relative to the largest value (sums cancel)."""
    assert got.shape == exact.shape
    scale = float(exact.detach().abs().max().clamp(min=1))
    assert float((got.detach().double() - exact.detach()).abs().max()) <= tolerance * scale


def strided(x: Tensor, how: str) -> Tensor:
    """The same values in other memory."""
    if how == "contiguous":
        return x.contiguous()
    if how == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    if how == "sliced":
        wider = x.new_full((n + 1, c + 2, h + 3, 2 * w), float("nan"))
        wider[1:, 1 : c + 1, 2 : h + 2, ::2] = x
        return wider[1:, 1 : c + 1, 2 : h + 2, ::2]
    assert how == "transposed"
    return x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0)
