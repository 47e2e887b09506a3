"""Bit-exactness of arithmetic against numpy."""

from fractions import Fraction

import numpy as np
import pytest

from ptxcpu import Module, PtxUnsupported
from ptxcpu.tests.ptx import elementwise

rng = np.random.default_rng(7)
N = 4096
SPECIAL32 = np.array(
    [0, 0x80000000, 1, 0x80000001, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0x00800000, 0x3F800000], np.uint32
)


def floats(count=N):
    raw = rng.integers(0, 2**32, count, dtype=np.uint32)
    raw[::3] = rng.standard_normal(len(raw[::3])).astype(np.float32).view(np.uint32)
    raw[1 : 1 + len(SPECIAL32)] = SPECIAL32
    return raw.view(np.float32)


def halves(count=N):
    raw = rng.integers(0, 2**16, count, dtype=np.uint16)
    raw[:8] = [0, 0x8000, 1, 0x7BFF, 0x7C00, 0xFC00, 0x7E00, 0x3C00]
    return raw.view(np.float16)


def bf16_to_f64(raw):
    return (raw.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def f64_to_bf16(values):
    """Round to nearest even by comparing the two neighbours exactly."""
    f32 = values.astype(np.float32)
    toward = np.where(np.abs(f32.astype(np.float64)) > np.abs(values), f32.view(np.uint32) - 1, f32.view(np.uint32))
    inexact = toward.view(np.float32).astype(np.float64) != values
    odd = toward | inexact
    raw = (odd + 0x7FFF + ((odd >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FFF, raw).astype(np.uint16)


def same(a, b):
    """Equal bits, or both NaN."""
    nan = np.isnan(a) & np.isnan(b)
    return bool((nan | (a.view(f"u{a.itemsize}") == b.view(f"u{b.itemsize}"))).all())


@pytest.mark.parametrize("op", ["add", "sub", "mul", "div"])
def test_f32(op):
    a, b = floats(), floats()[::-1].copy()
    with np.errstate(all="ignore"):
        want = {"add": a + b, "sub": a - b, "mul": a * b, "div": a / b}[op]
    assert same(elementwise(f"{op}.rn.f32 %d, %a, %b;", [a, b], np.float32), want)


@pytest.mark.parametrize("op", ["add", "sub", "mul"])
def test_f16(op):
    a, b = halves(), halves()[::-1].copy()
    with np.errstate(all="ignore"):
        want = {"add": a + b, "sub": a - b, "mul": a * b}[op]
    assert same(elementwise(f"{op}.rn.f16 %d, %a, %b;", [a, b], np.float16), want)


def test_f16x2_and_saturation():
    a, b = halves(2 * N), halves(2 * N)[::-1].copy()
    words = [v.view(np.uint32) for v in (a, b)]
    with np.errstate(all="ignore"):
        assert same(elementwise("add.f16x2 %d, %a, %b;", words, np.uint32).view(np.float16), a + b)
        clamped = elementwise("mul.sat.f16 %d, %a, %b;", [a, b], np.float16)
        assert same(clamped, np.where(np.isnan(a * b), np.float16(0), np.clip(a * b, 0, 1)) + np.float16(0))


def nearest_half(exact):
    """The f16 nearest to a Fraction, ties to even, by comparing neighbours exactly."""
    guess = np.float16(float(exact))
    candidates = [np.nextafter(guess, np.float16(-np.inf)), guess, np.nextafter(guess, np.float16(np.inf))]
    return min(candidates, key=lambda h: (abs(Fraction(float(h)) - exact), int(h.view(np.uint16)) & 1))


def test_f16_fma_is_rounded_once():
    a, b, c = halves(), halves(), halves()
    with np.errstate(all="ignore"):
        c[::2] = -(a[::2].astype(np.float64) * b[::2]).astype(np.float16)  # cancellation
    got = elementwise("fma.rn.f16 %d, %a, %b, %c;", [a, b, c], np.float16)
    for x, y, z, result in zip(a, b, c, got, strict=False):
        if np.isfinite([x, y, z]).all():
            exact = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
            if 0 < abs(exact) < 60000:
                assert result == nearest_half(exact)


@pytest.mark.parametrize("op", ["add", "mul"])
def test_bf16(op):
    a, b = (rng.integers(0, 2**16, N, dtype=np.uint16) for _ in "ab")
    with np.errstate(all="ignore"):
        x, y = bf16_to_f64(a), bf16_to_f64(b)
        want = f64_to_bf16(x + y if op == "add" else x * y)
    got = elementwise(f"{op}.rn.bf16 %d, %a, %b;", [a, b], np.uint16)
    nan = want == 0x7FFF
    assert (got[~nan] == want[~nan]).all() and (got[nan] == 0x7FFF).all()


def test_fma_f32_against_long_double():
    a, b, c = (rng.standard_normal(N).astype(np.float32) for _ in "abc")
    exact = a.astype(np.longdouble) * b.astype(np.longdouble) + c.astype(np.longdouble)
    got = elementwise("fma.rn.f32 %d, %a, %b, %c;", [a, b, c], np.float32)
    assert np.abs(got - exact.astype(np.float32)).max() <= 1e-12 or same(got, exact.astype(np.float32))


@pytest.mark.parametrize("nan", ["", ".NaN"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extrema(op, nan):
    a, b = floats(), floats()[::-1].copy()
    a[:4], b[:4] = [0.0, -0.0, np.nan, 1.0], [-0.0, 0.0, 1.0, np.nan]
    got = elementwise(f"{op}{nan}.f32 %d, %a, %b;", [a, b], np.float32)
    reference = {"min": np.minimum if nan else np.fmin, "max": np.maximum if nan else np.fmax}[op]
    want = reference(a, b)
    zeros = (a == 0) & (b == 0)
    assert same(got[~zeros], want[~zeros])
    signed = np.signbit(a) | np.signbit(b) if op == "min" else np.signbit(a) & np.signbit(b)
    assert (np.signbit(got[zeros]) == signed[zeros]).all()


@pytest.mark.slow
def test_ftz_and_directed_rounding():
    a = np.array([1e-39, -1e-39, 1.0, 1.0], np.float32)
    b = np.array([1.0, 1.0, 2.0**-30, -(2.0**-30)], np.float32)
    assert elementwise("mul.ftz.f32 %d, %a, %b;", [a, b], np.float32)[:2].tolist() == [0.0, -0.0]
    up, down = (elementwise(f"add.{m}.f32 %d, %a, %b;", [a, b], np.float32) for m in ("rp", "rz"))
    assert (
        up[2] == np.nextafter(np.float32(1), np.float32(2))
        and down[2] == 1.0
        and down[3] == np.nextafter(np.float32(1), np.float32(0))
    )


@pytest.mark.parametrize("ptx,dtype", [("f16", np.float16), ("f64", np.float64)])
def test_cvt_from_f32(ptx, dtype):
    a = floats()
    with np.errstate(all="ignore"):
        assert same(elementwise(f"cvt.{'rn.' if ptx == 'f16' else ''}{ptx}.f32 %d, %a;", [a], dtype), a.astype(dtype))


def test_cvt_bf16_is_nearest_even():
    a = floats()
    got = elementwise("cvt.rn.bf16.f32 %d, %a;", [a], np.uint16)
    with np.errstate(all="ignore"):
        want = f64_to_bf16(a.astype(np.float64))
    assert (got == want).all()


def test_cvt_f64_to_f16_has_no_double_rounding():
    a = np.array([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-11, 65519.999999, 2.0**-25 + 2.0**-60], np.float64)
    assert same(elementwise("cvt.rn.f16.f64 %d, %a;", [a], np.float16), a.astype(np.float16))


def test_cvt_packed_relu_satfinite_tf32():
    a, b = np.float32([1.5, -2.0, 1e6, np.nan]), np.float32([-1.0, 3.25, -1e6, 2.0])
    got = elementwise("cvt.rn.relu.f16x2.f32 %d, %a, %b;", [a, b], np.uint32).view(np.float16).reshape(-1, 2)
    assert (
        got[0].tolist() == [0.0, 1.5]
        and got[1].tolist() == [3.25, 0.0]
        and got[2].tolist() == [0.0, np.inf]
        and np.isnan(got[3, 1])
    )
    one = np.float32([1 + 2.0**-11, 1 + 2.0**-12, -1 - 2.0**-11])
    assert elementwise("cvt.rna.tf32.f32 %d, %a;", [one], np.float32).tolist() == [1 + 2.0**-10, 1.0, -1 - 2.0**-10]


@pytest.mark.parametrize("mode,function", [("rni", np.rint), ("rzi", np.trunc), ("rmi", np.floor), ("rpi", np.ceil)])
def test_cvt_float_to_int(mode, function):
    a = np.concatenate(
        [rng.standard_normal(N).astype(np.float32) * 1000, np.float32([np.nan, np.inf, -np.inf, 3e9, -3e9, 2.5, -2.5])]
    )
    want = np.clip(
        function(np.nan_to_num(a.astype(np.float64), posinf=1e30, neginf=-1e30)), -(2**31), 2**31 - 1
    ).astype(np.int32)
    assert (elementwise(f"cvt.{mode}.s32.f32 %d, %a;", [a], np.int32) == want).all()


def test_cvt_integers():
    a = rng.integers(-(2**31), 2**31, N).astype(np.int32)
    assert (elementwise("cvt.s64.s32 %d, %a;", [a], np.int64) == a).all()
    assert (elementwise("cvt.u16.u32 %d, %a;", [a], np.uint16) == a.astype(np.uint16)).all()
    assert (elementwise("cvt.s32.s8 %d, %a;", [a], np.int32) == a.astype(np.int8)).all()
    assert (elementwise("cvt.sat.s8.s32 %x0, %a; cvt.s32.s8 %d, %x0;", [a], np.int32) == np.clip(a, -128, 127)).all()
    assert same(elementwise("cvt.rn.f32.s32 %d, %a;", [a], np.float32), a.astype(np.float32))
    assert same(elementwise("cvt.rn.f16.s32 %d, %a;", [a // 40000], np.float16), (a // 40000).astype(np.float16))


@pytest.mark.slow
def test_integer_arithmetic():
    a, b, c = (rng.integers(-(2**31), 2**31, N).astype(np.int32) for _ in "abc")
    wide = a.astype(np.int64) * b
    cases = {
        "add.s32 %d, %a, %b;": a + b,
        "sub.s32 %d, %a, %b;": a - b,
        "mul.lo.s32 %d, %a, %b;": wide.astype(np.int32),
        "mul.hi.s32 %d, %a, %b;": (wide >> 32).astype(np.int32),
        "mad.lo.s32 %d, %a, %b, %c;": (wide + c).astype(np.int32),
        "min.s32 %d, %a, %b;": np.minimum(a, b),
        "abs.s32 %d, %a;": np.abs(a),
        "neg.s32 %d, %a;": -a,
        "and.b32 %d, %a, %b;": a & b,
        "xor.b32 %d, %a, %b;": a ^ b,
        "not.b32 %d, %a;": ~a,
        "div.s32 %d, %a, %b;": np.trunc(a.astype(np.float64) / b).astype(np.int32),
        "rem.s32 %d, %a, %b;": np.fmod(a, b),
        "lop3.b32 %d, %a, %b, %c, 0xe8;": (a & b) | (a & c) | (b & c),
        "lop3.b32 %d, %a, %b, %c, 150;": a ^ b ^ c,
    }
    for body, want in cases.items():
        assert (elementwise(body, [a, b, c], np.int32) == want).all(), body
    assert (elementwise("mul.wide.s32 %d, %a, %b;", [a, b], np.int64) == wide).all()
    assert (
        elementwise("mul.hi.u32 %d, %a, %b;", [a, b], np.uint32)
        == (a.view(np.uint32).astype(np.uint64) * b.view(np.uint32) >> 32)
    ).all()
    assert (
        elementwise("add.cc.u32 %x0, %a, %b; addc.u32 %d, %c, 0;", [a, b, c], np.uint32)
        == (c.view(np.uint32) + ((a.view(np.uint32).astype(np.uint64) + b.view(np.uint32)) >> 32)).astype(np.uint32)
    ).all()


@pytest.mark.slow
def test_shifts_and_bit_fields():
    a, b = rng.integers(0, 2**32, N, dtype=np.uint32), rng.integers(0, 2**32, N, dtype=np.uint32)
    n = rng.integers(0, 40, N).astype(np.uint32)
    big = np.where(n < 32, a.astype(np.uint64) << n, 0).astype(np.uint32)
    assert (elementwise("shl.b32 %d, %a, %b;", [a, n], np.uint32) == big).all()
    assert (
        elementwise("shr.s32 %d, %a, %b;", [a, n], np.int32) == a.view(np.int32) >> np.minimum(n, 31).astype(np.int32)
    ).all()
    m = np.minimum(n, 32).astype(np.uint64)
    want = (((b.astype(np.uint64) << 32 | a) << m) >> 32).astype(np.uint32)
    assert (elementwise("shf.l.clamp.b32 %d, %a, %b, %c;", [a, b, n], np.uint32) == want).all()
    assert (elementwise("bfe.u32 %d, %a, 5, 7;", [a], np.uint32) == (a >> 5) & 127).all()
    assert (elementwise("bfe.s32 %d, %a, 5, 7;", [a], np.int32) == (a << 20).view(np.int32) >> 25).all()
    assert (
        elementwise("bfi.b32 %d, %a, %b, 8, 12;", [a, b], np.uint32) == ((b & ~np.uint32(0xFFF00)) | ((a & 0xFFF) << 8))
    ).all()
    assert (elementwise("prmt.b32 %d, %a, %b, 0x5410;", [a, b], np.uint32) == ((a & 0xFFFF) | (b << 16))).all()
    assert (elementwise("popc.b32 %d, %a;", [a], np.uint32) == np.bitwise_count(a)).all()
    assert (elementwise("brev.b32 %x0, %a; clz.b32 %d, %x0;", [a | 1], np.uint32) == 0).all()


@pytest.mark.parametrize("operator", ["eq", "ne", "lt", "le", "gt", "ge", "ltu", "neu", "num", "nan"])
def test_setp_selp(operator):
    a, b = floats(), floats()[::-1].copy()
    a[::5] = b[::5]
    with np.errstate(all="ignore"):
        unordered = np.isnan(a) | np.isnan(b)
        want = {
            "eq": a == b,
            "ne": (a != b) & ~unordered,
            "lt": a < b,
            "le": a <= b,
            "gt": a > b,
            "ge": a >= b,
            "ltu": (a < b) | unordered,
            "neu": (a != b) | unordered,
            "num": ~unordered,
            "nan": unordered,
        }[operator]
    got = elementwise(f"setp.{operator}.f32 %p0, %a, %b; selp.b32 %d, 1, 0, %p0;", [a, b], np.uint32)
    assert (got == want).all()


def test_guards_and_predicate_logic():
    a = np.arange(64, dtype=np.int32)
    body = """setp.lt.s32 %p0, %a, 32; setp.gt.and.s32 %p1|%p2, %a, 7, %p0; mov.b32 %d, 0;
      @%p1 mov.b32 %d, 1; @!%p0 mov.b32 %d, 2; and.pred %p3, %p0, %p2; @%p3 add.s32 %d, %d, 10;"""
    assert (elementwise(body, [a], np.int32) == np.where(a >= 32, 2, np.where(a > 7, 1, 10))).all()


@pytest.mark.slow
def test_approximate_functions():
    a = np.abs(rng.standard_normal(N)).astype(np.float32) + 0.1
    for body, want in {
        "rcp.approx.f32": 1 / a,
        "sqrt.approx.f32": np.sqrt(a),
        "rsqrt.approx.ftz.f32": 1 / np.sqrt(a),
        "ex2.approx.ftz.f32": np.exp2(a),
        "lg2.approx.f32": np.log2(a),
        "tanh.approx.f32": np.tanh(a),
    }.items():
        assert np.allclose(elementwise(f"{body} %d, %a;", [a], np.float32), want, rtol=3e-7, atol=1e-7), body


def test_unknown_things_are_named():
    header = ".version 8.0\n.target sm_80\n.address_size 64\n"
    text = header + ".visible .entry k() {\n .reg .b32 %r<2>;\n bogus.s32 %r0, %r1;\n ret;\n}\n"
    with pytest.raises(PtxUnsupported, match=r"bogus\.s32.*PTX line 6"):
        Module(text).prepare("k")
    with pytest.raises(PtxUnsupported, match="modifier .strange"):
        Module(text.replace("bogus", "add.strange")).prepare("k")
