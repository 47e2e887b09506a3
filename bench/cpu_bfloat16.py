"""`python -m bench.cpu_bfloat16`: inference in bfloat16 on a CPU against what else runs MobileNetV2 so there.

Only where the CPU has AVX512_BF16 is there anything to compare; elsewhere one line says so (MBV2_CPU_ISA=portable
measures the slow path all the same). All runners have the same weights, and none is timed whose logits are further from
float64 than 5 % of the largest. Our network in float32 is timed beside them. Rounds are interleaved; `faster` is the
median of the rounds' ratios over eager, of time on the cores.
"""

import copy
import sys
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import mbv2
from bench import report, schema, tables, timing
from bench.cpu_peers import Case, Runner, make_models, openvino_runner
from bench.kernels import variant
from bench.model import pictures
from bench.schema import Row
from bench.tables import Column
from mbv2.cli import run_guarded
from mbv2.kernels import BackendError, cpu_network

TOLERANCE = 0.05
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("runner", "runner"),
    Column("min_ms", "least ms", ".3f"),
    Column("median_ms", "median", ".3f"),
    Column("cpu_median_ms", "on cores", ".3f"),
    Column("peak_percent", "% of peak", ".0f"),
    Column("faster", "x eager", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
)
Models = tuple[mbv2.MobileNetV2, nn.Module]


def ours(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0], torch.bfloat16)


def ours_in_float32(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0])


def openvino(models: Models, case: Case, x: Tensor) -> Runner:
    import openvino

    if "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        raise ValueError("OpenVINO has no bfloat16 on this CPU")
    return openvino_runner(models[1], case, x, "bf16")


def onednn_graph(models: Models, case: Case, x: Tensor) -> Runner:
    """TorchScript with oneDNN's graph compiler, as torch's documentation prescribes it for bfloat16."""
    torch.jit.enable_onednn_fusion(True)
    before = torch._C._jit_set_autocast_mode(False)
    try:
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            frozen = torch.jit.freeze(torch.jit.trace(copy.deepcopy(models[1]), x))
        # It compiles its graph in the first two calls, for the shapes that it sees.
        for _ in range(2):
            frozen(x)
    finally:
        torch._C._jit_set_autocast_mode(before)
        torch.jit.enable_onednn_fusion(False)
    return frozen


def eager(models: Models, case: Case, x: Tensor) -> Runner:
    last = copy.deepcopy(models[1]).to(memory_format=torch.channels_last)
    nhwc = x.to(memory_format=torch.channels_last)

    def run(_: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return last(nhwc)

    return run


RUNNERS: dict[str, Callable[[Models, Case, Tensor], Runner]] = {
    "eager autocast": eager,
    "mbv2": ours,
    "mbv2 float32": ours_in_float32,
    "OpenVINO bf16": openvino,
    "oneDNN graph": onednn_graph,
}


def prepare(case: Case, wanted: Sequence[str]) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The runners whose logits are right, and why the others are left out."""
    models = make_models(case.width)
    x = pictures(case.batch, case.resolution)
    expected = models[1].double()(x.double())
    models[1].float()
    runs: dict[str, Callable[[], object]] = {}
    left_out = {}
    for name in wanted:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the peers' converters
                runner = RUNNERS[name](models, case, x)
            logits = torch.as_tensor(runner(x)).float()
        except Exception as error:  # a peer that fails in its own way must not end the comparison of the others
            left_out[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if difference < TOLERANCE:
            runs[name] = lambda runner=runner: runner(x)
        else:
            left_out[name] = f"wrong logits (relative error {difference:.1e})"
    return runs, left_out


def measure(case: Case, wanted: Sequence[str], seconds: float) -> tuple[list[Row], dict[str, str]]:
    """A row for each runner with right logits, and why the others are left out."""
    from bench.cpu import multiply_adds

    torch.set_num_threads(case.threads)
    runs, left_out = prepare(case, wanted)
    if not runs:
        return [], left_out
    cpu = torch.device("cpu")
    times = timing.interleaved(runs, seconds, cpu)
    peak = case.threads * torch.ops.mbv2.cpu_fma_rate(cpu_network.isa("bfloat16"), "bfloat16")
    work = 2 * case.batch * multiply_adds(case.width, case.resolution)
    baseline = times.get("eager autocast", next(iter(times.values())))
    rows: list[Row] = []
    for name, taken in times.items():
        row = {"model": f"{case.width}_{case.resolution}", "batch": case.batch, "threads": case.threads, "runner": name}
        row |= timing.summary(taken, baseline, cpu)
        rows.append({**row, "peak_percent": 100 * work / min(taken.wall) / peak})
    return rows, left_out


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu_bfloat16", __doc__.split("\n")[0], seconds=20.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    options = parser.parse_args(argv)
    try:
        isa = cpu_network.isa("bfloat16")
    except BackendError as error:
        print(f"nothing to measure: {error}")
        return 0
    settings = {"models": options.models, "isa": isa, "seconds": options.seconds}
    result = schema.new("cpu_bfloat16", argv, settings)
    for model in options.models:
        for batch in options.batches:
            for threads in options.threads:
                rows, left_out = measure(Case(*variant(model), batch, threads), options.runners, options.seconds)
                result.rows.extend(rows)
                result.left_out.update(left_out)
    print(tables.text(result, COLUMNS), flush=True)
    if options.out is not None:
        result.write(options.out.parent / f"{options.out.name}.json")
    return 0 if result.rows and "mbv2" not in result.left_out else 1


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
