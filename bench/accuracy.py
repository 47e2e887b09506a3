"""`python -m bench accuracy`: the 22 variants' published top-1 beside what is measured here.

Measured here are two things: with --latency the time of one prediction of every variant on this machine's CPU
(weights do not change it, so it needs none), and with --pretrained and --data_url the top-1 of one file of weights at
the resolutions that were published, on the pictures of that folder. The rows keep apart whose figure each is.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import mbv2
from bench import check, published, report, schema, timing
from bench.model import models, pictures
from bench.schema import Row
from bench.tables import Column
from mbv2.errors import UserError
from mbv2.progress import Progress

COLUMNS = (
    Column("model", "model"),
    Column("source", "source"),
    Column("weights", "weights"),
    Column("top1_percent", "top-1 %", ".2f"),
    Column("top5_percent", "top-5 %", ".2f"),
    Column("right", "right"),
    Column("pictures", "pictures"),
    Column("runner", "runner"),
    Column("threads", "threads"),
    Column("median_ms", "median ms", ".2f"),
    Column("p25_ms", "p25", ".2f"),
    Column("p75_ms", "p75", ".2f"),
    Column("cpu_median_ms", "on cores", ".2f"),
)
RESOLUTIONS = (224, 192, 160, 128, 96)


def published_rows() -> list[Row]:
    """Others' figures, one row per variant and source."""
    return [
        {
            "model": figure.model,
            "source": figure.source,
            "weights": figure.weights,
            "top1_percent": figure.top1,
            "top5_percent": figure.top5,
        }
        for figure in published.figures()
    ]


def measured_rows(pretrained: str, data_url: str, batch: int, resolutions: Sequence[int] = RESOLUTIONS) -> list[Row]:
    """Top-1 and top-5 of these weights at the published resolutions, on these pictures."""
    from mbv2.data import make_loader, open_source
    from mbv2.distributed import World
    from mbv2.evaluate import evaluate_model
    from mbv2.trained import load_trained

    found = []
    for resolution in resolutions:
        trained = load_trained(pretrained, resize=resolution)
        source = open_source(data_url, "val")
        if source.num_classes > trained.model.num_real_classes:
            raise UserError(f"--data_url {data_url}: {source.num_classes} classes, the weights know fewer")
        loader = make_loader("torch", source, trained.recipe, False, batch, World(), workers=2)
        metrics = evaluate_model(trained.model, loader, World(), progress=True)
        loader.close()
        found.append(
            {
                "model": mbv2.variant_name(trained.model.width_mult, resolution),
                "source": "measured here",
                "weights": Path(pretrained).name,
                "data": Path(data_url).name,
                "top1_percent": 100 * metrics.top1,
                "top5_percent": 100 * metrics.top5,
                "right": metrics.right1,
                "pictures": metrics.count,
            }
        )
    return found


def latency_rows(threads: int, seconds: float) -> list[Row]:
    """Milliseconds of one prediction of every variant, by mbv2's compiled call where it was built, beside eager torch.

    All variants are timed in the same rounds.
    """
    torch.set_num_threads(threads)
    runs, kinds = {}, {}
    for variant in mbv2.VARIANTS.values():
        ours, theirs = models(variant.alpha)
        x = pictures(1, variant.resolution)
        for runner, call in _runners(ours, theirs, x).items():
            name = f"{variant.name} {runner}"
            runs[name], kinds[name] = (lambda call=call, x=x: call(x)), (variant.name, runner)
    times = timing.interleaved(runs, seconds, torch.device("cpu"))
    found = []
    for name, taken in times.items():
        low, median, high = timing.quartiles(taken.wall)
        cpu_low, cpu_median, cpu_high = timing.quartiles(taken.cpu)
        model, runner = kinds[name]
        found.append(
            {
                "model": model,
                "source": "latency",
                "runner": runner,
                "threads": threads,
                "median_ms": 1e3 * median,
                "p25_ms": 1e3 * low,
                "p75_ms": 1e3 * high,
                "cpu_median_ms": 1e3 * cpu_median,
                "cpu_p25_ms": 1e3 * cpu_low,
                "cpu_p75_ms": 1e3 * cpu_high,
            }
        )
    return found


def _runners(ours: mbv2.MobileNetV2, theirs: torch.nn.Module, x: Tensor) -> dict[str, torch.nn.Module]:
    """torchvision eager, and ours in one compiled call if there is one; logits equal to float64's."""
    from mbv2.kernels import cpu_network

    expected = theirs.double()(x.double())
    theirs.float()
    found = {"torchvision eager": theirs}
    if cpu_network.refusal() is not None:
        return found
    fast = mbv2.optimize_for_inference(ours)
    wrong = check.fault(check.error([fast(x)], [expected]), check.error([theirs(x)], [expected]), torch.float32)
    if wrong:
        raise UserError(f"mbv2.optimize_for_inference: {wrong}")
    return {**found, "mbv2": fast}


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("accuracy", __doc__.split("\n")[0], seconds=60.0)
    parser.add_argument("--latency", action="store_true", help="time all variants on this CPU")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pretrained", default="", help="weights to evaluate at the published resolutions")
    parser.add_argument("--data_url", default="", help="labelled pictures to evaluate them on")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args(argv)
    if bool(options.pretrained) != bool(options.data_url):
        raise UserError("--pretrained and --data_url go together: these weights on these pictures")
    settings = {"threads": options.threads, "seconds": options.seconds if options.latency else 0}
    result = schema.new("accuracy", argv, settings)
    result.rows.extend(published_rows())
    with Progress(1 + options.latency, "accuracy", "parts") as progress:
        if options.pretrained:
            result.rows.extend(measured_rows(options.pretrained, options.data_url, options.batch))
        progress.advance()
        if options.latency:
            result.rows.extend(latency_rows(options.threads, options.seconds))
    return report.finish(result, COLUMNS, options.out)
