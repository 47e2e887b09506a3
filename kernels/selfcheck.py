"""First use of a kernel on a GPU: run its stage on a tiny input and compare it with plain torch in float64.

A compiler or driver that gets a kernel wrong then costs speed, not accuracy: the stage falls back to plain torch.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import aten
from mbv2.kernels.layout import channels_last

# Far above the rounding of one stage (KERNELS: 1e-2 in bfloat16, with tf32 for float32), far below any mistake.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-2, torch.float16: 2e-2, torch.bfloat16: 6e-2}
_N, _SIZE, _IN, _HIDDEN = 2, 8, 16, 32


def disagreement(stage: str, function: Callable[..., Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why `function` is not to be trusted as `stage`, or None when it agrees with plain torch on a tiny input."""
    for arguments in examples(stage, dtype):
        given = [a.to(device) if isinstance(a, Tensor) else a for a in arguments]
        try:
            results = _listed(function(*given))
        except Exception as error:  # whatever a compiler or driver raises, plain torch is still there
            return f"{type(error).__name__}: {error}"
        expected = _listed(getattr(aten, stage)(*[_double(a) for a in arguments]))
        for index, (result, truth) in enumerate(zip(results, expected, strict=True)):
            if (result is None) != (truth is None):
                return f"result {index} is {'missing' if result is None else 'unexpected'}"
            if truth is None:
                continue
            distance = relative_error(whole(result.cpu()), whole(truth))
            if distance > _TOLERANCE[dtype]:
                return f"result {index} differs from plain torch by {distance:.1e} (relative)"
    return None


def examples(stage: str, dtype: torch.dtype) -> list[tuple[Any, ...]]:
    """Argument lists for `stage`, one for each of its compile-time variants that the network uses."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def image(channels: int, size: int = _SIZE) -> Tensor:
        return channels_last(random(_N, channels, size, size).to(dtype))

    def weight(*shape: int) -> Tensor:
        return (random(*shape) / torch.Size(shape[1:]).numel() ** 0.5).to(dtype)

    def norm(y: Tensor) -> Tensor:
        gamma, beta = random(y.shape[1]).abs() + 0.5, random(y.shape[1]) * 0.5 + 1
        return aten.bn_finalize(aten._with_moments(y)[1], gamma, beta, 1e-5)

    x, y1, y3, image3 = image(_IN), image(_HIDDEN), image(_IN), image(3)
    y2, half2 = image(_HIDDEN), image(_HIDDEN, _SIZE // 2)
    w1, wd, w3, ws = (
        weight(_HIDDEN, _IN, 1, 1),
        weight(_HIDDEN, 1, 3, 3),
        weight(_IN, _HIDDEN, 1, 1),
        weight(16, 3, 3, 3),
    )
    bn1, bn2, bn3 = norm(y1), norm(y2), norm(y3)
    wide = bn1.dtype
    coef1, coef3 = random(3, _HIDDEN).to(wide), random(3, _IN).to(wide)
    b1, b3 = random(_HIDDEN).to(wide), random(_IN).to(wide)
    ys = aten.stem(image3, ws, 2)[0]
    moments = torch.cat([aten._with_moments(image(_HIDDEN))[1] for _ in range(5)])
    sums = torch.cat([aten.bn_sums(image(_HIDDEN), y1, bn1, True) for _ in range(5)])
    gamma, beta = b1.abs() + 0.5, b1
    cases: dict[str, list[tuple[Any, ...]]] = {
        "stem": [(image3, ws, 2)],
        "expand": [(x, w1)],
        "depthwise": [(y1, bn1, wd, 1), (y1, bn1, wd, 2), (y1, None, wd, 1)],
        "project": [(y2, bn2, w3)],
        "merge_moments": [(moments,)],
        "bn_finalize": [(moments, gamma, beta, 1e-5)],
        "bn_constant": [(b1, gamma, gamma, beta, 1e-5, dtype)],
        "bn_apply": [(y3, bn3, x, False), (y3, bn3, None, False), (y1, bn1, None, True)],
        "bn_relu6_pool": [(y1, bn1)],
        "bn_sums": [(x, y3, bn3, False), (y2, y1, bn1, True)],
        "bn_backward": [(sums, bn1)],
        "project_backward": [(x, y3, coef3, w3, y2, bn2, True, True)],
        "depthwise_backward": [
            (y2, y2, coef1, y1, bn1, wd, 1, True, True),
            (half2, half2, coef1, y1, bn1, wd, 2, True, True),
            (y2, y2, coef1, y1, None, wd, 1, True, True),
        ],
        "expand_backward": [(y2, y1, coef1, w1, x, y3, True, True), (y2, y1, coef1, w1, x, None, True, True)],
        "stem_backward": [(torch.ones_like(ys), ys, norm(ys), coef3, image3, ws, 2, False, True)],
        "pool_backward": [(random(_N, _HIDDEN).to(dtype), y1, bn1)],
        "stem_folded": [(image3, ws, b3, 2)],
        "pointwise_folded": [(x, w1, b1, True, None), (y1, w3, b3, False, x)],
        "depthwise_folded": [(y1, wd, b1, 1), (y1, wd, b1, 2)],
        "expand_depthwise_folded": [(x, w1, b1, wd, b1, 1), (x, w1, b1, wd, b1, 2)],
        "depthwise_project_folded": [(y1, wd, b1, w3, b3, 1, x), (y1, wd, b1, w3, b3, 2, None)],
        "inverted_residual_folded": [
            (x, w1, b1, wd, b1, w3, b3, 1, True),
            (x, w1, b1, wd, b1, w3, b3, 2, False),
            (y1, None, None, wd, b1, w3, b3, 1, False),
        ],
        "head_folded": [(x, w1, b1)],
    }
    return cases[stage]


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, tuple) else [value]


def whole(value: Tensor) -> Tensor:
    """Parts of moments or sums put together: how a backend cuts its work is its own business."""
    if value.dim() == 3:
        return aten.merge_moments(value) if value.shape[1] == 3 else value.sum(0)
    return value


def relative_error(result: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error; of a table of statistics, that of its worst row."""
    rows = zip(result.double(), truth, strict=True) if truth.dim() == 2 else [(result.double(), truth)]
    errors = [float((r - t).norm() / t.norm().clamp(min=1e-30)) for r, t in rows]
    return max(e if e == e else float("inf") for e in errors)
