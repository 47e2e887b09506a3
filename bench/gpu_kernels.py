"""Every stage of training and inference, timed on a GPU, kernel by kernel, after its result was checked.

    python -m bench.gpu_kernels --out folder [--batch 256] [--dtype float16 bfloat16 float32] [--dry-run]

Writes kernels.json, kernels.md and kernels.png (GB/s reached, each tensor counted once, against the DRAM of that kind).
Backends are the kernels in CUDA C++ (depthwise stages, the whole block for inference), Triton's (inference of a block
in two launches) and plain torch, whose blocks for inference are one operator after the other. A stage whose result
differs from plain torch's in float32 on at most 32 pictures is listed as wrong and not timed; a kernel of ours that is
wrong or fails makes the exit status 1. torch computes float32 without tf32, as the kernels do. --dry-run: tiny
pictures, one call a stage, bfloat16, the kernels' PTX run by the CPU.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import gpu_rehearsal, gpu_timing, workload
from bench.occupancy import ARCHITECTURES
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.kernels import aten
from mbv2.kernels.layout import channels_last
from mbv2.progress import Progress

# Relative Frobenius error against plain torch in float32: several roundings, and masks that differ in single elements.
MOST_ERROR = {torch.float16: 0.03, torch.bfloat16: 0.1}
# Pictures of the check: float32 copies of the widest tensors of more would not fit beside plain torch's.
CHECKED = 32
DTYPES = ("float16", "bfloat16", "float32")
Stages = dict[str, Callable[[str], Callable[..., Any] | None]]


class NoPlan(Exception):
    """The planner has no launch of this kind for a block: nothing to time, and nothing wrong."""


def filled(args: Sequence[Any], device: torch.device) -> list[Any]:
    """Arguments with random values in place of tensors without memory; statistics positive, so that none is absurd."""
    generator = torch.Generator(device).manual_seed(0)

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
        random = torch.rand(value.shape, generator=generator, device=device) + 0.5
        # A product of many positive weights would leave float16's range.
        small = value.dim() == 4 and value.shape[2] * value.shape[3] in (1, 9)
        return made.copy_((random - 1) / (value[0].numel() ** 0.5) * 3 if small else random)

    return [fill(value) for value in args]


def measure(
    calls: Sequence[tuple[workload.Call, workload.Call]], backends: Stages, device: torch.device, runs: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for every call and backend, and what was left out with the reason.

    Args:
        calls: what is timed, each with the same call on the pictures that its result is checked on.
        backends: who runs them.
        device: where.
        runs: of which the median counts.
    """
    rows, left_out = [], {}
    with Progress(len(calls), "kernels", "stages") as progress:
        for call, small in calls:
            try:
                given = filled(small.args, device)
                expected = getattr(aten, call.stage)(*[a.float() if _half(a) else a for a in given])
            except Exception as failure:  # as below: after some errors a GPU answers nothing any more
                left_out[f"aten: {_dtype_of(call)} {call}"] = _failed(failure)
                continue
            args = None
            for backend, stage_of in backends.items():
                stage = stage_of(call.stage)
                if stage is None:
                    continue
                label = f"{backend}: {_dtype_of(call)} {call}"
                try:
                    error = _difference(stage(*given), expected)
                    if not error <= MOST_ERROR.get(given[0].dtype, 1e-3):
                        left_out[label] = f"wrong: error {error:.2e} against plain torch in float32"
                        continue
                    args = filled(call.args, device) if args is None else args
                    size = _bytes([*args, *_tensors(stage(*args))])
                    times = gpu_timing.seconds(partial(stage, *args), device, runs)
                except NoPlan as reason:
                    left_out[label] = f"no plan: {reason}"
                    continue
                except Exception as failure:  # errors of compilers and drivers have no common type
                    left_out[label] = _failed(failure)
                    continue
                rate = size / times["median_s"] / 1e9
                row = {"stage": str(call), "backend": backend, "dtype": _dtype_of(call), "bytes": size}
                rows.append(row | {"gb_per_s": rate, "error": error, **times})
            progress.advance()
    return rows, left_out


def backends(dry_run: bool) -> tuple[Stages, dict[str, str]]:
    """Who runs a stage, by name, and who is not here, with the reason."""
    from mbv2.kernels.triton import stages as triton_stages

    found: Stages = {"triton": lambda stage: getattr(triton_stages, stage), "aten": lambda stage: getattr(aten, stage)}
    try:
        # A rehearsal runs the sources' PTX, for which the compiled module is not needed.
        reason = gpu_rehearsal.missing() if dry_run else _launchers_missing()
    except ImportError as error:
        reason = str(error)
    if reason is not None:
        return found, {"cuda": reason}
    from mbv2.kernels.cuda import depthwise

    own = {
        "depthwise": depthwise.depthwise,
        "depthwise_backward": depthwise.depthwise_backward,
        "inverted_residual_folded": partial(_block, None),
    }
    ways = {
        "cuda, one launch": {"inverted_residual_folded": partial(_block, 0)}.get,
        "cuda, pair": {"inverted_residual_folded": partial(_block, 1)}.get,
    }
    return {"cuda": own.get, **ways, **found}, {}


def _launchers_missing() -> str | None:
    from mbv2.kernels.cuda import support

    return support.missing()


def _block(
    cut: int | None, x: Tensor, w1: Any, b1: Any, wd: Tensor, bd: Tensor, w3: Tensor, b3: Tensor, *rest: Any
) -> Tensor:
    """The block in CUDA C++ and nothing in its place, in one launch (0), as a pair (1) or as the planner prefers.

    Raises:
        NoPlan: the planner has no such plan for it.
    """
    from mbv2.kernels.cuda import fused

    wish = {} if cut is None else {"cut": cut}
    plan = fused.choice_for(fused.shape_of(x, w1, wd, w3, *rest), fused.gpu_of(x.device), **wish)
    if isinstance(plan, str):
        raise NoPlan(plan)
    return fused.run(plan, x, (w1, wd, w3, b1, bd, b3), *rest)


def as_markdown(document: dict[str, Any]) -> str:
    """The figures as a table."""
    note = "A REHEARSAL ON THE CPU: no time below means anything.\n\n" if document["dry_run"] else ""
    lines = [
        f"# Kernels on {document['machine'].get('gpu', 'the CPU')}",
        "",
        note + "| stage | type | backend | ms | GB/s | error |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        figures = f"{1e3 * row['median_s']:.4f} | {row['gb_per_s']:.0f} | {row['error']:.1e}"
        lines.append(f"| {row['stage']} | {row['dtype']} | {row['backend']} | {figures} |")
    lines += [
        "",
        "Left out:",
        "",
        *(f"* {name}: {reason}" for name, reason in document["left_out"].items() or [("nothing", "")]),
    ]
    return "\n".join(lines) + "\n"


def draw(document: dict[str, Any], path: Path) -> None:
    """GB/s of every stage over its bytes, a colour a backend, below the peak of the GPU's kind."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 5))
    for backend in dict.fromkeys(row["backend"] for row in document["rows"]):
        mine = [row for row in document["rows"] if row["backend"] == backend]
        axis.scatter([row["bytes"] / 1e6 for row in mine], [row["gb_per_s"] for row in mine], s=14, label=backend)
    capability = document["machine"].get("capability", "").replace(".", "")
    if capability.isdigit() and int(capability) in ARCHITECTURES:
        known = ARCHITECTURES[int(capability)]
        axis.axhline(known.bandwidth / 1e9, color="black", linewidth=1, label=f"DRAM of {known.gpu}")
    axis.set(
        xscale="log", yscale="log", xlabel="MB moved", ylabel="GB/s", title="rehearsal" if document["dry_run"] else ""
    )
    axis.legend(fontsize=8)
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_kernels", description="time every kernel on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for kernels.json, kernels.md, kernels.png")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; rehearse with --dry-run")
    gpu_timing.exact_float32()
    alpha, resolution, batch = (0.35, 32, 1) if options.dry_run else (1.0, 224, options.batch)
    dtypes = ["bfloat16"] if options.dry_run else options.dtype
    calls: list[tuple[workload.Call, workload.Call]] = []
    for name in dtypes:
        timed, checked = (
            workload.calls(alpha, resolution, n, getattr(torch, name)) for n in (batch, min(batch, CHECKED))
        )
        calls += zip(timed, checked, strict=True)
    if options.dry_run:
        calls = list({call.stage: (call, small) for call, small in calls}.values())
    who, missing = backends(options.dry_run)
    with gpu_rehearsal.gpu("cuda" in who) if options.dry_run else nullcontext():
        rows, left_out = measure(calls, who, device, 2 if options.dry_run else gpu_timing.RUNS)
    document = {
        "bench": "gpu_kernels",
        "dry_run": options.dry_run,
        "machine": gpu_timing.machine(device),
        "settings": {"alpha": alpha, "resolution": resolution, "batch": batch, "dtypes": dtypes},
        "rows": rows,
        "left_out": missing | left_out,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "kernels.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomic(options.out / "kernels.md", as_markdown(document).encode())
    draw(document, options.out / "kernels.png")
    print(f"{len(rows)} timings, {len(left_out)} left out, in {options.out}")
    ours = {name: reason for name, reason in left_out.items() if not name.startswith("aten")}
    faults = [f"{name}: {reason}" for name, reason in ours.items() if reason.startswith(("wrong", "failed"))]
    print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
    return 1 if faults else 0


def _failed(failure: Exception) -> str:
    return f"failed: {(str(failure).splitlines() or [type(failure).__name__])[0]}"


def _dtype_of(call: workload.Call) -> str:
    return str(call.args[0].dtype).removeprefix("torch.")


def _half(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in MOST_ERROR


def _tensors(result: Any) -> list[Tensor]:
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


def _bytes(values: Sequence[Any]) -> int:
    return sum(value.numel() * value.element_size() for value in values if isinstance(value, Tensor))


def _difference(got: Any, expected: Any) -> float:
    """The largest relative error of the results; parts of moments and sums are put together first."""
    worst = 0.0
    for mine, theirs in zip(_tensors(got), _tensors(expected), strict=True):
        a, b = _merged(mine.float()), _merged(theirs.float())
        worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return worst


def _merged(value: Tensor) -> Tensor:
    if value.dim() == 3 and value.shape[1] == 3:
        return aten.merge_moments(value)
    if value.dim() == 3 and value.shape[1] == 2:
        return value.sum(0)
    return channels_last(value) if value.dim() == 4 else value


if __name__ == "__main__":
    from mbv2.cli import run_guarded

    sys.exit(run_guarded(main))
