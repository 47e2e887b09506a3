"""The static report on the Triton kernels, and the gate on it: no GPU is needed, only the compiler.

    python -m bench.resources plan      choose tiles and write the tables of kernels/triton/tiles
    python -m bench.resources report    write results/resources.json (the budget) and results/resources.md
    python -m bench.resources check     compile again; exit status 1 if anything is worse than the budget

Compiled is what one training step and one prediction of the full-width network launch (with --all those of all 22),
once for kernels of a kind (see `launches.one_of_a_kind`). All architectures and types take an hour and a half on one
core; what was compiled before is read from Triton's cache.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench import launches, planner, report_text, workload
from bench.occupancy import ARCHITECTURES, Architecture

RESULTS = Path(__file__).parent / "results"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
# More of any of these than the budget allows, times this, fails the check.
SLACK = 1.10
Networks = tuple[tuple[float, int], ...]
FULL_WIDTH: Networks = ((1.0, 224),)

Row = dict[str, Any]
Budget = dict[str, dict[str, dict[str, Row]]]


def rows(arch: Architecture, dtype: torch.dtype, networks: Networks, batch: int = 128) -> dict[str, Row]:
    """What every kind of kernel the networks launch needs and costs, by the stage call that launched it first."""
    calls = {}
    for alpha, resolution in networks:
        for call in workload.calls(alpha, resolution, batch, dtype):
            calls.setdefault(call.key, call)
    return rows_of(calls.values(), arch)


def rows_of(calls: Iterable[workload.Call], arch: Architecture) -> dict[str, Row]:
    """The same for given calls."""
    found: dict[str, Row] = {}
    seen: set[Any] = set()
    for call in calls:
        with launches.one_of_a_kind(seen):
            for launch in launches.run(call, arch):
                found.setdefault(f"{launch.kernel}: {call}", _row(launch))
    return found


def worse(now: dict[str, Row], budget: dict[str, Row]) -> list[str]:
    """Every way in which `now` breaks the rules or is worse than `budget`, as sentences."""
    out = []
    for name, row in now.items():
        out += [f"{name}: {fault}" for fault in row["faults"]]
        known = budget.get(name)
        if known is None:
            continue
        for figure in ("registers", "instructions_per_element"):
            if row[figure] > known[figure] * SLACK:
                out.append(f"{name}: {figure} {row[figure]}, the budget is {known[figure]}")
    return out


def read_budget() -> Budget:
    """The committed figures, by architecture and type."""
    return json.loads((RESULTS / "resources.json").read_text())


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description="static resources of the kernels")
    parser.add_argument("command", choices=("plan", "report", "check"))
    parser.add_argument("--arch", type=int, nargs="*", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="*", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--all", action="store_true", help="kernels of all networks, not the full-width one's only")
    parser.add_argument("--kernel", nargs="*", help="plan: these kernels only")
    parser.add_argument("--bytes", type=int, nargs="*", default=[2, 4], help="plan: for these sizes of an activation")
    arguments = parser.parse_args(argv)
    archs = [ARCHITECTURES[number] for number in arguments.arch]
    if arguments.command == "plan":
        _plan(arguments.kernel or sorted(planner.candidates()), archs, arguments.bytes)
        return 0
    networks = tuple(workload.variants()) if arguments.all else FULL_WIDTH
    if arguments.command == "report":
        _report(archs, arguments.dtype, networks)
        return 0
    return _check(archs, arguments.dtype, networks)


def _plan(kernels: Iterable[str], archs: list[Architecture], itemsizes: list[int]) -> None:
    for kernel in kernels:
        lists = {}
        for arch in archs:
            lists[arch.name] = [entry for itemsize in itemsizes for entry in planner.plan(kernel, arch, itemsize)]
            print(f"{kernel} {arch.name}: {len(lists[arch.name])} entries", flush=True)
        planner.write(kernel, lists)


def _report(archs: list[Architecture], dtypes: list[str], networks: Networks) -> None:
    path = RESULTS / "resources.json"
    budget: Budget = read_budget() if path.is_file() else {}
    for arch in archs:
        for dtype in dtypes:
            budget.setdefault(arch.name, {})[dtype] = rows(arch, DTYPES[dtype], networks)
            print(f"{arch.name} {dtype}: {len(budget[arch.name][dtype])} kernels", flush=True)
            path.write_text(report_text.as_json(budget))
            (RESULTS / "resources.md").write_text(report_text.as_markdown(budget))


def _check(archs: list[Architecture], dtypes: list[str], networks: Networks) -> int:
    budget = read_budget()
    problems = []
    for arch in archs:
        for dtype in dtypes:
            now = rows(arch, DTYPES[dtype], networks)
            known = budget.get(arch.name, {}).get(dtype, {})
            problems += [f"{arch.name} {dtype} {problem}" for problem in worse(now, known)]
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{len(problems)} problems")
    return 1 if problems else 0


def _row(launch: launches.Launch) -> Row:
    machine = launch.machine
    return {
        "tile": launch.tile,
        "registers": machine.registers,
        "local_memory": machine.spills(),
        "shared_bytes": launch.compiled.shared_bytes,
        "warps_per_sm": launch.warps_per_sm,
        "instructions_per_element": round(launch.instructions_per_element, 2),
        "instructions_per_byte": round(launch.instructions_per_byte, 2),
        "tensor_core": machine.tensor_core(),
        "predicted_us": round(launch.seconds() * 1e6, 1),
        "faults": launch.faults(),
    }


if __name__ == "__main__":
    sys.exit(main())
