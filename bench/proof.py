"""Kernel by kernel, what is known without a GPU: error, traffic, registers, spills and instructions, in one table.

`python -m bench.proof` runs every stage of the Triton backend on the tiny inputs of the first-use check, as PTX on the
CPU, beside plain torch in the same type, both against float64. Traffic and static resources are those of
results/traffic.json and results/resources.json. Written: results/proof.json and results/proof.md. A result that is
less accurate than the tests allow is an error (exit status 1) and nothing is written.
"""

import inspect
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import resources, traffic
from mbv2.files import write_atomic
from mbv2.kernels import aten, selfcheck
from mbv2.kernels.triton import support

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# The tests' policy (tests/stage_check.py): 1.3 times the error of plain torch in the same type and this.
FLOOR = {"float32": 1e-6, "float16": 3e-4, "bfloat16": 2.5e-3}
ARCHS = ("sm_80", "sm_90")
# Every function of the contract, in its order.
STAGES = [
    name
    for name, value in vars(aten).items()
    if inspect.isfunction(value) and value.__module__ == aten.__name__ and not name.startswith("_")
]


class Errors(NamedTuple):
    """Relative Frobenius errors of one result against float64."""

    kernel: float
    eager: float


def errors(stage: str, dtype: torch.dtype) -> list[Errors]:
    """Of every result of every example of a stage."""
    function, twin = getattr(support.stages(), stage), getattr(aten, stage)
    found = []
    for arguments in selfcheck.examples(stage, dtype):
        with traffic.emulated(traffic.ARCH) as launched:
            mine = _results(function(*arguments))
        if not launched:
            raise RuntimeError(f"{stage} launched no kernel")
        theirs = _results(twin(*arguments))
        exact = _results(twin(*[_double(a) for a in arguments]))
        distance = selfcheck.relative_error
        found += [Errors(distance(m, e), distance(t, e)) for m, t, e in zip(mine, theirs, exact, strict=True)]
    return found


def rows() -> tuple[list[dict[str, Any]], list[str]]:
    """One row a stage, and every result that is less accurate than the tests' policy allows."""
    budget = resources.read_budget()
    moved = json.loads((RESULTS / "traffic.json").read_text())["megabytes_per_image"]
    table, problems = [], []
    for stage in STAGES:
        row: dict[str, Any] = {"stage": stage, "errors": {}, "traffic": moved.get(stage), "static": {}}
        for name, dtype in DTYPES.items():
            found = errors(stage, dtype)
            problems += [
                f"{stage} {name}: error {pair.kernel:.1e}, plain torch {pair.eager:.1e}"
                for pair in found
                if not pair.kernel <= 1.3 * pair.eager + FLOOR[name]
            ]
            row["errors"][name] = max(found)._asdict()
        for arch in ARCHS:
            row["static"][arch] = _static(stage, budget[arch]["float16"])
        table.append(row)
        print(f"{stage}: {row['errors']}", file=sys.stderr, flush=True)
    return table, problems


def as_markdown(table: list[dict[str, Any]]) -> str:
    """The table."""
    lines = [
        "# Kernel by kernel",
        "",
        "Written by `python -m bench.proof`; nothing here was timed. Errors: relative Frobenius norm against float64",
        "of the kernel's PTX run on a CPU / of plain torch in the same type, where the kernel does worst. Traffic: MB",
        "per picture over the 17 blocks of 1.0_224 in 16 bit, counted in sectors / planned. sm_80, sm_90: kernels of",
        "the stage at 1.0_224 in float16: most registers, accesses to local memory (spills), instructions per element",
        "of the shape with the longest predicted time.",
        "",
        "| stage | float32 | float16 | bfloat16 | traffic / plan | sm_80 | sm_90 |",
        "|:--|--:|--:|--:|--:|:--|:--|",
    ]
    for row in table:
        cells = [f"{pair['kernel']:.1e} / {pair['eager']:.1e}" for pair in row["errors"].values()]
        moved = row["traffic"]
        planned = f" / {moved['planned']:.2f}" if moved and moved["planned"] else ""
        cells.append(f"{moved['activations'] + moved['small']:.2f}{planned}" if moved else "")
        cells += [_figures(row["static"][arch]) for arch in ARCHS]
        lines.append(f"| `{row['stage']}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """Print and write the table."""
    table, problems = rows()
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    write_atomic(RESULTS / "proof.json", (json.dumps(table, indent=1) + "\n").encode())
    write_atomic(RESULTS / "proof.md", as_markdown(table).encode())
    print(as_markdown(table))
    return 0


def _static(stage: str, kernels: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    of_stage = [row for name, row in kernels.items() if name.split(": ")[1].split()[0] == stage]
    if not of_stage:
        return None
    heaviest = max(of_stage, key=lambda row: row["predicted_us"])
    return {
        "registers": max(row["registers"] for row in of_stage),
        "local_memory": max(row["local_memory"] for row in of_stage),
        "instructions_per_element": heaviest["instructions_per_element"],
    }


def _figures(static: dict[str, Any] | None) -> str:
    if static is None:
        return ""
    per_element = static["instructions_per_element"]
    return f"{static['registers']} regs, {static['local_memory']} spills, {per_element:.1f}/el"


def _results(value: Any) -> list[Tensor]:
    return [selfcheck.whole(v) for v in (value if isinstance(value, tuple) else (value,)) if v is not None]


def _double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


if __name__ == "__main__":
    sys.exit(main())
