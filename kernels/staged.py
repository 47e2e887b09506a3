"""The stages of the training block as operators one can call one by one, each with its own derivative.

`torch.ops.mbv2.expand`, `depthwise`, `project`, `stem`, `bn_finalize`, `bn_apply` and `bn_relu6_pool`, or the same
names here. Activations may have any strides and are copied to dense channels_last where they are anything else;
results are dense channels_last. Statistics (mean, m2: the sum of squares about it), scale and shift are [C] in the
wide type, float32, or float64 for float64 activations. The dispatcher chooses the backend, as for whole blocks.

    y1, mean, m2 = expand(x, w1)
    scale, shift, var = bn_finalize(mean, m2, y1.numel() / y1.shape[1], gamma, beta, eps)
    y2, mean, m2 = depthwise(y1, scale, shift, wd, stride)

Gradients flow through statistics too, so a chain of these is the block with BatchNorm in training mode; scale and
shift that come from running statistics make it the one in evaluation mode. The block as one operator
(`inverted_residual`) does less work, and sums its gradients about the mean, which these cannot know: for channels
whose |mean| is many standard deviations, gradients of scale lose that many digits in BatchNorm's backward.

Autocast leaves these operators alone: cast activations and weights, which must be of one type, beforehand.
"""

from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import staged_backward as backward
from mbv2.kernels.dispatch import Stages, stages_for
from mbv2.kernels.layout import SCALE, SHIFT, VAR, channels_last, new_channels_last, result_in_channels_last, wide
from mbv2.kernels.registration import operator
from mbv2.kernels.staged_backward import affine_bn

_Three = tuple[Tensor, Tensor, Tensor]


@operator
def expand(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution: (y, mean, m2).

    Args:
        x: [N, in, H, W].
        weight: [out, in, 1, 1].
    """
    _check_convolution(x, weight, (weight.shape[0], x.shape[1], 1, 1))
    stages = stages_for("expand", x)
    return _with_statistics(stages, *stages.expand(channels_last(x), weight.contiguous()))


@expand.register_fake
def _(x: Tensor, weight: Tensor) -> _Three:
    _check_convolution(x, weight, (weight.shape[0], x.shape[1], 1, 1))
    return _fake_convolution(x, weight, 1)


def _expand_context(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    x, weight = inputs
    y, mean, _ = output
    ctx.save_for_backward(x, weight, y, mean)
    ctx.set_materialize_grads(False)


def _expand_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, y, mean = ctx.saved_tensors
    need = ctx.needs_input_grad
    return _asked(need, *backward.expand_backward(*_at_convolution(grads, y, mean), weight, x, need[0], need[1]))


expand.register_autograd(_expand_gradients, setup_context=_expand_context)


@operator
def depthwise(
    y1: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """relu6(scale * y1 + shift), or y1 as it is, then depthwise 3x3 convolution, padding 1: (y2, mean, m2).

    Args:
        y1: [N, C, H, W].
        scale, shift: [C], or both None.
        weight: [C, 1, 3, 3].
        stride: 1 or 2.
    """
    _check_depthwise(y1, scale, shift, weight, stride)
    stages = stages_for("depthwise", y1)
    bn = None if scale is None or shift is None else affine_bn(scale, shift, y1.dtype)
    return _with_statistics(stages, *stages.depthwise(channels_last(y1), bn, weight.contiguous(), stride))


@depthwise.register_fake
def _(y1: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, stride: int) -> _Three:
    _check_depthwise(y1, scale, shift, weight, stride)
    return _fake_convolution(y1, weight, stride)


def _depthwise_context(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    y1, scale, shift, weight, ctx.stride = inputs
    y2, mean, _ = output
    ctx.save_for_backward(y1, scale, shift, weight, y2, mean)
    ctx.set_materialize_grads(False)


def _depthwise_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    y1, scale, shift, weight, y2, mean = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad, y2, coef = _at_convolution(grads, y2, mean)
    results = backward.depthwise_backward(
        grad, y2, coef, y1, scale, shift, weight, ctx.stride, need[0] or need[1] or need[2], need[3]
    )
    return _asked(need, *results, None)


depthwise.register_autograd(_depthwise_gradients, setup_context=_depthwise_context)


@operator
def project(y2: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """relu6(scale * y2 + shift), then 1x1 convolution: (y3, mean, m2).

    Args:
        y2: [N, in, H, W].
        scale, shift: [in].
        weight: [out, in, 1, 1].
    """
    _check_project(y2, scale, shift, weight)
    stages = stages_for("project", y2)
    bn = affine_bn(scale, shift, y2.dtype)
    return _with_statistics(stages, *stages.project(channels_last(y2), bn, weight.contiguous()))


@project.register_fake
def _(y2: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> _Three:
    _check_project(y2, scale, shift, weight)
    return _fake_convolution(y2, weight, 1)


def _project_context(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    y3, mean, _ = output
    ctx.save_for_backward(*inputs, y3, mean)
    ctx.set_materialize_grads(False)


def _project_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    y2, scale, shift, weight, y3, mean = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad, y3, coef = _at_convolution(grads, y3, mean)
    results = backward.project_backward(
        grad, y3, coef, weight, y2, scale, shift, need[0] or need[1] or need[2], need[3]
    )
    return _asked(need, *results)


project.register_autograd(_project_gradients, setup_context=_project_context)


@operator
def stem(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor, Tensor]:
    """Dense 3x3 convolution, padding 1: (y, mean, m2).

    Args:
        x: [N, in, H, W].
        weight: [out, in, 3, 3].
        stride: 1 or 2.
    """
    _check_convolution(x, weight, (weight.shape[0], x.shape[1], 3, 3), stride)
    stages = stages_for("stem", x)
    return _with_statistics(stages, *stages.stem(channels_last(x), weight.contiguous(), stride))


@stem.register_fake
def _(x: Tensor, weight: Tensor, stride: int) -> _Three:
    _check_convolution(x, weight, (weight.shape[0], x.shape[1], 3, 3), stride)
    return _fake_convolution(x, weight, stride)


def _stem_context(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    x, weight, ctx.stride = inputs
    y, mean, _ = output
    ctx.save_for_backward(x, weight, y, mean)
    ctx.set_materialize_grads(False)


def _stem_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    x, weight, y, mean = ctx.saved_tensors
    need = ctx.needs_input_grad
    grad, y, coef = _at_convolution(grads, y, mean)
    return _asked(need, *backward.stem_backward(grad, y, coef, x, weight, ctx.stride, need[0], need[1]), None)


stem.register_autograd(_stem_gradients, setup_context=_stem_context)


@operator
def bn_finalize(
    mean: Tensor, m2: Tensor, count: float, gamma: Tensor | None, beta: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What a BatchNorm in training mode applies: (scale, shift, var), so that it is scale * y + shift.

    Args:
        mean, m2: [C], of `count` values per channel.
        count: N * H * W, over all processes that share the statistics.
        gamma, beta: BatchNorm's weight and bias, or None.
        eps: added to the variance.

    Returns:
        scale, shift, and the biased variance m2 / count (a running variance takes var * count / (count - 1)).
    """
    moments = torch.stack((torch.full_like(mean, count), mean, m2))[None]
    bn = stages_for("bn_finalize", mean).bn_finalize(moments, gamma, beta, eps)
    return bn[SCALE].clone(), bn[SHIFT].clone(), bn[VAR].clone()


@bn_finalize.register_fake
def _(mean: Tensor, m2: Tensor, count: float, gamma: Tensor | None, beta: Tensor | None, eps: float) -> _Three:
    return torch.empty_like(mean), torch.empty_like(mean), torch.empty_like(mean)


def _bn_finalize_context(ctx: Any, inputs: tuple[Any, ...], output: _Three) -> None:
    mean, _, ctx.count, gamma, _, ctx.eps = inputs
    ctx.save_for_backward(mean, gamma, output[2])


def _bn_finalize_gradients(
    ctx: Any, grad_scale: Tensor, grad_shift: Tensor, grad_var: Tensor
) -> tuple[Tensor | None, ...]:
    # A few [C] vectors, in operators that a compiler fuses and that have derivatives themselves.
    mean, gamma, var = ctx.saved_tensors
    rstd = torch.rsqrt(var + ctx.eps)
    scale = rstd if gamma is None else rstd * gamma.to(rstd.dtype)
    into_scale = grad_scale - mean * grad_shift
    into_var = grad_var - into_scale * scale * rstd.square() / 2
    results = -scale * grad_shift, into_var / ctx.count, None, into_scale * rstd, grad_shift, None
    return _asked(ctx.needs_input_grad, *results)


bn_finalize.register_autograd(_bn_finalize_gradients, setup_context=_bn_finalize_context)


@operator
def bn_apply(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """scale * y + shift, then ReLU6 if asked, then plus residual.

    Args:
        y: [N, C, H, W].
        scale, shift: [C].
        residual: of y's shape and type, or None.
        relu6: whether ReLU6 is applied.
    """
    _check_bn_apply(y, scale, shift, residual)
    stages = stages_for("bn_apply", y)
    skip = None if residual is None else channels_last(residual)
    return result_in_channels_last(stages.bn_apply(channels_last(y), affine_bn(scale, shift, y.dtype), skip, relu6))


@bn_apply.register_fake
def _(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    _check_bn_apply(y, scale, shift, residual)
    return new_channels_last(y, y.shape)


def _bn_apply_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    y, scale, shift, _, ctx.relu6 = inputs
    ctx.save_for_backward(y, scale, shift)


def _bn_apply_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need = ctx.needs_input_grad
    results: tuple[Tensor | None, ...] = (None, None, None)
    if need[0] or need[1] or need[2]:
        results = backward.bn_apply_backward(grad, *ctx.saved_tensors, ctx.relu6, need[0], need[1] or need[2])
    return _asked(need, *results, grad, None)


bn_apply.register_autograd(_bn_apply_gradients, setup_context=_bn_apply_context)


@operator
def bn_relu6_pool(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """[N, C], the mean over H and W of relu6(scale * y + shift); arguments as in `bn_apply`."""
    _check_vectors(y, scale, shift)
    stages = stages_for("bn_relu6_pool", y)
    return stages.bn_relu6_pool(channels_last(y), affine_bn(scale, shift, y.dtype)).contiguous()


@bn_relu6_pool.register_fake
def _(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    _check_vectors(y, scale, shift)
    return y.new_empty(y.shape[:2])


def _bn_relu6_pool_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _bn_relu6_pool_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _asked(ctx.needs_input_grad, *backward.bn_relu6_pool_backward(grad, *ctx.saved_tensors))


bn_relu6_pool.register_autograd(_bn_relu6_pool_gradients, setup_context=_bn_relu6_pool_context)


# --- shared pieces -----------------------------------------------------------------------------------------------


def _with_statistics(stages: Stages, y: Tensor, moments: Tensor) -> _Three:
    _, mean, m2 = stages.merge_moments(moments)
    return y, mean.clone(), m2.clone()


def _fake_convolution(x: Tensor, weight: Tensor, stride: int) -> _Three:
    n, _, h, w = x.shape
    out = weight.shape[0]
    y = new_channels_last(x, (n, out, (h - 1) // stride + 1, (w - 1) // stride + 1))
    return y, x.new_empty(out, dtype=wide(x.dtype)), x.new_empty(out, dtype=wide(x.dtype))


def _at_convolution(grads: tuple[Tensor | None, ...], y: Tensor, mean: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # The gradients of mean and m2 are affine in y: A * gy + B * y + C is the gradient at the convolution's output.
    at_y, at_mean, at_m2 = grads
    a, zero = torch.ones_like(mean), torch.zeros_like(mean)
    b = zero if at_m2 is None else 2 * at_m2
    c = zero if at_mean is None else at_mean / (y.shape[0] * y.shape[2] * y.shape[3])
    return torch.zeros_like(y) if at_y is None else at_y, y, torch.stack((a, b, c - b * mean))


def _asked(need: tuple[bool, ...], *results: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(result if wanted else None for wanted, result in zip(need, results, strict=True))


def _check_convolution(x: Tensor, weight: Tensor, shape: tuple[int, ...], stride: int = 1) -> None:
    torch._check_value(
        weight.shape == shape and stride in (1, 2),
        lambda: f"a weight of {tuple(weight.shape)} and stride {stride} do not fit an input of {tuple(x.shape)}",
    )
    torch._check_value(
        x.dtype == weight.dtype,
        lambda: f"the input is {x.dtype} and the weight {weight.dtype}; cast them to one type (autocast does not)",
    )


def _check_vectors(y: Tensor, scale: Tensor, shift: Tensor) -> None:
    torch._check_value(
        scale.shape == shift.shape == (y.shape[1],),
        lambda: f"scale {tuple(scale.shape)} and shift {tuple(shift.shape)} do not fit {tuple(y.shape)}",
    )


def _check_depthwise(y1: Tensor, scale: Tensor | None, shift: Tensor | None, weight: Tensor, stride: int) -> None:
    if scale is not None and shift is not None:
        _check_vectors(y1, scale, shift)
    elif scale is not shift:
        raise ValueError("give both scale and shift, or neither")
    _check_convolution(y1, weight, (y1.shape[1], 1, 3, 3), stride)


def _check_project(y2: Tensor, scale: Tensor, shift: Tensor, weight: Tensor) -> None:
    _check_vectors(y2, scale, shift)
    _check_convolution(y2, weight, (weight.shape[0], y2.shape[1], 1, 1))


def _check_bn_apply(y: Tensor, scale: Tensor, shift: Tensor, residual: Tensor | None) -> None:
    _check_vectors(y, scale, shift)
    torch._check_value(
        residual is None or (residual.shape == y.shape and residual.dtype == y.dtype),
        lambda: f"a residual must be {tuple(y.shape)} and {y.dtype}, as y is",
    )
