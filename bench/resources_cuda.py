"""The static report on fused block and pairs in CUDA C++: registers, local memory, instructions, what plans occupy.

    python -m bench.resources_cuda [--arch 80 90] [--dtype float16] [--write]

Compiled is every tile for every architecture; with neither option that is about eight minutes on one core. --write puts
the figures of what was compiled into results/cuda_fused.json, from which `bench.roofline` predicts. Exit status
1 where a kernel touches local memory, has no tensor-core instruction, needs more instructions an element than
`BUDGET`, or where a plan for the full-width network leaves an SM fewer than 8 warps.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench import fused_counts, plan, sass
from bench.occupancy import ARCHITECTURES, Architecture, warps_per_sm
from mbv2.files import write_atomic
from mbv2.kernels.cuda import fused

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
NAMES = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float"}
RESULTS = Path(__file__).parent / "results" / "cuda_fused.json"
WARPS_AT_LEAST = 8
# Instructions of one thread for an output of the depthwise stage at stride 1 and 2, idle columns not counted, by how
# many outputs a column is walked down: on tensor cores, and in float32 with multiply-adds.
_TENSOR_CORE_BUDGET = {4: (7.5, 8.2), 2: (10.5, 11.5)}
BUDGET = {
    torch.float16: _TENSOR_CORE_BUDGET,
    torch.bfloat16: _TENSOR_CORE_BUDGET,
    torch.float32: {4: (18.5, 20.0), 2: (21.0, 22.0)},
}
_USAGE = re.compile(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@cache
def kernels(
    dtype: torch.dtype, arch: int, nvcc: str, only_tile: int | None = None, kind: str = "fused"
) -> dict[str, tuple[sass.Code, str]]:
    """The machine code of the kernels for `dtype` on sm_<arch>, and its listing with lines of the source, by tile (its
    index, or "sum"). kind "product": of the second kernels of pairs.

    Raises:
        RuntimeError: nvcc cannot compile them.
    """
    name = NAMES[dtype]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "fused.cubin"
        command = [nvcc, "-std=c++17", "-O3", "-lineinfo", "-cubin", f"-arch=sm_{arch}"]
        command += [] if only_tile is None else [f"-DMBV2_ONLY_TILE={only_tile}"]
        command += [str(SOURCES / f"{kind}_{name}.cu"), "-o", str(cubin)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr or done.stdout)
        usage = sass.tool("cuobjdump", "-res-usage", str(cubin))
        listing = sass.tool("nvdisasm", "-c", "-ndf", "-gi", str(cubin))
    texts = {part.split(",", 1)[0]: part for part in re.split(r"^\s*\.section\s+\.text\.", listing, flags=re.M)[1:]}
    found = {}
    for kernel, registers, stack, local in _USAGE.findall(usage):
        tile = kernel.removeprefix(f"{kind}_{name}_")
        if only_tile is not None and tile != str(only_tile):
            continue
        instructions = sass.parse(texts[kernel])
        code = sass.Code(instructions, sass.find_loops(instructions), int(registers), int(stack) + int(local))
        found[tile] = code, texts[kernel]
    return found


def depthwise_instructions(code: sass.Code, dtype: torch.dtype, walk: int) -> tuple[float, float]:
    """Instructions of one thread an output of the depthwise stage costs, at stride 1 and at stride 2.

    An item of that stage, one pass of its loop, is 16 columns x `walk` outputs x 32 bytes of channels for a warp.
    """
    inner = [loop for loop in code.loops if not any(other.body < loop.body for other in code.loops)]
    if dtype == torch.float32:
        # Its inner loop makes one of the two halves of an item.
        stages = [loop for loop in inner if code.opcodes_of(loop)["FFMA"] >= 18 * walk]
        outputs, passes = 16 * walk * 8, 2
    else:
        stages = [loop for loop in inner if any("1688" in code.instructions[i].full_opcode for i in loop.body)]
        outputs, passes = 16 * walk * 16, 1
    assert len(stages) == 2, f"{len(stages)} loops look like the depthwise stage"
    first, second = sorted(len(loop.body) * passes * 32 / outputs for loop in stages)
    return first, second


def rows(dtype: torch.dtype, arch: Architecture, nvcc: str, only_tile: int | None = None) -> dict[str, dict[str, Any]]:
    """Every kernel's figures and faults: the fused block's by tile, "sum", and those of products, "product<tile>"."""
    shapes = used_by(dtype, arch)
    found = {}
    for tile, (code, listing) in kernels(dtype, arch.number, nvcc, only_tile).items():
        row = _figures(code)
        row["counts"] = {"all": len(code.instructions)} if tile == "sum" else fused_counts.counts(listing)
        if tile != "sum":
            this = fused_counts.tiles()[int(tile)]
            row["depthwise"] = [round(value, 2) for value in depthwise_instructions(code, dtype, this.walk)]
            row |= _occupied(arch, code, shapes.get(tile, []))
            if not row["tensor_core"]:
                row["faults"].append("no tensor-core instruction")
            budget = BUDGET[dtype][this.walk]
            for stride, (cost, allowed) in enumerate(zip(row["depthwise"], budget, strict=True), 1):
                if cost > allowed:
                    row["faults"].append(
                        f"{cost} instructions a depthwise output at stride {stride}, the budget is {allowed}"
                    )
        found[tile] = row
    if only_tile is None:
        found |= products(dtype, arch, nvcc, shapes)
    for row in found.values():
        row["faults"] += [f"{row['warps_per_sm']} warps an SM"] if row.get("warps_per_sm", 8) < WARPS_AT_LEAST else []
    return found


def products(
    dtype: torch.dtype, arch: Architecture, nvcc: str, shapes: dict[str, list[fused.Plan | fused.Product]]
) -> dict[str, dict[str, Any]]:
    """The figures of products, and what plans occupy."""
    found = {}
    for tile, (code, listing) in kernels(dtype, arch.number, nvcc, kind="product").items():
        row = _figures(code)
        row["counts"] = fused_counts.product_counts(listing)
        row |= _occupied(arch, code, shapes.get(f"product{tile}", []))
        this = fused_counts.product_tiles()[int(tile)]
        # Tensor-core instructions of a pass over 64 bytes of channels; float32 needs three for each.
        needed = 2 * this.tiles_m * this.tiles_n * (3 if dtype == torch.float32 else 1)
        if row["tensor_core"] < needed:
            row["faults"].append(f"{row['tensor_core']} tensor-core instructions, not {needed}")
        found[f"product{tile}"] = row
    return found


def _figures(code: sass.Code) -> dict[str, Any]:
    local = code.stack_bytes + code.count(*sass.SPILLING)
    return {
        "registers": code.registers,
        "local_memory": local,
        "instructions": len(code.instructions),
        "tensor_core": code.count(*sass.TENSOR_CORE),
        "faults": [f"{local} bytes of local memory"] if local else [],
    }


def _occupied(arch: Architecture, code: sass.Code, plans: Sequence[fused.Plan | fused.Product]) -> dict[str, Any]:
    """How many plans take the kernel, the most shared memory and the fewest warps of an SM under one of them."""
    warps = [warps_per_sm(arch, plan.threads // 32, code.registers, plan.shared_bytes) for plan in plans]
    return {
        "plans": len(plans),
        "shared_bytes": max((plan.shared_bytes for plan in plans), default=0),
        "warps_per_sm": min(warps, default=WARPS_AT_LEAST),
    }


def used_by(dtype: torch.dtype, arch: Architecture, images: int = 256) -> dict[str, list[fused.Plan | fused.Product]]:
    """The plans of the full-width network's blocks at 224x224, by kernel: in one launch all of them, and the pairs that
    the planner prefers at that batch and at a quarter of it."""
    gpu = fused.Gpu(arch.number, arch.processors, arch.shared_per_block, arch.shared_per_sm)
    plans: dict[str, list[fused.Plan | fused.Product]] = {}
    for block in plan.network():
        for batch in (images, images // 4):
            shape = fused.Shape(
                fused.ELEMENTS[dtype], batch, block.side, block.side, block.cin, block.hidden, block.cout, block.stride,
                block.expands, block.residual,
            )  # fmt: skip
            whole, choice = fused.plan_for(shape, gpu), fused.choice_for(shape, gpu)
            assert isinstance(whole, fused.Plan), f"{shape}: {whole}"
            if batch == images:
                plans.setdefault(str(whole.tile), []).append(whole)
            if isinstance(choice, fused.Pair):
                plans.setdefault(str(choice.front.tile), []).append(choice.front)
                plans.setdefault(f"product{choice.product.tile}", []).append(choice.product)
    return plans


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources_cuda", description="static resources, CUDA C++")
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in NAMES}
    parser.add_argument("--dtype", nargs="*", choices=dtypes, default=list(dtypes))
    parser.add_argument("--nvcc", default="nvcc")
    parser.add_argument("--write", action="store_true", help="put the figures into results/cuda_fused.json")
    arguments = parser.parse_args(argv)
    report: dict[str, Any] = {}
    for number in arguments.arch:
        for name in arguments.dtype:
            report.setdefault(f"sm_{number}", {})[name] = found = rows(
                dtypes[name], ARCHITECTURES[number], arguments.nvcc
            )
            for tile, row in found.items():
                print(f"sm_{number} {name} {tile}: { {k: v for k, v in row.items() if k != 'counts'} }", flush=True)
            if arguments.write:
                _write(f"sm_{number}", name, found)
    faults = [
        f"{arch} {name} tile {tile}: {fault}"
        for arch, types in report.items()
        for name, found in types.items()
        for tile, row in found.items()
        for fault in row["faults"]
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


def _write(arch: str, dtype: str, found: dict[str, dict[str, Any]]) -> None:
    """Put the figures of one architecture and type among those that are known, a line a kernel."""
    known = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    known.setdefault(arch, {})[dtype] = dict(sorted(found.items()))
    archs = []
    for name, types in sorted(known.items(), key=lambda item: int(item[0].removeprefix("sm_"))):
        parts = []
        for kind, tiles in types.items():
            lines = ",\n".join(f'   "{tile}": {json.dumps(row)}' for tile, row in tiles.items())
            parts.append(f'  "{kind}": {{\n{lines}\n  }}')
        archs.append(f' "{name}": {{\n' + ",\n".join(parts) + "\n }")
    write_atomic(RESULTS, ("{\n" + ",\n".join(archs) + "\n}\n").encode())


if __name__ == "__main__":
    sys.exit(main())
