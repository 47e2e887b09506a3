"""The build cache: one build however many processes ask, nothing half-written, errors are typed."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ptxcpu import Module, PtxBuildError, PtxUnsupported, build
from ptxcpu.tests.ptx import warp_kernel

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np
from ptxcpu.tests.ptx import warp_kernel
from ptxcpu import Module
out = np.zeros(32, np.uint32)
Module(warp_kernel("mad.wide.u32 %rd0, %t, 4, %out; st.global.b32 [%rd0], %t;")).launch("k", 1, 32, [out, out])
assert (out == np.arange(32)).all()
"""


@pytest.mark.slow
def test_processes_share_one_build(tmp_path, monkeypatch):
    script = SCRIPT.format(tests=str(Path(__file__).parents[2]))
    monkeypatch.setenv("PTXCPU_CACHE", str(tmp_path))
    running = [subprocess.Popen([sys.executable, "-B", "-c", script]) for _ in range(4)]
    assert [p.wait() for p in running] == [0] * 4
    assert len(list(tmp_path.glob("*.so"))) == 2 and not list(tmp_path.rglob("*.tmp"))


def test_compiler_errors_are_typed():
    with pytest.raises(PtxBuildError, match="error"):
        build.build("this is not C++")


def test_modules_hold_several_kernels_and_inline_scopes():
    text = warp_kernel("""mov.u32 %r1, %t; { .reg .b32 %r1; mov.u32 %r1, 99; { .reg .pred %q;
      setp.eq.u32 %q, %t, 0; @%q bra L; mov.u32 %r1, 7; L: } }
      { .reg .pred %q; setp.eq.u32 %q, %t, 1; @%q bra L; add.u32 %r1, %r1, 100; L: }
      mad.wide.u32 %rd0, %t, 4, %out; st.global.b32 [%rd0], %r1;""")
    second = (
        text[text.index(".visible") :]
        .replace("entry k(", "entry k2(")
        .replace("add.u32 %r1, %r1, 100", "add.u32 %r1, %r1, 200")
    )
    module = Module(text + second)
    assert module.kernels == ["k", "k2"]
    out = np.zeros(32, np.uint32)
    for name, step in (("k", 100), ("k2", 200)):
        module.launch(name, 1, 32, [out, out])
        lanes = np.arange(32)
        assert (out == lanes + np.where(lanes == 1, 0, step)).all()


def test_external_calls_are_refused():
    text = warp_kernel("{ .param .b32 r; call.uni (r), elsewhere, (); }").replace(
        ".visible", ".extern .func (.param .b32 r) elsewhere ();\n.visible", 1
    )
    with pytest.raises(PtxUnsupported, match="elsewhere"):
        Module(text).prepare("k")
