"""The whole-stage operators for training in torch.library (namespace `mbv2`), BatchNorm inside.

They are functional: they return, beside the output, the raw convolution outputs and the [6, C]
statistics that their backward operators read (`layout` lists the rows); running statistics are updated outside, by
`fused.py`. A tensor that does not exist (y1 of a block without expansion, a gradient nobody asked for) is empty, as an
operator cannot return None. `group` is a process group's name, or "" for this process's own statistics.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import block
from mbv2.kernels.block import Norm
from mbv2.kernels.dispatch import stages_for
from mbv2.kernels.layout import new_channels_last, wide
from mbv2.kernels.registration import operator

# --- inverted residual, training -------------------------------------------------------------------------------


@operator
def inverted_residual_train(
    x: Tensor,
    w1: Tensor | None,
    gamma1: Tensor | None,
    beta1: Tensor | None,
    mean1: Tensor | None,
    var1: Tensor | None,
    eps1: float,
    wd: Tensor,
    gamma2: Tensor | None,
    beta2: Tensor | None,
    mean2: Tensor | None,
    var2: Tensor | None,
    eps2: float,
    w3: Tensor,
    gamma3: Tensor | None,
    beta3: Tensor | None,
    mean3: Tensor | None,
    var3: Tensor | None,
    eps3: float,
    stride: int,
    residual: bool,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One block. A BatchNorm whose mean and var are given normalises with them, else with the batch's.

    Args:
        x: [N, C, H, W]; w1 [hidden, C, 1, 1] or None; wd [hidden, 1, 3, 3]; w3 [out, hidden, 1, 1], all of one type.

    Returns:
        out [N, out, Ho, Wo], y1 [N, hidden, H, W], y2 [N, hidden, Ho, Wo], y3 like out, bn1, bn2 and bn3 [6, C].
    """
    out, y1, y2, y3, bn1, bn2, bn3 = block.block_forward(
        stages_for("inverted_residual_train", x),
        x,
        w1,
        Norm(gamma1, beta1, mean1, var1, eps1),
        wd,
        Norm(gamma2, beta2, mean2, var2, eps2),
        w3,
        Norm(gamma3, beta3, mean3, var3, eps3),
        stride,
        residual,
        group,
    )
    return _without_none((out, y1, y2, y3, bn1, bn2, bn3), (x, x, x, x, bn2, bn2, bn2))


@inverted_residual_train.register_fake
def _(x, w1, g1, b1, m1, v1, eps1, wd, g2, b2, m2, v2, eps2, w3, g3, b3, m3, v3, eps3, stride, residual, group):
    n, _, h, w = x.shape
    hidden, out = wd.shape[0], w3.shape[0]
    ho, wo = _strided(h, stride), _strided(w, stride)
    y1 = x.new_empty(0) if w1 is None else new_channels_last(x, (n, hidden, h, w))
    bn1 = x.new_empty(0, dtype=wide(x.dtype)) if w1 is None else _new_bn(x, hidden)
    y3 = new_channels_last(x, (n, out, ho, wo))
    y2 = new_channels_last(x, (n, hidden, ho, wo))
    return torch.empty_like(y3), y1, y2, y3, bn1, _new_bn(x, hidden), _new_bn(x, out)


@operator
def inverted_residual_train_backward(
    grad: Tensor,
    x: Tensor,
    y1: Tensor,
    y2: Tensor,
    y3: Tensor,
    bn1: Tensor,
    bn2: Tensor,
    bn3: Tensor,
    w1: Tensor | None,
    wd: Tensor,
    w3: Tensor,
    stride: int,
    residual: bool,
    constant3: bool,
    group: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, dw1, totals1, dwd, totals2, dw3, totals3, totals being (dbeta, dgamma); empty where `need` is False."""
    gradients = block.block_backward(
        stages_for("inverted_residual_train_backward", x),
        grad,
        x,
        None if w1 is None else y1,
        y2,
        y3,
        None if w1 is None else bn1,
        bn2,
        bn3,
        w1,
        wd,
        w3,
        stride,
        residual,
        constant3,
        group,
        list(need),
    )
    return _without_none(gradients, (x, x, bn3, x, bn3, x, bn3))


@inverted_residual_train_backward.register_fake
def _(grad, x, y1, y2, y3, bn1, bn2, bn3, w1, wd, w3, stride, residual, constant3, group, need):
    totals = [None if bn.dim() != 2 else bn.new_empty((2, bn.shape[1])) for bn in (bn1, bn2, bn3)]
    dw1 = None if w1 is None else torch.empty_like(w1)
    shapes = [_like(x), dw1, totals[0], torch.empty_like(wd), totals[1], torch.empty_like(w3), totals[2]]
    gradients = [g if wanted else None for g, wanted in zip(shapes, need, strict=True)]
    return _without_none(gradients, (x, x, bn3, x, bn3, x, bn3))


def _save_block(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w1, gamma1, _, _, _, _, wd, gamma2, _, _, _, _, w3, gamma3, _, mean3, _, _, stride, residual, group = inputs
    ctx.mark_non_differentiable(*output[1:])
    # Or autograd would make zeros as large as y1, y2 and y3, for gradients that are never read.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], w1, wd, w3)
    ctx.settings = (stride, residual, mean3 is not None, group)
    ctx.types = [None if gamma is None else gamma.dtype for gamma in (gamma1, gamma2, gamma3)]


def _block_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    x, w1, gamma1, beta1, wd, gamma2, beta2, w3, gamma3, beta3 = (ctx.needs_input_grad[i] for i in _BLOCK_PARAMETERS)
    need = [x, w1, gamma1 or beta1, wd, gamma2 or beta2, w3, gamma3 or beta3]
    given = inverted_residual_train_backward(grad, *ctx.saved_tensors, *ctx.settings, need)
    dx, dw1, totals1, dwd, totals2, dw3, totals3 = (g if n else None for g, n in zip(given, need, strict=True))
    norms = [_gamma_beta(t, dtype) for t, dtype in zip((totals1, totals2, totals3), ctx.types, strict=True)]
    gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
    values = (dx, dw1, *norms[0], dwd, *norms[1], dw3, *norms[2])
    for position, value in zip(_BLOCK_PARAMETERS, values, strict=True):
        gradients[position] = value if ctx.needs_input_grad[position] else None
    return tuple(gradients)


# Where x, w1, gamma1, beta1, wd, gamma2, beta2, w3, gamma3, beta3 stand among the operator's arguments.
_BLOCK_PARAMETERS = (0, 1, 2, 3, 7, 8, 9, 13, 14, 15)

inverted_residual_train.register_autograd(_block_gradients, setup_context=_save_block)


# --- stem and head, training -----------------------------------------------------------------------------------


@operator
def stem_train(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    stride: int,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Dense 3x3 convolution, BatchNorm, ReLU6: (out, y, bn)."""
    stages = stages_for("stem_train", x)
    return block.stem_forward(stages, x, weight, Norm(gamma, beta, mean, var, eps), stride, group)


@stem_train.register_fake
def _(x, weight, gamma, beta, mean, var, eps, stride, group):
    n, _, h, w = x.shape
    y = new_channels_last(x, (n, weight.shape[0], _strided(h, stride), _strided(w, stride)))
    return torch.empty_like(y), y, _new_bn(x, weight.shape[0])


@operator
def stem_train_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bn: Tensor,
    weight: Tensor,
    stride: int,
    group: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, totals (dbeta, dgamma); empty where `need` is False."""
    stages = stages_for("stem_train_backward", x)
    gradients = block.stem_backward(stages, grad, x, y, bn, weight, stride, group, list(need))
    return _without_none(gradients, (x, x, bn))


@stem_train_backward.register_fake
def _(grad, x, y, bn, weight, stride, group, need):
    return _fake_conv_gradients(x, weight, bn, need)


def _save_stem(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gamma, _, _, _, _, stride, group = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight)
    ctx.settings = (stride, group)
    ctx.type = None if gamma is None else gamma.dtype


def _stem_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_conv_gradients(stem_train_backward, ctx, grad), None, None, None, None, None


stem_train.register_autograd(_stem_gradients, setup_context=_save_stem)


@operator
def head_train(
    x: Tensor,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """1x1 convolution, BatchNorm, ReLU6, global average pooling: (pooled [N, out], y, bn)."""
    return block.head_forward(stages_for("head_train", x), x, weight, Norm(gamma, beta, mean, var, eps), group)


@head_train.register_fake
def _(x, weight, gamma, beta, mean, var, eps, group):
    n, _, h, w = x.shape
    out = weight.shape[0]
    return x.new_empty(n, out), new_channels_last(x, (n, out, h, w)), _new_bn(x, out)


@operator
def head_train_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    bn: Tensor,
    weight: Tensor,
    group: str,
    need: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight, totals (dbeta, dgamma); empty where `need` is False."""
    stages = stages_for("head_train_backward", x)
    gradients = block.head_backward(stages, grad, x, y, bn, weight, group, list(need))
    return _without_none(gradients, (x, x, bn))


@head_train_backward.register_fake
def _(grad, x, y, bn, weight, group, need):
    return _fake_conv_gradients(x, weight, bn, need)


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, gamma, _, _, _, _, group = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, *output[1:], weight)
    ctx.settings = (group,)
    ctx.type = None if gamma is None else gamma.dtype


def _head_gradients(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *_conv_gradients(head_train_backward, ctx, grad), None, None, None, None


head_train.register_autograd(_head_gradients, setup_context=_save_head)


def _conv_gradients(operator: Any, ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight, gamma, beta, the first four arguments of stem and head."""
    x, weight, gamma, beta = ctx.needs_input_grad[:4]
    need = [x, weight, gamma or beta]
    given = operator(grad, *ctx.saved_tensors, *ctx.settings, need)
    dx, dweight, totals = (g if n else None for g, n in zip(given, need, strict=True))
    values = (dx, dweight, *_gamma_beta(totals, ctx.type))
    return tuple(v if n else None for v, n in zip(values, ctx.needs_input_grad[:4], strict=True))


def _no_double_backward(ctx: Any, *_: Any) -> None:
    raise NotImplementedError(
        "the fused operators of mbv2 have no double backward; run this call with mbv2.kernels.backend('aten')"
    )


for _operator in (inverted_residual_train_backward, stem_train_backward, head_train_backward):
    _operator.register_autograd(_no_double_backward)


# --- shared pieces -----------------------------------------------------------------------------------------------


def _strided(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _new_bn(x: Tensor, channels: int) -> Tensor:
    return x.new_empty((6, channels), dtype=wide(x.dtype))


def _like(x: Tensor) -> Tensor:
    return new_channels_last(x, tuple(x.shape))


def _gamma_beta(totals: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor | None, Tensor | None]:
    if totals is None:
        return None, None
    dbeta, dgamma = totals if dtype is None else totals.to(dtype)
    return dgamma, dbeta


def _without_none(gradients: Sequence[Tensor | None], types: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if g is None else g for g, like in zip(gradients, types, strict=True))


def _fake_conv_gradients(x: Tensor, weight: Tensor, bn: Tensor, need: Sequence[bool]) -> tuple[Tensor, ...]:
    shapes = (_like(x), torch.empty_like(weight), bn.new_empty((2, bn.shape[1])))
    return _without_none([g if wanted else None for g, wanted in zip(shapes, need, strict=True)], (x, x, bn))
