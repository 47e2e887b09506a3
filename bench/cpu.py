"""`python -m bench cpu`: inference on a CPU against what else runs MobileNetV2 there, by variant, batch and threads.

Every runner gets the same weights and its logits are compared with the model's in float64 before anything is timed.
Rounds are interleaved: each times every runner once, so that all see the same disturbances. `over ours` is the median
of the rounds' ratios to mbv2, of time on the core with one thread and of the clock with more, as threads that wait for
each other count as busy. `looped` is a batch's worth of the runner's own batch 1, over our batch. With several
threads the time that a cache line takes from core to core is measured beside them. torch.compile, which compiles for
minutes, is there at 1.0_224 only. Peers that are not installed are left out (`pip install 'mbv2[bench]'`).
"""

import sys
import tempfile
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import report, schema, timing
from bench.cpu_peers import RUNNERS, Case, Runner, make_models
from bench.kernels import variant
from bench.schema import Row
from bench.tables import Column
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.progress import Progress

CPU = torch.device("cpu")
OURS, COMPILED, COMPILED_AT = "mbv2", "torch.compile", "1.0_224"
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("runner", "runner"),
    Column("rounds", "rounds"),
    Column("min_ms", "least ms", ".3f"),
    Column("median_ms", "median", ".3f"),
    Column("cpu_min_ms", "least CPU ms", ".3f"),
    Column("cpu_median_ms", "median", ".3f"),
    Column("peak_percent", "% of peak", ".0f"),
    Column("over_ours", "over ours", ".2f"),
    Column("over_ours_low", "p25", ".2f"),
    Column("over_ours_high", "p75", ".2f"),
    Column("least_over_ours", "least over ours", ".2f"),
    Column("looped_over_ours", "looped", ".2f"),
    Column("handover_ns", "core to core ns", ".0f"),
)


def multiply_adds(width: float, resolution: int) -> int:
    """Multiply-adds of one picture."""
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torchvision.models.mobilenet_v2(width_mult=width).eval()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def prepare(case: Case, wanted: list[str], folder: str) -> tuple[dict[str, Runner], Tensor, dict[str, str]]:
    """The runners whose logits are right, the pictures, and why the others are left out."""
    models = make_models(case.width)
    x = torch.randn(case.batch, 3, case.resolution, case.resolution)
    expected = models[1].double()(x.double())
    models[1].float()
    runners, left_out = {}, {}
    for name in wanted:
        try:
            runner = RUNNERS[name](models, case, x, folder)
            logits = torch.as_tensor(runner(x))
        except Exception as error:  # a peer that fails in its own way must not end the comparison of the others
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if difference < 1e-4:
            runners[name] = runner
        else:
            left_out[name] = f"wrong logits (relative error {difference:.1e})"
    return runners, x, left_out


def measure(model: str, case: Case, wanted: list[str], seconds: float, folder: str) -> tuple[list[Row], dict[str, str]]:
    """A row for each runner with right logits, and why the others are left out."""
    torch.set_num_threads(case.threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' converters
        runners, x, left_out = prepare(case, wanted, folder)
    runs = {name: lambda runner=runner: runner(x) for name, runner in runners.items()}
    handover = 1e9 * torch.ops.mbv2.cpu_handover() if case.threads > 1 else None
    peaks = [torch.ops.mbv2.cpu_fma_rate(cpu_network.isa())]
    times = timing.interleaved(runs, seconds, CPU, least_rounds=3)
    peaks.append(torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()))
    work = 2 * case.batch * multiply_adds(case.width, case.resolution)
    baseline = next((name for name in times if name.startswith("eager")), next(iter(times)))
    rows = []
    for name, taken in times.items():
        figures = timing.summary(taken, times[baseline], CPU)
        where = {"model": model, "batch": case.batch, "threads": case.threads, "runner": name, "baseline": baseline}
        rows.append(
            {
                **where,
                "rounds": len(taken.wall),
                **figures,
                "cpu_min_ms": 1e3 * min(taken.cpu),
                "images_per_s": 1e3 * case.batch / figures["median_ms"],
                "peak_percent": 100 * work / min(compared(taken, case.threads)) / max(peaks) / case.threads,
                **(over(taken, times[OURS], case.threads) if OURS in times else {}),
                "handover_ns": handover,
            }
        )
    return rows, left_out


def compared(taken: timing.Times, threads: int) -> list[float]:
    """The seconds that runners are compared by: on the core, or of the clock where threads wait for each other."""
    return taken.cpu if threads == 1 else taken.wall


def over(taken: timing.Times, ours: timing.Times, threads: int) -> dict[str, float]:
    """How many times longer than ours, by the rounds' ratios (median and quartiles) and by the fastest rounds."""
    theirs, mine = compared(taken, threads), compared(ours, threads)
    low, middle, high = timing.quartiles([a / b for a, b in zip(theirs, mine, strict=True)])
    least = min(theirs) / min(mine)
    return {"over_ours": middle, "over_ours_low": low, "over_ours_high": high, "least_over_ours": least}


def add_looped(rows: list[Row]) -> None:
    """`looped_over_ours`: what a batch costs a runner one picture at a time, over our time for the batch (medians)."""
    key = "cpu_median_ms", "median_ms"
    found = {(row["model"], row["threads"], row["batch"], row["runner"]): row for row in rows}
    for (model, threads, batch, runner), row in found.items():
        single, ours = found.get((model, threads, 1, runner)), found.get((model, threads, batch, OURS))
        if batch > 1 and single and ours:
            which = key[threads > 1]
            row["looped_over_ours"] = batch * single[which] / ours[which]


def best(rows: Sequence[Row], figure: str) -> tuple[float, str]:
    """The least of the peers' `figure` and whose it is."""
    return min((row[figure], row["runner"]) for row in rows if row["runner"] != OURS and row.get(figure) is not None)


def summary(rows: list[Row]) -> list[str]:
    """One line a case: the best peer over ours, also looped over batch 1, and two threads against one."""
    lines = []
    cases = dict.fromkeys((row["model"], row["batch"], row["threads"]) for row in rows)
    ours = {(r["model"], r["batch"], r["threads"]): r["median_ms"] for r in rows if r["runner"] == OURS}
    for case in cases:
        own = [row for row in rows if (row["model"], row["batch"], row["threads"]) == case]
        if case not in ours or len(own) < 2:
            continue
        model, batch, threads = case
        line = "{} batch {}, {} thread(s): best peer {:.2f} ({})".format(model, batch, threads, *best(own, "over_ours"))
        if any("looped_over_ours" in row for row in own):
            line += "; looped over batch 1 {:.2f} ({})".format(*best(own, "looped_over_ours"))
        if threads > 1 and (model, batch, 1) in ours:
            line += f"; {ours[model, batch, 1] / ours[case]:.2f} x one thread by the clock"
        lines.append(line)
    return lines


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu", __doc__.split("\n")[0], seconds=6.0)
    models = ["1.0_224", "1.4_224", "0.5_160", "0.35_96"]
    parser.add_argument("--models", nargs="+", default=models, help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise UserError(cpu_network.refusal())
    settings = {"device": "cpu", "dtype": "float32", "isa": cpu_network.isa(), "seconds": options.seconds}
    settings["peak_gflops_a_core"] = torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()) / 1e9
    result = schema.new("cpu", argv, settings)
    cases = [(m, batch, threads) for m in options.models for batch in options.batches for threads in options.threads]
    with Progress(len(cases), "cpu", "cases") as progress:
        for model, batch, threads in cases:
            wanted = [name for name in options.runners if name != COMPILED or model == COMPILED_AT]
            with tempfile.TemporaryDirectory() as folder:
                case = Case(*variant(model), batch, threads)
                rows, left_out = measure(model, case, wanted, options.seconds, folder)
            result.rows.extend(rows)
            result.left_out.update({f"{name}, {case.name}": why for name, why in left_out.items()})
            progress.advance()
    add_looped(result.rows)
    code = report.finish(result, COLUMNS, options.out)
    print("\n".join(summary(result.rows)))
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
