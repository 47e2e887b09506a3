"""The static report as JSON and as Markdown."""

import json
from typing import Any

from bench.occupancy import ARCHITECTURES

_INTRODUCTION = """# Static resources of the Triton kernels

Written by `python -m bench.resources report`; nothing here was timed. Figures are of compiled machine code: registers
of a thread, shared memory of a block, warps resident on an SM (8 at least), and instructions counted through the
loops of a launch at batch 128, idle lanes of padded tiles included: per element of the launch's largest tensor, and
per byte DRAM has to move at least. Where that last figure is above an architecture's budget, instruction issue is the
bound, not DRAM. No kernel may touch local memory (spills).
"""


def as_json(budget: dict[str, Any]) -> str:
    """One kernel a line, so that changes can be read."""
    archs = []
    for arch, dtypes in budget.items():
        blocks = []
        for dtype, rows in dtypes.items():
            lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(row)}" for name, row in rows.items())
            blocks.append(f'    "{dtype}": {{\n{lines}\n    }}')
        archs.append(f'  "{arch}": {{\n' + ",\n".join(blocks) + "\n  }")
    return "{\n" + ",\n".join(archs) + "\n}\n"


def as_markdown(budget: dict[str, Any]) -> str:
    """Budgets, faults, then per type and kernel the extremes over all shapes on each architecture."""
    parts = [_INTRODUCTION, _budgets(), _faults(budget)]
    dtypes = dict.fromkeys(dtype for of_arch in budget.values() for dtype in of_arch)
    parts += [_of_dtype(budget, dtype) for dtype in dtypes]
    return "\n".join(parts)


def _budgets() -> str:
    lines = ["## Instructions there is time for", "", "| architecture | GPU | per byte of DRAM |", "|---|---|---|"]
    lines += [f"| {a.name} | {a.gpu} | {a.instructions_per_byte:.1f} |" for a in ARCHITECTURES.values()]
    return "\n".join(lines) + "\n"


def _faults(budget: dict[str, Any]) -> str:
    lines = ["## Kernels that break a rule", ""]
    for arch, dtypes in budget.items():
        for dtype, rows in dtypes.items():
            for name, row in rows.items():
                lines += [f"* {arch} {dtype} `{name}` {row['tile']}: {fault}" for fault in row["faults"]]
    return "\n".join(lines if len(lines) > 2 else [*lines, "None."]) + "\n"


def _of_dtype(budget: dict[str, Any], dtype: str) -> str:
    archs = [arch for arch in budget if dtype in budget[arch]]
    kernels = dict.fromkeys(name.split(":")[0] for arch in archs for name in budget[arch][dtype])
    lines = [
        f"## {dtype}",
        "",
        "Kinds of kernel, most registers, fewest warps an SM; then, for the shape with the longest predicted time,",
        "instructions an element and instructions a byte.",
        "",
        f"| kernel | {' | '.join(archs)} |",
        "|---" * (len(archs) + 1) + "|",
    ]
    for kernel in kernels:
        cells = [_cell([r for n, r in budget[arch][dtype].items() if n.split(":")[0] == kernel]) for arch in archs]
        lines.append(f"| {kernel} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return ""
    heaviest = max(rows, key=lambda row: row["predicted_us"])
    registers, warps = max(row["registers"] for row in rows), min(row["warps_per_sm"] for row in rows)
    per_element, per_byte = heaviest["instructions_per_element"], heaviest["instructions_per_byte"]
    return f"{len(rows)} kinds, {registers} regs, {warps} warps; {per_element:.1f}/el, {per_byte:.1f}/B"
