"""Holding one stage of a backend against its plain-torch twin: as accurate as eager against float64, nothing unwritten.

The policy: the relative Frobenius error against float64 on the same rounded inputs is at most 1.3 times the error of
plain torch in the same type, plus a floor, and below an absolute cap.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import Gpu
from torch import Tensor

from mbv2.kernels import aten, layout

FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
CAP = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 3e-2, torch.bfloat16: 1e-1}
HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)


def skip_if_wrong_there(gpu: Gpu, dtype: torch.dtype) -> None:
    """Triton's interpreter is wrong for bfloat16; float64 is only for checking formulas in it."""
    if gpu.mode == "interpreter" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter computes bfloat16 wrongly")
    if gpu.mode != "interpreter" and dtype == torch.float64:
        pytest.skip("float64 kernels are run in the interpreter only")


def activations(n: int, c: int, h: int, w: int, dtype: torch.dtype, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Random [n, c, h, w] in dense channels_last, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, h, w, c, generator=generator) * scale).to(dtype).permute(0, 3, 1, 2)


def weights(*shape: int, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Random weights with unit gain, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    fan_in = torch.Size(shape[1:]).numel()
    return (torch.randn(shape, generator=generator) / fan_in**0.5).to(dtype)


def batch_norm_of(y: Tensor, seed: int = 2) -> Tensor:
    """The bn [6, C] of y's own batch statistics, random gamma and beta; most of relu6(bn(y)) is strictly inside."""
    generator = torch.Generator().manual_seed(seed)
    c = y.shape[1]
    gamma = torch.rand(c, generator=generator) + 0.5
    beta = torch.randn(c, generator=generator) * 0.5 + 1
    return aten.bn_finalize(aten._with_moments(y)[1], gamma, beta, 1e-5)


def coefficients(c: int, dtype: torch.dtype, seed: int = 3) -> Tensor:
    """A random coef [3, C]."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return (torch.randn(3, c, generator=generator) * torch.tensor([1.0, 0.2, 0.1])[:, None]).to(wide)


def check_stage(gpu: Gpu, stage: Callable[..., Any], *args: Any, slack: float = 1.0) -> None:
    """Run `stage` (a function named as in kernels/aten.py) and hold every result against its twin.

    Args:
        gpu: the fixture.
        stage: the backend's function.
        args: its arguments, on the CPU.
        slack: factor on floor and cap, for results that are sums of many cancelling terms.
    """
    twin = getattr(aten, stage.__name__)
    first = next(a for a in args if isinstance(a, Tensor))
    got = _as_tuple(stage(*[a.to(gpu.device) if isinstance(a, Tensor) else a for a in args]))
    eager = _as_tuple(twin(*args))
    exact = _as_tuple(twin(*[_double(a) for a in args]))
    assert len(got) == len(eager)
    for index, (mine, theirs, truth) in enumerate(zip(got, eager, exact, strict=True)):
        label = f"{stage.__name__} result {index}"
        assert (mine is None) == (theirs is None), label
        if mine is None:
            continue
        mine = mine.cpu()
        assert mine.dtype == theirs.dtype, (label, mine.dtype, theirs.dtype)
        if mine.dim() == 4 and theirs.stride() == layout.channels_last(theirs).stride():
            assert mine.stride() == theirs.stride(), f"{label} has other strides than its twin"
        for row, (m, t, e) in enumerate(zip(_merged(mine), _merged(theirs), _merged(truth), strict=True)):
            assert m.shape == t.shape, (label, m.shape, t.shape)
            assert_as_good_as_eager(f"{label} row {row}", m, t, e, first.dtype, slack)


def assert_as_good_as_eager(
    label: str, got: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype, slack: float = 1.0
) -> None:
    """The policy in this file's head; `dtype` is the activations' type."""
    assert torch.isfinite(got).all() or not torch.isfinite(exact).all(), f"{label}: not finite (unwritten?)"
    error, theirs = relative_error(got, exact), relative_error(eager, exact)
    allowed = min(1.3 * theirs + FLOOR[dtype] * slack, max(CAP[dtype] * slack, theirs))
    assert error <= allowed, f"{label}: error {error:.2e} against float64, eager {theirs:.2e}, allowed {allowed:.2e}"


def relative_error(got: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of the exact result."""
    exact = exact.double()
    return float((got.double() - exact).norm() / exact.norm().clamp(min=1e-30))


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _merged(value: Tensor) -> list[Tensor]:
    """Parts of moments or sums put together (how a backend cuts its work is its own business), row by row.

    A mean may come out near zero, so its error is held against the deviation, which is beside it in the same row.
    """
    if value.dim() == 3 and value.shape[1] == 3:
        count, mean, m2 = aten.merge_moments(value)
        return [count, torch.stack([mean, (m2 / count.clamp(min=1)).sqrt()]), m2]
    if value.dim() == 3 and value.shape[1] == 2:
        return list(value.sum(0))
    return list(value) if value.dim() == 2 else [value]
