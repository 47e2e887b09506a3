"""`python -m bench model`: inference of whole networks against what else runs them, by variant, batch and threads.

On a CPU the peers are those of `python -m bench.cpu`: torchvision eager, torch.compile, ONNX Runtime, OpenVINO,
LiteRT. On a GPU: torchvision eager and torch.compile in both layouts, in the type asked for. All have the same
weights, and a runner whose logits are wrong is named and not timed.
"""

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import mbv2
from bench import check, report, schema, timing
from bench.kernels import DTYPES, variant
from bench.schema import Row
from bench.tables import Column
from mbv2.progress import Progress

COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("runner", "runner"),
    Column("median_ms", "median ms", ".3f"),
    Column("p25_ms", "p25", ".3f"),
    Column("p75_ms", "p75", ".3f"),
    Column("cpu_median_ms", "on cores", ".1f"),
    Column("images_per_s", "images/s", ".1f"),
    Column("faster", "x eager", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
)
Runs = dict[str, Callable[[], object]]


def cpu_runners(model: str, batch: int, threads: int, wanted: Sequence[str], folder: str) -> tuple[Runs, dict]:
    """Runners of bench.cpu with right logits, and why the others are left out."""
    from bench import cpu

    width, resolution = variant(model)
    case = cpu.Case(width, resolution, batch, threads)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the peers' converters
        runners, x, left_out = cpu.prepare(case, list(wanted) or list(cpu.RUNNERS), folder)
    return {name: lambda runner=runner: runner(x) for name, runner in runners.items()}, left_out


def gpu_runners(model: str, batch: int, dtype: torch.dtype, wanted: Sequence[str]) -> tuple[Runs, dict[str, str]]:
    """mbv2, torchvision eager and torchvision under torch.compile on the GPU, with right logits; why others are out."""
    width, resolution = variant(model)
    ours, theirs = models(width)
    expected = theirs.double()(pictures(batch, resolution).double())
    ours, theirs = ours.to("cuda", dtype), theirs.to("cuda", dtype)
    nhwc = copy.deepcopy(theirs).to(memory_format=torch.channels_last)
    x = pictures(batch, resolution).to("cuda", dtype)
    last = x.to(memory_format=torch.channels_last)
    found: dict[str, tuple[nn.Module | Callable[[Tensor], Tensor], Tensor]] = {
        "eager channels_last": (nhwc, last),
        "eager NCHW": (theirs, x),
        "torch.compile": (torch.compile(nhwc, mode="max-autotune"), last),
        "mbv2": (ours.to(memory_format=torch.channels_last), last),
    }
    plain = check.error([nhwc(last).cpu()], [expected])
    runs: Runs = {}
    left_out = {}
    for name, (run, given) in found.items():
        if wanted and name not in wanted:
            continue
        wrong = check.fault(check.error([run(given).cpu()], [expected]), plain, dtype)
        if wrong:
            left_out[name] = wrong
        else:
            runs[name] = lambda run=run, given=given: run(given)
    return runs, left_out


def models(width: float) -> tuple[mbv2.MobileNetV2, nn.Module]:
    """Our network and torchvision's with the same random weights and statistics."""
    from bench.cpu import make_models

    return make_models(width)


def pictures(batch: int, resolution: int) -> Tensor:
    """Random pictures [batch, 3, resolution, resolution], the same every time."""
    return torch.randn(batch, 3, resolution, resolution, generator=torch.Generator().manual_seed(1))


def rows(
    model: str, batch: int, threads: int | None, runs: Runs, seconds: float, device: torch.device
) -> list[dict[str, Any]]:
    """Time the runners against each other; ratios are to the first eager runner there is, else to the first."""
    times = timing.interleaved(runs, seconds, device)
    baseline = next((name for name in times if name.startswith("eager")), next(iter(times)))
    found: list[Row] = []
    for name, taken in times.items():
        figures = timing.summary(taken, times[baseline], device)
        found.append(
            {
                "model": model,
                "batch": batch,
                "threads": threads,
                "runner": name,
                "baseline": baseline,
                **figures,
                "images_per_s": 1e3 * batch / figures["median_ms"],
            }
        )
    return found


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("model", __doc__.split("\n")[0], seconds=20.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution, or all")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="on a CPU")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="on a GPU [%(default)s]")
    parser.add_argument("--runners", nargs="+", default=[], help="only these (default: all that there are)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--tflite", default="", help="float .tflite file for LiteRT; {width}, {resolution} are put in")
    options = parser.parse_args(argv)
    device = report.device_of(options.device)
    if options.tflite:
        os.environ["MBV2_BENCH_TFLITE"] = options.tflite
    names = _all_models() if options.models == ["all"] else options.models
    threads = options.threads if device.type == "cpu" else [None]
    dtype = options.dtype if device.type == "cuda" else "float32"
    settings = {"models": names, "dtype": dtype, "device": device.type, "seconds": options.seconds}
    result = schema.new("model", argv, settings)
    cases = [(model, batch, count) for model in names for batch in options.batches for count in threads]
    with Progress(len(cases), "model", "cases") as progress:
        for model, batch, count in cases:
            with tempfile.TemporaryDirectory() as folder:
                if count is not None:
                    torch.set_num_threads(count)
                    runs, left_out = cpu_runners(model, batch, count, options.runners, folder)
                else:
                    runs, left_out = gpu_runners(model, batch, DTYPES[dtype], options.runners)
                if runs:
                    result.rows.extend(rows(model, batch, count, runs, options.seconds, device))
            result.left_out.update(_one_line(left_out))
            progress.advance()
    return report.finish(result, COLUMNS, options.out)


def _one_line(left_out: dict[str, str]) -> dict[str, str]:
    return {name: why.splitlines()[0][:160] for name, why in left_out.items()}


def _all_models() -> list[str]:
    return [name.removeprefix("mobilenet_v2_") for name in mbv2.list_models()]
