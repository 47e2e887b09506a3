"""The static budget of the CUDA C++ depthwise kernels, and the choice between them and Triton's; no GPU is needed.

    python -m bench.gpu_static report    write results/cuda_depthwise.json and kernels/cuda/depthwise_choice.json
    python -m bench.gpu_static check     compile again; exit status 1 if a kernel breaks a rule or the table is another

Compiled is every kernel for every architecture. Instructions are counted as for Triton's: through the loops of a launch
at batch 128, all threads, both sides of every branch, per element of the largest tensor. A kernel is chosen over
Triton's for the same stage, stride and size of a value (results/resources.json) where the roofline of memory and
instructions predicts less time; or the same time, fewer instructions, and that the tensor cores keep up with memory.
How fast tensor cores are at products of this kind nobody has measured, so they decide in the second case only.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bench import sass
from bench.occupancy import ARCHITECTURES, DRAM_SHARE, ISSUE_SHARE, TENSOR_SHARE, Architecture, warps_per_sm
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.kernels.cuda.depthwise import cut

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "cuda_depthwise.json"
CHOICE = ROOT / "kernels" / "cuda" / "depthwise_choice.json"
FILES = ("depthwise_forward", "depthwise_backward", "depthwise_single")
BATCH = 128
# Channels and side of the inputs that each stride is counted on: those with the most traffic.
SHAPES = {1: (144, 56), 2: (96, 112)}
ENOUGH_WARPS = 8
SLACK = 1.1
_KERNEL = re.compile(r"mbv2_(depthwise(?:_backward)?)_(float16|bfloat16|float32)_s([12])_(bn|x)")
# By whether it is float32, backward, and stride: rows that one pass of the main loop covers (kPeriod in the sources),
# and rows that the loop walks on top of those of a strip (of outputs, of their gradient).
_LOOPS = {
    (False, False, 1): (3, 2), (False, False, 2): (2, 1), (False, True, 1): (4, 2), (False, True, 2): (4, 1),
    (True, False, 1): (3, 2), (True, False, 2): (2, 1), (True, True, 1): (3, 2), (True, True, 2): (2, 1),
}  # fmt: skip
# Multiply-adds of a warp's instruction.
_TENSOR_FMA = {
    f"HMMA.{shape}.F32{kind}": fma for shape, fma in (("16816", 2048), ("1688", 1024)) for kind in ("", ".BF16")
}
# At most so often run the loops at the end of a block, which add up parts, and loops inside them.
_ENDS, _ENDS_INSIDE = 2, 32
_SHARED = re.compile(r"\.global \.align 4 \.u32 (\w+)_shared_bytes(?: = (\d+))?;")

Row = dict[str, Any]


def rows(arch: Architecture) -> dict[str, Row]:
    """What every kernel of the two files needs and costs on an architecture, by the kernel's name.

    Raises:
        UserError: there is no nvcc, or it cannot compile for this architecture.
    """
    return {
        name: _row(name, code, shared, arch)
        for file in FILES
        for name, code, shared in _kernels(ROOT / "csrc" / "cuda" / f"{file}.cu", arch)
    }


def choice(static: dict[str, dict[str, Row]], budget: dict[str, Any]) -> dict[str, dict[str, bool]]:
    """By architecture and "stage bytes stride": is CUDA C++ chosen over Triton?"""
    table: dict[str, dict[str, bool]] = {}
    for arch, kernels in static.items():
        for name, row in kernels.items():
            stage, kind, stride, before = _KERNEL.fullmatch(name).groups()
            if kind == "bfloat16" or before == "x":
                continue
            itemsize = 4 if kind == "float32" else 2
            theirs = triton_instructions(budget, arch, kind, stage, int(stride))
            wins = (
                not row["faults"] and theirs is not None and _is_faster(arch, row, theirs, stage, itemsize, int(stride))
            )
            table.setdefault(arch, {})[f"{stage} {itemsize} s{stride}"] = wins
    return table


def _is_faster(name: str, row: Row, theirs: float, stage: str, itemsize: int, stride: int) -> bool:
    """See this module's text."""
    gpu = ARCHITECTURES[int(name.removeprefix("sm_"))]
    tensors = 2 if stage.endswith("backward") else 1
    memory = itemsize * tensors * (1 + 1 / stride**2) / (gpu.bandwidth * DRAM_SHARE)
    rate = gpu.issue_per_second * ISSUE_SHARE
    own, other = (max(memory, count / rate) for count in (row["instructions_per_element"], theirs))
    if own == other:
        products = row["tensor_fma_per_element"] / (gpu.tensor_fma * gpu.mma_sync_share * TENSOR_SHARE)
        return row["instructions_per_element"] < theirs and products <= memory
    return own < other


def triton_instructions(budget: dict[str, Any], arch: str, kind: str, stage: str, stride: int) -> float | None:
    """Instructions an element of Triton's kernel on SHAPES' shape; sm_80's where an architecture has no figure."""
    c, side = SHAPES[stride]
    for where in (arch, "sm_80"):
        for name, row in budget.get(where, {}).get(kind, {}).items():
            if (
                name.startswith(f"_{stage}_kernel: {stage} ")
                and f"{BATCH}x{c}x{side}x{side} {c}x1x3x3 {stride}" in name
            ):
                return row["instructions_per_element"]
    return None


def _row(name: str, code: sass.Code, shared: int, arch: Architecture) -> Row:
    stage, kind, stride, _ = _KERNEL.fullmatch(name).groups()
    warps = warps_per_sm(arch, 4, code.registers, shared)
    instructions, products = _per_element(code, stage, 4 if kind == "float32" else 2, int(stride))
    spills = code.count(*sass.SPILLING)
    faults = []
    if spills or code.stack_bytes:
        faults.append(f"{spills} accesses to local memory ({code.stack_bytes} bytes)")
    if shared > arch.shared_per_block:
        faults.append(f"{shared} bytes of shared memory, {arch.shared_per_block} are there")
    elif warps < ENOUGH_WARPS:
        faults.append(f"{warps} warps on an SM, {ENOUGH_WARPS} are wanted")
    if kind != "float32" and not code.count(*sass.TENSOR_CORE):
        faults.append("no tensor cores")
    return {
        "registers": code.registers,
        "shared_bytes": shared,
        "warps_per_sm": warps,
        "instructions_per_element": round(instructions, 2),
        "tensor_core": code.count(*sass.TENSOR_CORE),
        "tensor_fma_per_element": round(products, 1),
        "faults": faults,
    }


def _per_element(code: sass.Code, stage: str, itemsize: int, stride: int) -> tuple[float, float]:
    """Instructions of all threads of a launch, and multiply-adds of the tensor cores, per element of the input."""
    c, side = SHAPES[stride]
    backward = stage.endswith("backward")
    plan = cut(BATCH, c, side, side, stride, itemsize, backward)
    main = max((loop for loop in code.loops if loop.depth == 0), key=lambda loop: len(loop.body))
    period, more = _LOOPS[itemsize == 4, backward, stride]
    times = [1.0] * len(code.instructions)
    for loop in code.loops:  # inner ones come later
        inside = (plan.rows + more) / period if loop.body <= main.body else _ENDS_INSIDE if loop.depth else _ENDS
        for i in loop.body:
            times[i] = inside
    products = sum(
        often * _TENSOR_FMA.get(this.full_opcode, 0) for this, often in zip(code.instructions, times, strict=True)
    )
    blocks = plan.parts(BATCH) * -(-c // 16)
    elements = BATCH * c * side * side
    return sum(times) * 128 * blocks / elements, products * 4 * blocks / elements


def _kernels(source: Path, arch: Architecture) -> Iterator[tuple[str, sass.Code, int]]:
    """Name, machine code and shared memory of every kernel of a file."""
    sys.path.append(str(ROOT / "tests"))
    from ptxcpu.nvcc import find_nvcc

    nvcc = find_nvcc()
    if nvcc is None:
        raise UserError("no nvcc here (set CUDA_HOME): the CUDA C++ kernels cannot be compiled")
    with tempfile.TemporaryDirectory() as folder:
        cubin = str(Path(folder, "kernels.cubin"))
        _compile(nvcc, source, "cubin", arch.number, cubin)
        usage = sass.tool("cuobjdump", "-res-usage", cubin)
        listing = sass.tool("nvdisasm", "-c", "-ndf", cubin)
    used = {
        name: (int(registers), int(stack) + int(local), int(shared))
        for name, registers, stack, shared, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage
        )
    }
    dynamic = _dynamic_shared(nvcc, source)
    parts = re.split(r"^\.text\.(\w+):", listing, flags=re.M)
    for name, text in zip(parts[1::2], parts[2::2], strict=True):
        instructions = sass.parse(text)
        registers, local, static = used[name]
        code = sass.Code(instructions, sass.find_loops(instructions), registers, local)
        yield name, code, static + dynamic[name]


@cache
def _dynamic_shared(nvcc: str, source: Path) -> dict[str, int]:
    """What the launcher asks for, by kernel; the same on every architecture."""
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernels.ptx")
        _compile(nvcc, source, "ptx", 80, str(ptx))
        return {name: int(size or 0) for name, size in _SHARED.findall(ptx.read_text())}


def _compile(nvcc: str, source: Path, kind: str, arch: int, target: str) -> None:
    command = [nvcc, f"-{kind}", f"-arch=sm_{arch}", "-std=c++17", "-O3", "-DMBV2_STATIC_REPORT", str(source)]
    done = subprocess.run([*command, "-o", target], capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"nvcc cannot compile {source.name} for sm_{arch}: {done.stderr.strip()[-500:]}")


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_static", description=__doc__.split("\n")[0])
    parser.add_argument("command", choices=("report", "check"))
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    arguments = parser.parse_args(argv)
    static = {}
    for number in arguments.arch:
        static[f"sm_{number}"] = rows(ARCHITECTURES[number])
        print(f"sm_{number}: {len(static[f'sm_{number}'])} kernels", flush=True)
    budget = json.loads((RESULTS.parent / "resources.json").read_text())
    if arguments.command == "report":
        write_atomic(RESULTS, as_json(static).encode())
        write_atomic(CHOICE, as_json(choice(static, budget)).encode())
    known, problems = json.loads(RESULTS.read_text()), []
    for arch, kernels in static.items():
        for name, row in kernels.items():
            problems += [f"{arch} {name}: {fault}" for fault in row["faults"]]
            before = known.get(arch, {}).get(name)
            if before is None or row["instructions_per_element"] > SLACK * before["instructions_per_element"]:
                problems.append(
                    f"{arch} {name}: {row['instructions_per_element']} instructions an element, was {before}"
                )
    if choice(known, budget) != json.loads(CHOICE.read_text()):
        problems.append(f"{CHOICE.name} is not what the figures say; run `python -m bench.gpu_static report`")
    print(*problems, f"{len(problems)} problems", sep="\n")
    return 1 if problems else 0


def as_json(table: dict[str, dict[str, Any]]) -> str:
    """JSON with a line for every entry, so that changes can be read."""
    archs = (
        f'"{arch}": {{\n' + ",\n".join(f'  "{key}": {json.dumps(value)}' for key, value in entries.items()) + "\n}"
        for arch, entries in table.items()
    )
    return "{\n" + ",\n".join(archs) + "\n}\n"


if __name__ == "__main__":
    sys.exit(main())
