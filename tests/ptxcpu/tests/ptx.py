"""Small PTX kernels for tests."""

import numpy as np

from ptxcpu import Module

REGISTER = {1: "b16", 2: "b16", 4: "b32", 8: "b64"}


def elementwise(body: str, inputs: list[np.ndarray], out_dtype, out_count: int | None = None) -> np.ndarray:
    """One thread per element: %a, %b, %c hold the inputs, the body leaves its result in %d; %p0-3, %x0-3 are free."""
    n = len(inputs[0])
    out = np.zeros(n if out_count is None else out_count, out_dtype)
    params = ", ".join([".param .u64 out", *(f".param .u64 in{i}" for i in range(len(inputs))), ".param .u32 n"])
    loads = ""
    for i, (name, array) in enumerate(zip("abc", inputs, strict=False)):
        size = array.dtype.itemsize
        loads += f"""
  .reg .{REGISTER[size]} %{name};
  ld.param.u64 %addr, [in{i}]; mad.wide.u32 %addr, %i, {size}, %addr; ld.global.b{size * 8} %{name}, [%addr];"""
    size = out.dtype.itemsize
    text = f""".version 8.0
.target sm_80
.address_size 64
.visible .entry k({params}) {{
  .reg .pred %p<4>; .reg .pred %q; .reg .b32 %x<4>; .reg .b16 %h<4>; .reg .b64 %l<4>; .reg .b32 %i, %n, %t;
  .reg .b64 %addr; .reg .{REGISTER[size]} %d;
  mov.u32 %i, %ctaid.x; mov.u32 %t, %ntid.x; mul.lo.u32 %i, %i, %t; mov.u32 %t, %tid.x; add.u32 %i, %i, %t;
  ld.param.u32 %n, [n]; setp.ge.u32 %q, %i, %n; @%q ret;
  {loads}
  {body}
  ld.param.u64 %addr, [out]; mad.wide.u32 %addr, %i, {size}, %addr; st.global.b{size * 8} [%addr], %d;
  ret;
}}
"""
    Module(text).launch("k", -(-n // 128), 128, [out, *inputs, n])
    return out


def warp_kernel(body: str, out_words: int = 32, threads: int = 32, shared: int = 0, version: str = "sm_80") -> str:
    """A kernel k(out, in) with %tid in %t, %lane in %l; the body ends by itself."""
    memory = f".shared .align 16 .b8 sm[{shared}];" if shared else ""
    body = body.replace(";", ";\n")  # one instruction per line: faults name the line
    return f""".version 8.0
.target {version}
.address_size 64
.visible .entry k(.param .u64 out, .param .u64 in) {{
  .reg .pred %p<8>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<8>; .reg .b32 %t, %l, %w;
  .reg .b64 %out, %in; {memory}
  mov.u32 %t, %tid.x; and.b32 %l, %t, 31; shr.u32 %w, %t, 5;
  ld.param.u64 %out, [out]; ld.param.u64 %in, [in];
  {body}
  ret;
}}
"""
