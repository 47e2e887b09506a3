import pytest
import torch
from conftest import Gpu
from stage_check import HALF_AND_SINGLE, activations, batch_norm_of, check_stage, skip_if_wrong_there, weights

from mbv2.kernels.triton import depthwise, tuning

TILE = {"BLOCK_P": 4, "BLOCK_C": 16, "num_warps": 1, "num_stages": 1}
DTYPES = (*HALF_AND_SINGLE, torch.float64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stride", (1, 2))
def test_training(gpu: Gpu, stride: int, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    y1 = activations(3, 24, 9, 11, dtype)
    with tuning.forced("depthwise", **TILE):
        check_stage(gpu, depthwise.depthwise, y1, batch_norm_of(y1), weights(24, 1, 3, 3, dtype=dtype), stride)
