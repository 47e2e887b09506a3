"""Warp-wide instructions, barriers and atomics."""

import numpy as np
import pytest

from ptxcpu import Module, PtxFault
from ptxcpu.tests.ptx import warp_kernel

STORE = "mad.wide.u32 %rd0, %t, 4, %out; st.global.b32 [%rd0], {};"
LANES = np.arange(32)
IN = np.zeros(32, np.uint32)


def run(body, threads=32, out=None, grid=1, **kwargs):
    out = np.zeros(threads, np.uint32) if out is None else out
    Module(warp_kernel(body, **kwargs)).launch("k", grid, threads, [out, IN])
    return out


@pytest.mark.parametrize(
    "mode,b,c,source",
    [
        ("down", 3, 31, lambda lane: np.where(lane + 3 <= 31, lane + 3, lane)),
        ("up", 2, 0, lambda lane: np.where(lane >= 2, lane - 2, lane)),
        ("bfly", 5, 31, lambda lane: lane ^ 5),
        ("idx", 7, 31, lambda lane: lane * 0 + 7),
        ("down", 4, 0x181F, lambda lane: np.where(lane % 8 + 4 < 8, lane + 4, lane)),
    ],
)
def test_shuffle(mode, b, c, source):
    got = run(f"mul.lo.u32 %r0, %t, 10; shfl.sync.{mode}.b32 %r1|%p0, %r0, {b}, {c}, -1;" + STORE.format("%r1"))
    assert (got == source(LANES) * 10).all()


@pytest.mark.slow
def test_vote_match_redux():
    odd = "and.b32 %r0, %t, 1; setp.eq.u32 %p0, %r0, 1;"
    assert (run(odd + "vote.sync.ballot.b32 %r1, %p0, -1;" + STORE.format("%r1")) == 0xAAAAAAAA).all()
    assert (run(odd + "vote.sync.any.pred %p1, %p0, -1; selp.b32 %r1, 1, 0, %p1;" + STORE.format("%r1")) == 1).all()
    assert (run(odd + "vote.sync.all.pred %p1, %p0, -1; selp.b32 %r1, 1, 0, %p1;" + STORE.format("%r1")) == 0).all()
    assert (run("redux.sync.add.s32 %r1, %t, -1;" + STORE.format("%r1")) == 496).all()
    got = run("shr.u32 %r0, %t, 3; match.any.sync.b32 %r1, %r0, -1;" + STORE.format("%r1"))
    assert (got == 0xFF << (LANES // 8 * 8).astype(np.uint64)).all()


def test_partial_mask_in_divergent_code():
    body = (
        "setp.lt.u32 %p0, %t, 16; mov.b32 %r1, 77; @!%p0 bra SKIP; shfl.sync.bfly.b32 %r1, %t, 1, 31, 0xffff; SKIP: "
        + STORE.format("%r1")
    )
    assert (run(body) == np.where(LANES < 16, LANES ^ 1, 77)).all()


def test_missing_lanes_are_reported():
    with pytest.raises(PtxFault) as error:
        run(
            "setp.lt.u32 %p0, %t, 16; @!%p0 bra OUT; OUT2: shfl.sync.bfly.b32 %r1, %t, 1, 31, -1; "
            "OUT: bar.warp.sync -1; " + STORE.format("%r1")
        )
    assert error.value.kind == "divergent_warp"


@pytest.mark.slow
def test_barrier_reduction_and_named_barriers():
    body = "and.b32 %r0, %t, 3; setp.eq.u32 %p0, %r0, 0; bar.red.popc.u32 %r1, 0, %p0;" + STORE.format("%r1")
    assert (run(body, threads=128) == 32).all()
    producer = """setp.lt.u32 %p0, %t, 32; mov.u32 %r3, sm; mad.lo.u32 %r4, %l, 4, %r3; @!%p0 bra READ;
      add.u32 %r5, %l, 100; st.shared.b32 [%r4], %r5; bar.arrive 1, 64; mov.b32 %r6, 0; bra DONE;
      READ: bar.sync 1, 64; ld.shared.b32 %r6, [%r4]; DONE: """ + STORE.format("%r6")
    got = run(producer, threads=64, shared=128)
    assert (got[32:] == LANES + 100).all()
    with pytest.raises(PtxFault) as error:
        run(producer.replace("bar.sync 1, 64;", "").replace("bar.arrive 1, 64;", ""), threads=64, shared=128)
    assert error.value.kind in ("race", "uninitialised")


@pytest.mark.parametrize(
    "kind,dtype,values",
    [
        ("f32", np.float32, 0.5),
        ("u32", np.uint32, 3),
        ("s32", np.int32, -3),
        ("u64", np.uint64, 5),
        ("f16", np.float16, 0.5),
        ("f64", np.float64, 0.25),
    ],
)
def test_global_atomic_add(kind, dtype, values):
    out, item = np.zeros(4, dtype), np.full(32, values, dtype)
    size = item.dtype.itemsize
    register = {2: "b16", 4: "b32", 8: "b64"}[size]
    noftz = ".noftz" if kind == "f16" else ""
    body = f""".reg .{register} %v; ld.global.b{size * 8} %v, [%in]; and.b32 %r0, %t, 3;
      mad.wide.u32 %rd0, %r0, {size}, %out;
      red.global.add{noftz}.{kind} [%rd0], %v;"""
    Module(warp_kernel(body)).launch("k", 4, 256, [out, item])
    assert (out == dtype(values * 256) if kind[0] != "s" else out == -768).all()


def test_atomic_min_max_cas_exch():
    out = np.array([50, 50, 7, 0], np.int32)
    body = """add.s32 %r0, %t, 20; atom.global.min.s32 %r1, [%out], %r0; atom.global.max.s32 %r1, [%out+4], %r0;
      atom.global.cas.b32 %r2, [%out+8], 7, 99; atom.global.exch.b32 %r3, [%out+12], 1;"""
    Module(warp_kernel(body)).launch("k", 1, 64, [out, IN])
    assert out.tolist() == [20, 83, 99, 1]


def test_shared_atomics_are_no_race():
    body = """mov.u32 %r3, sm; setp.eq.u32 %p0, %t, 0; @%p0 st.shared.b32 [%r3], 0; bar.sync 0;
      red.shared.add.u32 [%r3], 1; bar.sync 0;
      ld.shared.b32 %r6, [%r3]; """ + STORE.format("%r6")
    assert (run(body, threads=256, shared=16) == 256).all()


def test_last_block_done():
    """Partial results, __threadfence, ticket: the last block sums; blocks run on several cores."""
    out = np.zeros(66, np.uint32)  # [0] ticket, [1] result, [2..] partial results
    body = """.reg .b32 %c, %n; mov.u32 %c, %ctaid.x; mov.u32 %n, %nctaid.x; mul.lo.u32 %r0, %c, %c;
      mad.wide.u32 %rd0, %c, 4, %out;
      st.global.b32 [%rd0+8], %r0; membar.gl; atom.global.inc.u32 %r1, [%out], 1000; sub.u32 %r2, %n, 1;
      setp.ne.u32 %p0, %r1, %r2; @%p0 bra END;
      mov.u32 %r3, 0; mov.u32 %r4, 0; LOOP: mad.wide.u32 %rd1, %r3, 4, %out; ld.volatile.global.b32 %r5, [%rd1+8];
      add.u32 %r4, %r4, %r5;
      add.u32 %r3, %r3, 1; setp.lt.u32 %p1, %r3, %n; @%p1 bra LOOP; st.global.b32 [%out+4], %r4; END:"""
    for _ in range(5):
        out[:] = 0
        Module(warp_kernel(body)).launch("k", 64, 1, [out, IN], workers=4)
        assert out[1] == (np.arange(64) ** 2).sum()
