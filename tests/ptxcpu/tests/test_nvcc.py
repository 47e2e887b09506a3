"""CUDA C++ through nvcc. Skipped where nvcc is missing."""

import struct
from pathlib import Path

import numpy as np
import pytest

from ptxcpu import Module, PtxFault
from ptxcpu.nvcc import compile_ptx, find_nvcc

pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
KERNELS = Path(__file__).parent / "kernels"
rng = np.random.default_rng(5)


@pytest.fixture(scope="module", params=[75, 80])
def features(request):
    return Module(compile_ptx(KERNELS / "features.cu", request.param))


def test_device_functions_constants_globals(features):
    out, pairs = np.zeros(64, np.int32), rng.standard_normal((64, 2)).astype(np.float32)
    want = pairs * np.float32([1, 2, 4, 8])[np.arange(64) % 4, None]
    features.launch("functions", 1, 64, [out, pairs])
    fibonacci = [0, 1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89]
    assert (out == np.array(fibonacci)[np.arange(64) % 12] + 5).all() and (pairs == want).all()
    features.memory["counter"].view(np.int32)[0] = 100
    features.launch("functions", 1, 64, [out, pairs])
    assert out[0] == 100
    features.memory["counter"].view(np.int32)[0] = 5


def test_local_memory(features):
    out = rng.integers(0, 32, 64).astype(np.int32)
    want = out * 3
    features.launch("local_array", 1, 64, [out, 3])
    assert (out == want).all()


def test_printf(features, capsys):
    stats = features.launch("print", 2, 32, [3], workers=1)
    assert stats.output == "".join(f"block {b} thread 1 text 4.50 {1 << 40}\n" for b in range(2))
    assert stats.output in capsys.readouterr().out


def test_assert_and_trap_name_the_source(features):
    features.launch("asserts", 1, 32, [32])
    with pytest.raises(PtxFault, match="threadIdx.x < n") as error:
        features.launch("asserts", 1, 32, [31])
    assert error.value.kind == "assert" and error.value.thread == (31, 0, 0) and "features.cu:" in str(error.value)
    with pytest.raises(PtxFault) as error:
        features.launch("traps", 1, 32, [7])
    assert error.value.kind == "trap" and "features.cu:" in error.value.source


def test_barrier_reductions(features):
    out = np.zeros(96, np.int32)
    features.launch("count", 1, 96, [out, 70])
    assert (out == 1070).all()


def test_dynamic_shared_memory(features):
    n = 50 * 1024
    out = np.zeros(n, np.float32)
    features.launch("dynamic_shared", 1, 256, [out, n], shared_bytes=4 * n)
    assert (out == np.arange(n)[::-1]).all()
    with pytest.raises(PtxFault) as error:
        features.launch("dynamic_shared", 1, 256, [out, n], shared_bytes=4 * n - 4)
    assert error.value.kind == "shared_bounds"
    with pytest.raises(ValueError, match="exceed"):
        features.launch("dynamic_shared", 1, 256, [out, n], shared_bytes=228 * 1024)


def test_packed_half_arithmetic(features):
    torch = pytest.importorskip("torch")
    a, b = (rng.standard_normal(256).astype(np.float16) for _ in "ab")
    c, d = (torch.randn(256).bfloat16() for _ in "cd")
    o, p = np.zeros(256, np.float16), torch.zeros(256, dtype=torch.bfloat16)
    features.launch("packed", 1, 128, [a, b, o, c, d, p])
    fused = np.clip((a.astype(np.float64) * b + a).astype(np.float16), 0, 6)
    chosen = np.repeat((a > b)[::2], 2)
    assert (o == np.where(chosen, fused, a + b)).all()
    want = (c.double() * d.double() + d.double()).bfloat16()
    exact = features.program.target == "sm_80"  # below, two roundings: f32, then bf16
    assert torch.equal(p, want) if exact else torch.allclose(p.float(), want.float(), rtol=1e-2)


def test_wide_integers_and_doubles(features):
    a, b = rng.integers(-(2**62), 2**62, 64), rng.integers(1, 2**40, 64)
    o, r = np.zeros(64, np.int64), np.zeros(64)
    features.launch("arithmetic", 1, 64, [a, b, o, r])
    for i, (x, y) in enumerate(zip(a.tolist(), b.tolist(), strict=False)):
        quotient = abs(x) // y * (1 if x > 0 else -1)
        want = (
            quotient
            + (x - quotient * y) * 3
            + (x * y >> 64)
            + ((x % 2**32) * (y % 2**32) >> 32)
            + bin(x % 2**64).count("1")
            + 64
            - y.bit_length()
        )
        assert (int(o[i]) - want) % 2**64 == 0
    i = np.arange(64)
    assert np.allclose(
        r,
        np.sqrt(np.abs(a.astype(np.float64))) + np.sin(i) + np.exp(-i.astype(float)) + i / 3 + b.astype(np.float32),
        rtol=1e-6,
    )


def test_struct_by_value(features):
    out = np.full(32, -1, np.float32)
    features.launch("by_value", 1, 32, [out, struct.pack("<iif", 3, 5, 0.5)])
    assert (out[:15] == np.repeat([0, 0.5, 1], 5)).all() and (out[15:] == -1).all()


def test_reduction_by_the_last_block(features):
    x, result, partial, ticket = (
        rng.standard_normal(10000).astype(np.float32),
        np.zeros(1, np.float32),
        np.zeros(16, np.float32),
        np.zeros(1, np.uint32),
    )
    features.launch("reduce", 16, 128, [x, result, partial, ticket, len(x)], workers=4)
    assert np.isclose(result[0], x.astype(np.float64).sum(), atol=1e-2) and ticket[0] == 16


def relu6(v):
    return np.clip(v, 0, 6)


def fused_case(H=13, W=10, CI=32, CE=72, N=2, defines=()):
    x = rng.standard_normal((N, H, W, CI)).astype(np.float16)
    w1 = (rng.standard_normal((CE, CI)) / CI**0.5).astype(np.float16)
    b1, b2 = (rng.standard_normal(CE).astype(np.float32) for _ in "ab")
    w2 = (rng.standard_normal((9, CE)) / 3).astype(np.float32)
    y = np.full((N, H, W, CE), np.nan, np.float16)
    module = Module(compile_ptx(KERNELS / "fused.cu", 80, defines=defines))
    stats = module.launch(
        "fused", (-(-H // 6) * -(-W // 6), -(-CE // 32), N), 128, [x, w1, b1, w2, b2, y, H, W, CI, CE]
    )
    hidden = relu6(x.astype(np.float64) @ w1.astype(np.float64).T + b1).astype(np.float16)
    padded = np.pad(hidden, ((0, 0), (1, 1), (1, 1), (0, 0))).astype(np.float64)
    want = relu6(sum(padded[:, k // 3 : k // 3 + H, k % 3 : k % 3 + W] * w2[k] for k in range(9)) + b2)
    return np.abs(y - want).max(), stats


@pytest.mark.slow
def test_fused_kernel():
    error, stats = fused_case()
    assert error < 5e-3 and stats.mma == 6 * 3 * 2 * 4 * 2 * 4  # blocks * warps * k steps * column tiles


@pytest.mark.slow
@pytest.mark.parametrize(
    "bug,kinds", [("BUG_NO_WAIT", ["async_pending"]), ("BUG_NO_BARRIER", ["uninitialised", "race", "async_pending"])]
)
def test_fused_kernel_bugs(bug, kinds):
    with pytest.raises(PtxFault) as error:
        fused_case(defines=[bug])
    assert error.value.kind in kinds and "fused.cu:" in str(error.value)
