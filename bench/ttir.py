"""What one program of a kernel does, read from its Triton IR: how often loops run, bytes asked for, multiply-adds.

Loop bounds of the kernels depend on scalars only (arguments, program ids, the grid), so the scalar instructions are
carried out here with the values of a launch; tensors are not computed. Of a loop's body one pass is followed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any, NamedTuple

_ASSIGN = re.compile(r"^(%[\w.#]+)(?::\d+)? = (.*)$")
_FOR = re.compile(r"scf\.for %[\w.]+ = (\S+) to (\S+) step (\S+)")
_NAME = re.compile(r"^%[\w.#]+$")
_TENSOR = re.compile(r"tensor<([0-9x]+)x(!tt\.ptr<)?(\w+)>*")
_DOT = re.compile(r"tensor<(\d+)x(\d+)x(\w+)[^>]*> \* tensor<(\d+)x(\d+)x\w+")
_BITS = {"i1": 8, "i8": 8, "i16": 16, "f16": 16, "bf16": 16, "i32": 32, "f32": 32, "i64": 64, "f64": 64}

_BINARY: dict[str, Callable[[int, int], int]] = {
    "arith.addi": lambda a, b: a + b,
    "arith.subi": lambda a, b: a - b,
    "arith.muli": lambda a, b: a * b,
    "arith.divsi": lambda a, b: int(a / b) if abs(a) < 1 << 52 else a // b,
    "arith.divui": lambda a, b: a // b,
    "arith.remsi": lambda a, b: a - b * int(a / b),
    "arith.remui": lambda a, b: a % b,
    "arith.minsi": min,
    "arith.maxsi": max,
    "arith.minui": min,
    "arith.maxui": max,
    "arith.andi": lambda a, b: a & b,
    "arith.ori": lambda a, b: a | b,
    "arith.xori": lambda a, b: a ^ b,
    "arith.shli": lambda a, b: a << b,
    "arith.shrsi": lambda a, b: a >> b,
    "arith.shrui": lambda a, b: a >> b,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "slt": lambda a, b: a < b,
    "sle": lambda a, b: a <= b,
    "sgt": lambda a, b: a > b,
    "sge": lambda a, b: a >= b,
    "ult": lambda a, b: a < b,
    "ule": lambda a, b: a <= b,
    "ugt": lambda a, b: a > b,
    "uge": lambda a, b: a >= b,
}


class Loop(NamedTuple):
    """A loop of the source: how deep it lies, its runs for each entry, whether the compiler knows that number."""

    depth: int
    runs: float
    constant: bool


@dataclass
class Program:
    """What one program does.

    Attributes:
        loops: every loop, outer before inner, in the order of the code.
        loaded_bytes, stored_bytes: asked for, masked-off elements included.
        dots: multiply-adds of tl.dot by the type of its operands, padding included.
        unknown: scalars that loop bounds needed and that could not be followed.
    """

    loops: list[Loop] = field(default_factory=list)
    loaded_bytes: float = 0
    stored_bytes: float = 0
    dots: dict[str, float] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)


@dataclass
class _Op:
    result: str | None
    text: str
    regions: list[list["_Op"]]


def follow(
    ttir: str, arguments: Mapping[str, Any], grid: tuple[int, int, int], program: tuple[int, int, int]
) -> Program:
    """Follow the program with id `program` of a launch over `grid`; `arguments` by name (only integers are used)."""
    out = Program()
    values: dict[str, Any] = {f"%{name}": value for name, value in arguments.items() if isinstance(value, int)}
    _run(_parsed(ttir), values, out, depth=0, times=1.0, where=(grid, program))
    return out


@cache
def _parsed(ttir: str) -> list[_Op]:
    lines = [_plain(line) for line in ttir.splitlines()]
    start = next(i for i, line in enumerate(lines) if line.startswith("tt.func public"))
    ops, _ = _parse_region(lines, start + 1)
    return ops


def _plain(line: str) -> str:
    # Locations may hold parentheses of their own, and nothing of interest follows them but a brace.
    text = line.strip()
    cut = text.find(" loc(")
    if cut < 0:
        return text
    return text[:cut] + (" {" if text.endswith("{") and not text[:cut].endswith("{") else "")


def _parse_region(lines: list[str], at: int) -> tuple[list[_Op], int]:
    ops: list[_Op] = []
    while True:
        line = lines[at]
        at += 1
        if line.startswith("}"):
            if "else {" in line:
                body, at = _parse_region(lines, at)
                return [*ops, _Op(None, "else", [body])], at
            return ops, at
        if not line or line.startswith(("^", "#")):
            continue
        assigned = _ASSIGN.match(line)
        result, text = (assigned[1], assigned[2]) if assigned else (None, line)
        regions: list[list[_Op]] = []
        if line.endswith("{"):
            body, at = _parse_region(lines, at)
            has_else = bool(body) and body[-1].text == "else"
            regions = [body[:-1], body[-1].regions[0]] if has_else else [body]
        elif line.endswith("({"):
            body, at = _parse_region(lines, at)
        ops.append(_Op(result, text, regions))


def _run(
    ops: list[_Op], values: dict[str, Any], out: Program, depth: int, times: float, where: tuple[Any, Any]
) -> list[Any]:
    """Carry out a region; returns what it yields."""
    for op in ops:
        if op.text.startswith("scf.for"):
            _run_for(op, values, out, depth, times, where)
        elif op.text.startswith("scf.while"):
            out.unknown.append(op.text)
        elif op.text.startswith("scf.if"):
            _run_if(op, values, out, depth, times, where)
        elif op.text.startswith("scf.yield"):
            names = op.text.removeprefix("scf.yield").split(":")[0].split(",")
            return [_value(name.strip(), values) for name in names]
        else:
            _count(op.text, out, times)
            if op.result is not None and (result := _scalar(op.text, values, where)) is not None:
                values[op.result] = result
    return []


def _run_for(op: _Op, values: dict[str, Any], out: Program, depth: int, times: float, where: tuple[Any, Any]) -> None:
    bounds = _FOR.search(op.text)
    assert bounds is not None
    first, stop, step = (_value(name, values) for name in bounds.groups())
    if first is None or stop is None or not step:
        out.unknown.append(op.text.split("iter_args")[0])
        runs = 1
    else:
        runs = max(0, -(-(stop - first) // step))
    constant = all(name.startswith("%c") and name[2:3].isdigit() for name in bounds.groups())
    out.loops.append(Loop(depth, runs, constant))
    inside = dict(values)
    inside[op.text.split()[1]] = first
    if carried := re.search(r"iter_args\((.*?)\) ->", op.text):
        for pair in carried[1].split(", "):
            name, initial = pair.split(" = ")
            inside[name] = _value(initial, values)
    _run(op.regions[0], inside, out, depth + 1, times * runs, where)


def _run_if(op: _Op, values: dict[str, Any], out: Program, depth: int, times: float, where: tuple[Any, Any]) -> None:
    condition = _value(op.text.split()[1], values)
    regions = op.regions if len(op.regions) == 2 else [op.regions[0], []]
    yielded: list[Any] = []
    for taken, region in zip((True, False), regions, strict=True):
        runs = condition is None or bool(condition) == taken
        result = _run(region, dict(values), out, depth, times if runs else 0.0, where)
        if condition is not None and runs:
            yielded = result
    if op.result is not None and yielded:
        values[op.result] = yielded[0]
        values.update({f"{op.result}#{i}": value for i, value in enumerate(yielded)})


def _scalar(text: str, values: Mapping[str, Any], where: tuple[Any, Any]) -> int | None:
    """The value of a scalar instruction, None where it is none of those known here or its operands are not known."""
    kind, _, rest = text.partition(" ")
    if kind == "arith.constant":
        word = rest.split(" ")[0]
        return {"true": 1, "false": 0}.get(word, int(word) if re.fullmatch(r"-?\d+", word) else None)
    if kind in ("tt.get_program_id", "tt.get_num_programs"):
        source = where[1] if kind == "tt.get_program_id" else where[0]
        return source["xyz".index(rest[0])]
    words = [word.strip() for word in rest.split(" : ")[0].split(",")]
    comparison = ""
    if kind == "arith.cmpi":
        comparison, words = words[0], words[1:]
    operands = [_value(word, values) for word in words]
    if any(operand is None for operand in operands):
        return None
    if comparison:
        return int(_COMPARE[comparison](operands[0], operands[1]))
    if kind in ("arith.extsi", "arith.extui", "arith.trunci", "arith.index_cast"):
        return operands[0]
    if kind == "arith.select":
        return operands[1] if operands[0] else operands[2]
    if kind in _BINARY and len(operands) == 2:
        return _BINARY[kind](operands[0], operands[1])
    return None


def _value(name: str, values: Mapping[str, Any]) -> Any:
    name = name.split(" ")[0]
    return values.get(name) if _NAME.match(name) else None


def _count(text: str, out: Program, times: float) -> None:
    if text.startswith(("tt.load", "tt.store")):
        tensor = _TENSOR.search(text.rpartition(" : ")[2])
        if tensor is None:
            return
        size = prod(int(n) for n in tensor[1].split("x")) * _BITS[tensor[3]] // 8
        if text.startswith("tt.load"):
            out.loaded_bytes += size * times
        else:
            out.stored_bytes += size * times
    elif text.startswith("tt.dot") and (dot := _DOT.search(text)):
        kind = dot[3]
        out.dots[kind] = out.dots.get(kind, 0) + int(dot[1]) * int(dot[2]) * int(dot[5]) * times
