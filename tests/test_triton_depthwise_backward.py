import pytest
import torch
from conftest import Gpu
from stage_check import (
    HALF_AND_SINGLE,
    activations,
    batch_norm_of,
    check_stage,
    coefficients,
    skip_if_wrong_there,
    weights,
)
from torch import Tensor

from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.depthwise_backward import depthwise_backward

TILE = {"BLOCK_P": 4, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1}
DTYPES = (*HALF_AND_SINGLE, torch.float64)


def _inputs(n: int, c: int, h: int, w: int, dtype: torch.dtype, stride: int) -> tuple[Tensor, ...]:
    small = (n, c, (h - 1) // stride + 1, (w - 1) // stride + 1)
    y1 = activations(n, c, h, w, dtype, seed=5)
    return activations(*small, dtype, seed=6), activations(*small, dtype, seed=7), coefficients(c, dtype), y1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
def test_gradients(gpu: Gpu, stride: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    dz2, y2, coef, y1 = _inputs(3, 24, 9, 11, dtype, stride)
    weight = weights(24, 1, 3, 3, dtype=dtype)
    with tuning.forced("depthwise_backward", **TILE):
        check_stage(gpu, depthwise_backward, dz2, y2, coef, y1, batch_norm_of(y1), weight, stride, True, True)
