"""ldmatrix and mma.sync against numpy, with fragments placed as the PTX ISA documents them."""

import numpy as np
import pytest

from ptxcpu import Module
from ptxcpu.tests.ptx import warp_kernel

rng = np.random.default_rng(3)
G, T = np.arange(32) // 4, np.arange(32) % 4


def words(values):
    """Packs the last axis of small elements into 32-bit words."""
    return np.ascontiguousarray(values).view(np.uint32)


def fragments(a, b, per):
    """A[16][K], B[K][8] -> words [lane][register] of m16n8kK."""
    k = a.shape[1]
    registers_b = k // (4 * per)
    fa = np.stack(
        [
            [
                words(a[G[lane] + 8 * (r & 1), (r >> 1) * 4 * per + T[lane] * per :][:per])[0]
                for r in range(2 * registers_b)
            ]
            for lane in range(32)
        ]
    )
    fb = np.stack(
        [[words(b[r * 4 * per + T[lane] * per :][:per, G[lane]])[0] for r in range(registers_b)] for lane in range(32)]
    )
    return fa.astype(np.uint32), fb.astype(np.uint32)


def run_mma(name, fa, fb, fc, result_type="b32"):
    na, nb, nc = fa.shape[1], fb.shape[1], fc.shape[1]
    total = na + nb + nc
    loads = "".join(f"ld.global.b32 %r{i}, [%rd0+{4 * i}];" for i in range(total))

    def group(base, n):
        return "{" + ", ".join(f"%r{base + i}" for i in range(n)) + "}"

    body = (
        f"mad.wide.u32 %rd0, %t, {4 * total}, %in; {loads} "
        f"{name} {group(20, nc)}, {group(0, na)}, {group(na, nb)}, {group(na + nb, nc)};"
        f"mad.wide.u32 %rd1, %t, {4 * nc}, %out;"
        + "".join(f"st.global.b32 [%rd1+{4 * i}], %r{20 + i};" for i in range(nc))
    )
    out = np.zeros((32, nc), np.uint32)
    stats = Module(warp_kernel(body)).launch("k", 1, 32, [out, np.ascontiguousarray(np.concatenate([fa, fb, fc], 1))])
    assert stats.mma == 1
    return out


def accumulator(c):
    return np.stack([[c[G[lane] + 8 * (i >> 1), 2 * T[lane] + (i & 1)] for i in range(4)] for lane in range(32)])


def tf32(x):
    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def bf16(x):
    return (x.view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("kind,k", [("f16", 16), ("f16", 8), ("bf16", 16), ("bf16", 8), ("tf32", 8), ("tf32", 4)])
def test_f32_accumulator(kind, k):
    a, b = rng.standard_normal((16, k)).astype(np.float32), rng.standard_normal((k, 8)).astype(np.float32)
    c = rng.standard_normal((16, 8)).astype(np.float32)
    if kind == "f16":
        x, y, per = a.astype(np.float16), b.astype(np.float16), 2
        a, b = x.astype(np.float64), y.astype(np.float64)
    elif kind == "bf16":
        x, y, per = bf16(a), bf16(b), 2
        a, b = ((v.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for v in (x, y))
    else:
        x, y, per = a, b, 1
        a, b = tf32(a).astype(np.float64), tf32(b).astype(np.float64)
    got = run_mma(
        f"mma.sync.aligned.m16n8k{k}.row.col.f32.{kind}.{kind}.f32",
        *fragments(x, y, per),
        accumulator(c).view(np.uint32),
    )
    assert (got.view(np.float32) == accumulator((a @ b + c).astype(np.float32))).all()


@pytest.mark.parametrize("k", [8, 16])
def test_f16_accumulator(k):
    a, b = rng.standard_normal((16, k)).astype(np.float16), rng.standard_normal((k, 8)).astype(np.float16)
    c = rng.standard_normal((16, 8)).astype(np.float16)
    got = run_mma(f"mma.sync.aligned.m16n8k{k}.row.col.f16.f16.f16.f16", *fragments(a, b, 2), words(accumulator(c)))
    want = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(np.float16)
    assert (got.view(np.float16) == accumulator(want)).all()


@pytest.mark.parametrize("kind,dtype", [("s8", np.int8), ("u8", np.uint8)])
@pytest.mark.parametrize("k", [16, 32])
def test_int8(kind, dtype, k):
    info = np.iinfo(dtype)
    a, b = (rng.integers(info.min, info.max + 1, s).astype(dtype) for s in ((16, k), (k, 8)))
    c = rng.integers(-1000, 1000, (16, 8)).astype(np.int32)
    got = run_mma(
        f"mma.sync.aligned.m16n8k{k}.row.col.s32.{kind}.{kind}.s32", *fragments(a, b, 4), accumulator(c).view(np.uint32)
    )
    assert (got.view(np.int32) == accumulator(a.astype(np.int32) @ b.astype(np.int32) + c)).all()


@pytest.mark.parametrize("acc", ["f32", "f16"])
def test_m8n8k4(acc):
    """sm_70: four 8x8x4 products a warp, A row-major, B column-major; quad pair q: lanes 4q..4q+3, 4q+16..4q+19."""
    a, b = rng.standard_normal((4, 8, 4)).astype(np.float16), rng.standard_normal((4, 4, 8)).astype(np.float16)
    c = rng.standard_normal((4, 8, 8)).astype(np.float32 if acc == "f32" else np.float16)
    want = (a.astype(np.float64) @ b.astype(np.float64) + c).astype(c.dtype)
    fa, fb = np.zeros((32, 2), np.uint32), np.zeros((32, 2), np.uint32)
    fc, fw = np.zeros((32, 8), c.dtype), np.zeros((32, 8), c.dtype)
    for lane in range(32):
        q, row = lane % 16 // 4, lane % 4 + (4 if lane >= 16 else 0)
        fa[lane], fb[lane] = words(a[q, row]), words(b[q, :, row])
        for i in range(8):
            if acc == "f32":
                r = (lane & 1) + (i & 2) + (4 if lane >= 16 else 0)
                col = (i & 4) + (lane & 2) + (i & 1)
            else:
                r, col = row, i
            fc[lane, i], fw[lane, i] = c[q, r, col], want[q, r, col]
    got = run_mma(f"mma.sync.aligned.m8n8k4.row.col.{acc}.f16.f16.{acc}", fa, fb, words(fc))
    assert (got.view(c.dtype) == fw).all()


def test_f64():
    a, b, c = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    packed = np.stack(
        [
            [a[G[lane], T[lane]], b[T[lane], G[lane]], c[G[lane], 2 * T[lane]], c[G[lane], 2 * T[lane] + 1]]
            for lane in range(32)
        ]
    )
    body = """.reg .f64 %d<8>; mad.wide.u32 %rd0, %t, 32, %in; ld.global.v2.f64 {%d0, %d1}, [%rd0];
      ld.global.v2.f64 {%d2, %d3}, [%rd0+16];
      mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%d4, %d5}, {%d0}, {%d1}, {%d2, %d3};
      mad.wide.u32 %rd1, %t, 16, %out; st.global.v2.f64 [%rd1], {%d4, %d5};"""
    out = np.zeros((32, 2))
    Module(warp_kernel(body)).launch("k", 1, 32, [out, packed])
    want = a @ b + c
    assert np.allclose(
        out, [[want[G[lane], 2 * T[lane]], want[G[lane], 2 * T[lane] + 1]] for lane in range(32)], atol=1e-14
    )


@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix(count, trans):
    tile = rng.integers(0, 2**16, (count, 8, 8), dtype=np.uint16)
    registers = ", ".join(f"%r{10 + i}" for i in range(count))
    body = (
        "mov.u32 %r0, sm; mad.lo.u32 %r1, %l, 16, %r0; mad.wide.u32 %rd0, %l, 16, %in;"
        f"setp.lt.u32 %p0, %l, {8 * count}; @%p0 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd0];"
        "@%p0 st.shared.v4.b32 [%r1], {%r4, %r5, %r6, %r7}; bar.warp.sync -1;"
        f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{registers}}}, [%r1];"
        f"mad.wide.u32 %rd1, %t, {4 * count}, %out;"
        + "".join(f"st.global.b32 [%rd1+{4 * i}], %r{10 + i};" for i in range(count))
    )
    out = np.zeros((32, count, 2), np.uint16)
    Module(warp_kernel(body, shared=512)).launch("k", 1, 32, [out, tile])
    source = tile.transpose(0, 2, 1) if trans else tile
    assert (out == np.stack([source[:, G[lane], 2 * T[lane] : 2 * T[lane] + 2] for lane in range(32)])).all()


def test_stmatrix_inverts_ldmatrix():
    tile = rng.integers(0, 2**16, (4, 8, 8), dtype=np.uint16)
    body = """mov.u32 %r0, sm; mad.lo.u32 %r1, %l, 16, %r0; mad.wide.u32 %rd0, %l, 16, %in;
      ld.global.v4.b32 {%r4, %r5, %r6, %r7}, [%rd0];
      st.shared.v4.b32 [%r1], {%r4, %r5, %r6, %r7}; bar.warp.sync -1;
      ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r1];
      stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%r1+512], {%r10, %r11, %r12, %r13}; bar.warp.sync -1;
      ld.shared.v4.b32 {%r4, %r5, %r6, %r7}, [%r1+512];
      mad.wide.u32 %rd1, %l, 16, %out; st.global.v4.b32 [%rd1], {%r4, %r5, %r6, %r7};"""
    out = np.zeros_like(tile)
    Module(warp_kernel(body, shared=1024, version="sm_90")).launch("k", 1, 32, [out, tile])
    assert (out == tile.transpose(0, 2, 1)).all()
