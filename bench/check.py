"""Right before fast: a result is timed only when it is as exact as plain torch in the same type."""

from collections.abc import Sequence

import torch
from torch import Tensor

# How much further from float64 than plain torch a result may lie, and what is always allowed, by type.
MOST = 2.0
FLOORS = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of the tensors' relative errors, |got - expected| / |expected| in the Euclidean norm.

    NaN where a shape is wrong or a value is not finite.
    """
    worst = 0.0
    for one, other in zip(got, expected, strict=True):
        if one.shape != other.shape or not torch.isfinite(one).all():
            return float("nan")
        reference = other.double()
        norm = torch.linalg.vector_norm(reference)
        worst = max(worst, (torch.linalg.vector_norm(one.double() - reference) / norm.clamp_min(1e-30)).item())
    return worst


def fault(own: float, plain: float, dtype: torch.dtype, floor: float | None = None) -> str | None:
    """Why a result with error `own` is wrong, given plain torch's error in the same type; None when it is right.

    `floor` is what is allowed in any case, by default what roundings of the type explain.
    """
    limit = MOST * plain + (FLOORS[dtype] if floor is None else floor)
    if own <= limit:
        return None
    return f"wrong result: relative error {own:.1e} against float64, at most {limit:.1e} is right"
