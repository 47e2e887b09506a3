"""What `bench.cpu_bfloat16` and `bench.cpu_int8` share: runners whose logits are right, timed in turns."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import mbv2
from bench import plots, report, schema, tables, timing
from bench.cpu_peers import Case, Runner, make_models
from bench.kernels import variant
from bench.model import pictures
from bench.schema import Row
from bench.tables import Column
from mbv2.kernels import BackendError, cpu_network

COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("runner", "runner"),
    Column("min_ms", "least ms", ".3f"),
    Column("median_ms", "median", ".3f"),
    Column("cpu_median_ms", "on cores", ".3f"),
    Column("peak_percent", "% of peak", ".0f"),
    Column("error", "error", ".1e"),
    Column("faster", "x baseline", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
)
# Int8 is set beside the peak of float32: more than 100 % is what 8 bits are for.
PEAK_OF = {"bfloat16": "bfloat16", "int8": "float32"}
Models = tuple[mbv2.MobileNetV2, nn.Module]
MakeRunner = Callable[[Models, Case, Tensor], Runner]


class Comparison(NamedTuple):
    """What is compared: our number format, the runners, the baseline of ratios, how far logits may be from float64."""

    name: str
    format: str
    runners: Mapping[str, MakeRunner]
    baseline: str
    tolerance: float


def prepare(
    comparison: Comparison, case: Case, wanted: Sequence[str]
) -> tuple[dict[str, Callable[[], object]], dict[str, str], dict[str, float]]:
    """The runners whose logits are right, why the others are left out, and how far each is from float64."""
    models = make_models(case.width)
    x = pictures(case.batch, case.resolution)
    expected = models[1].double()(x.double())
    models[1].float()
    runs: dict[str, Callable[[], object]] = {}
    left_out, errors = {}, {}
    for name in wanted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the peers' converters
                runner = comparison.runners[name](models, case, x)
            logits = torch.as_tensor(runner(x)).float()
        except Exception as error:  # a peer that fails in its own way must not end the comparison of the others
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        truth = getattr(runner, "expected", expected)  # of runners with weights of their own
        errors[name] = ((logits - truth).norm() / truth.norm()).item()
        if errors[name] < comparison.tolerance:
            runs[name] = lambda runner=runner: runner(x)
        else:
            left_out[name] = f"wrong logits (relative error {errors[name]:.1e})"
    return runs, left_out, errors


def measure(comparison: Comparison, case: Case, wanted: Sequence[str], seconds: float) -> tuple[list[Row], dict]:
    """A row for each runner with right logits, and why the others are left out."""
    from bench.cpu import multiply_adds

    torch.set_num_threads(case.threads)
    runs, left_out, errors = prepare(comparison, case, wanted)
    if not runs:
        return [], left_out
    cpu = torch.device("cpu")
    times = timing.interleaved(runs, seconds, cpu)
    peak = case.threads * torch.ops.mbv2.cpu_fma_rate(
        cpu_network.isa(PEAK_OF[comparison.format]), PEAK_OF[comparison.format]
    )
    work = 2 * case.batch * multiply_adds(case.width, case.resolution)
    baseline = times.get(comparison.baseline, next(iter(times.values())))
    rows: list[Row] = []
    for name, taken in times.items():
        row = {"model": f"{case.width}_{case.resolution}", "batch": case.batch, "threads": case.threads, "runner": name}
        row |= timing.summary(taken, baseline, cpu)
        if case.threads > 1:  # threads that wait use time on the cores as well, so the clock's is compared
            ratios = [theirs / own for own, theirs in zip(taken.wall, baseline.wall, strict=True)]
            row["faster_low"], row["faster"], row["faster_high"] = timing.quartiles(ratios)
        rows.append(
            {
                **row,
                "peak_percent": 100 * work / min(taken.wall) / peak,
                "error": errors[name],
                "baseline": comparison.baseline,
            }
        )
    return rows, left_out


@torch.no_grad()
def main(comparison: Comparison, about: str, argv: Sequence[str]) -> int:
    """Measure what `argv` asks for, print the table and write it; 1 where our own network is left out."""
    parser = report.parser(comparison.name, about, seconds=20.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--runners", nargs="+", default=list(comparison.runners), choices=list(comparison.runners))
    options = parser.parse_args(argv)
    try:
        isa = cpu_network.isa(comparison.format)
    except BackendError as error:
        print(f"nothing to measure: {error}")
        return 0
    settings = {"models": options.models, "isa": isa, "seconds": options.seconds, "device": "cpu"}
    result = schema.new(comparison.name, argv, settings)
    for model in options.models:
        for batch in options.batches:
            for threads in options.threads:
                case = Case(*variant(model), batch, threads)
                rows, left_out = measure(comparison, case, options.runners, options.seconds)
                result.rows.extend(rows)
                result.left_out.update(left_out)
    print(tables.text(result, COLUMNS), flush=True)
    if options.out is not None:
        file = options.out.parent / f"{options.out.name}.json"
        result.write(file)
        print(f"wrote {file}, {', '.join(map(str, plots.draw(result, file)))}")
    return 0 if result.rows and "mbv2" not in result.left_out else 1
