"""Seeded bugs: each is found, with its kind, its PTX line and its thread; the corrected kernel passes."""

import numpy as np
import pytest

from ptxcpu import Module, PtxFault
from ptxcpu.tests.ptx import warp_kernel

IN = np.arange(512, dtype=np.uint32)

REVERSE = """mov.u32 %r0, sm;
  mad.wide.u32 %rd0, %t, 4, %in; ld.global.b32 %r1, [%rd0]; mad.lo.u32 %r2, %t, 4, %r0;
  st.shared.b32 [%r2], %r1;
  bar.sync 0;
  xor.b32 %r3, %t, 127; mad.lo.u32 %r4, %r3, 4, %r0;
  ld.shared.b32 %r5, [%r4];
  mad.wide.u32 %rd1, %t, 4, %out; st.global.b32 [%rd1], %r5;"""

ASYNC = """mov.u32 %r0, sm; mad.wide.u32 %rd0, %t, 16, %in; mad.lo.u32 %r2, %t, 16, %r0;
  cp.async.cg.shared.global [%r2], [%rd0], 16; cp.async.commit_group;
  cp.async.wait_group 0;
  bar.sync 0;
  xor.b32 %r3, %t, 127; mad.lo.u32 %r4, %r3, 16, %r0; ld.shared.b32 %r5, [%r4];
  mad.wide.u32 %rd1, %t, 4, %out; st.global.b32 [%rd1], %r5;"""


def run(body, threads=128, shared=2048, out_count=128, source=IN, **options):
    out = np.zeros(out_count, np.uint32)
    Module(warp_kernel(body, shared=shared)).launch("k", 1, threads, [out, source], **options)
    return out


def fault(body, **options):
    with pytest.raises(PtxFault) as error:
        run(body, **options)
    assert error.value.kernel == "k" and error.value.line > 0
    return error.value


def test_correct_kernels_pass():
    assert (run(REVERSE) == IN[127::-1]).all()
    assert (run(REVERSE, lane_order="reverse") == IN[127::-1]).all()
    assert (run(ASYNC) == 4 * IN[127::-1]).all()


def test_missing_barrier():
    found = fault(REVERSE.replace("bar.sync 0;", ""))
    assert found.kind in ("race", "uninitialised") and "ld.shared" in found.instruction
    found = fault(REVERSE.replace("bar.sync 0;", ""), ignore=["uninitialised"], lane_order="reverse")
    assert found.kind == "race"


def test_missing_barrier_before_reuse():
    twice = REVERSE + "add.u32 %r1, %r1, 7; st.shared.b32 [%r2], %r1;"
    assert fault(twice).kind == "race"
    run(REVERSE + "bar.sync 0; add.u32 %r1, %r1, 7; st.shared.b32 [%r2], %r1;")
    run(twice, ignore=["race"])


def test_replicated_writes_are_fine_unless_strict():
    body = "mov.u32 %r0, sm; st.shared.b32 [%r0], 5;"
    run(body)
    assert fault(body, strict_races=True).kind == "race"


@pytest.mark.parametrize("count,kind", [(127, "out_of_bounds"), (128, None)])
def test_out_of_bounds_store(count, kind):
    if kind is None:
        run(REVERSE, out_count=count)
        return
    found = fault(REVERSE, out_count=count)
    assert (
        found.kind == kind
        and found.thread == (127, 0, 0)
        and "argument #0" in str(found)
        and "st.global" in found.instruction
    )


def test_out_of_bounds_load_and_read_only():
    assert fault(REVERSE, source=IN[:100]).kind == "out_of_bounds"
    frozen = np.zeros(128, np.uint32)
    frozen.flags.writeable = False
    with pytest.raises(PtxFault) as error:
        Module(warp_kernel(REVERSE, shared=512)).launch("k", 1, 128, [frozen, IN])
    assert error.value.kind == "read_only"


def test_bounds_are_those_of_the_view():
    base = np.zeros(256, np.uint32)
    Module(warp_kernel(REVERSE, shared=512)).launch("k", 1, 128, [base[64:192], IN])
    with pytest.raises(PtxFault):
        Module(warp_kernel(REVERSE, shared=512)).launch("k", 1, 128, [base[64:191], IN])


@pytest.mark.slow
def test_misaligned():
    assert fault(REVERSE.replace("[%rd0]", "[%rd0+2]")).kind == "misaligned"
    assert fault(REVERSE.replace("[%r4]", "[%r4+2]")).kind == "misaligned"


def test_shared_bounds():
    assert fault(REVERSE, shared=508).kind == "shared_bounds"


def test_uninitialised_shared_read():
    found = fault(
        REVERSE.replace("st.shared.b32 [%r2], %r1;", "setp.lt.u32 %p0, %t, 127; @%p0 st.shared.b32 [%r2], %r1;")
    )
    assert found.kind == "uninitialised" and found.thread == (0, 0, 0)


@pytest.mark.slow
def test_missing_cp_async_wait():
    found = fault(ASYNC.replace("cp.async.wait_group 0;", ""))
    assert found.kind == "async_pending" and "cp.async" in str(found)
    assert fault(ASYNC.replace("wait_group 0", "wait_group 1")).kind == "async_pending"


def test_cp_async_wait_without_barrier():
    assert fault(ASYNC.replace("bar.sync 0;", "")).kind in ("race", "async_pending", "uninitialised")


@pytest.mark.slow
def test_cp_async_zero_fill_and_ignore_source():
    body = ASYNC.replace("[%rd0], 16;", "[%rd0], 16, %r9;").replace(
        "mov.u32 %r0, sm;", "mov.u32 %r0, sm; mov.b32 %r9, 0;"
    )
    assert (run(body, source=IN[:4].copy()) == 0).all()
    four = body.replace("mov.b32 %r9, 0;", "mov.b32 %r9, 4;").replace(
        "ld.shared.b32 %r5, [%r4];", "ld.shared.b32 %r5, [%r4+4];"
    )
    assert (run(four) == 0).all()
    ignored = ASYNC.replace("[%rd0], 16;", "[%rd0], 16, %p1;").replace(
        "mov.u32 %r0, sm;", "mov.u32 %r0, sm; setp.ge.u32 %p1, %t, 64;"
    )
    assert (run(ignored) == np.where(IN[127::-1] >= 64, 0, 4 * IN[127::-1])).all()


def test_divergent_barrier():
    found = fault("setp.lt.u32 %p0, %t, 64; @%p0 bar.sync 0;")
    assert found.kind == "divergent_barrier" and "exited" in str(found)
    run("setp.lt.u32 %p0, %t, 64; @%p0 bar.sync 0;", ignore=["exited_barrier"])
    two = "setp.lt.u32 %p0, %l, 16; @%p0 bra A;\n bar.sync 0; bra B;\n A: bar.sync 0;\n B: mov.u32 %r1, 0;"
    assert fault(two).kind == "divergent_barrier"


def test_deadlock_and_endless_loop():
    assert fault("bar.sync 1, 256;").kind in ("deadlock", "divergent_barrier")
    found = fault("AGAIN: bra AGAIN;", timeout=0.3)
    assert found.kind == "timeout"


def test_spin_wait_within_a_block_makes_progress():
    body = """mov.u32 %r0, sm; setp.eq.u32 %p0, %t, 96; setp.eq.u32 %p1, %t, 0;
      @%p1 st.shared.b32 [%r0], 0; bar.sync 0; @%p0 st.volatile.shared.b32 [%r0], 1;
      @%p0 bra END; WAIT: ld.volatile.shared.b32 %r1, [%r0]; setp.eq.u32 %p2, %r1, 0; @%p2 bra WAIT;
      END: mov.u32 %r1, 0;"""
    run(body, timeout=20)


def test_trap_and_launch_errors():
    assert fault("trap;").kind == "trap"
    module = Module(warp_kernel(REVERSE, shared=512))
    with pytest.raises(TypeError, match="takes 2 arguments"):
        module.launch("k", 1, 128, [IN])
    with pytest.raises(ValueError, match="cannot be launched"):
        module.launch("k", 1, 2048, [IN, IN])
    with pytest.raises(KeyError):
        module.launch("other", 1, 32, [])


def test_counts():
    out = np.zeros(128, np.uint32)
    stats = Module(warp_kernel(REVERSE, shared=512)).launch("k", 3, 128, [out, IN], workers=1)
    assert (stats.global_load_bytes, stats.global_store_bytes) == (3 * 512, 3 * 512)
    assert (stats.shared_load_bytes, stats.shared_store_bytes, stats.barriers) == (3 * 512, 3 * 512, 3)
