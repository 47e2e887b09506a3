"""A kernel from nvcc is right, and each seeded fault in it is found."""

import numpy as np
import pytest

from ptxcpu import Module, PtxFault
from ptxcpu.nvcc import compile_source, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

SUM = """
extern "C" __global__ void row_sum(const float* x, float* out, int n) {
    __shared__ float part[256];
    float v = 0.f;
    for (int i = threadIdx.x; i < n; i += blockDim.x) v += x[blockIdx.x * n + i];
    part[threadIdx.x] = v;
    BARRIER
    for (int s = 128; s > 0; s >>= 1) { if (threadIdx.x < s) part[threadIdx.x] += part[threadIdx.x + s]; BARRIER }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}
"""


def launch(source: str, rows: int, n: int, short: int = 0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).standard_normal((rows, n)).astype(np.float32)
    out = np.full(rows, np.nan, np.float32)
    passed = x.reshape(-1)[: x.size - short].copy() if short else x
    Module(compile_source(source)).launch("row_sum", rows, 256, [passed, out, n])
    return x, out


def test_reduction_is_right():
    x, out = launch(SUM.replace("BARRIER", "__syncthreads();"), 5, 1000)
    np.testing.assert_allclose(out, x.sum(1), rtol=1e-4, atol=1e-4)


def test_missing_barrier_is_found():
    with pytest.raises(PtxFault) as caught:
        launch(SUM.replace("BARRIER", ""), 1, 1000)
    assert caught.value.kind in ("race", "uninitialised")


def test_read_past_the_end_is_found():
    with pytest.raises(PtxFault) as caught:
        launch(SUM.replace("BARRIER", "__syncthreads();"), 2, 1000, short=8)
    assert caught.value.kind == "out_of_bounds"
