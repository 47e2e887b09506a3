"""`python -m bench cpu_scaling`: what a picture costs on one CPU thread as batches and pictures grow, and odd shapes.

Cost per picture at batch 1 to 256, cost per 1,000 pixels at 96 to 512 pixels a side, and shapes nobody plans for
against torchvision's channels_last model. Rounds are interleaved within each group; times are on the core.
"""

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import mbv2
from bench import check, report, schema, timing
from bench.cpu_peers import make_models
from bench.schema import Row
from bench.tables import Column
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.progress import Progress

CPU = torch.device("cpu")
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SIZES = (96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512)
COLUMNS = (
    Column("group", "group"),
    Column("shape", "pictures"),
    Column("width", "width"),
    Column("rounds", "rounds"),
    Column("cpu_median_ms", "CPU ms", ".3f"),
    Column("per_image_ms", "ms a picture", ".3f"),
    Column("per_kilopixel_us", "us per 1,000 pixels", ".2f"),
    Column("eager_over_ours", "eager over ours", ".2f"),
    Column("eager_over_ours_low", "p25", ".2f"),
    Column("eager_over_ours_high", "p75", ".2f"),
)


class Odd(NamedTuple):
    """A shape nobody plans for: width multiplier, pictures, and their size."""

    width: float
    batch: int
    height: int
    width_px: int


# 0.1 has blocks of 8 channels; one pixel a side is what late stages of tiny pictures come to.
ODD = (
    Odd(1.0, 3, 37, 53),
    Odd(1.0, 1, 1, 1),
    Odd(1.0, 1, 33, 1),
    Odd(0.1, 1, 224, 224),
    Odd(0.1, 3, 37, 53),
    Odd(0.1, 1, 1, 1),
    Odd(0.35, 1, 32, 32),
    Odd(1.4, 2, 97, 61),
)


def ours(width: float) -> Callable[[Tensor], Tensor]:
    """Our network of a width, optimized."""
    return mbv2.optimize_for_inference(make_models(width)[0])


def row(group: str, width: float, x: Tensor, taken: timing.Times) -> Row:
    """The cost of one shape."""
    n, _, h, w = x.shape
    median = 1e3 * statistics.median(taken.cpu)
    return {
        "group": group,
        "shape": f"{n} x {h} x {w}",
        "width": width,
        "rounds": len(taken.cpu),
        "cpu_median_ms": median,
        "cpu_min_ms": 1e3 * min(taken.cpu),
        "per_image_ms": median / n,
        "per_kilopixel_us": 1e6 * median / n / h / w,
    }


def scaling(group: str, shapes: Sequence[tuple[int, int]], seconds: float) -> list[Row]:
    """1.0 at every (batch, side)."""
    fast = ours(1.0)
    inputs = {f"{batch} {side}": torch.randn(batch, 3, side, side) for batch, side in shapes}
    times = timing.interleaved({name: lambda x=x: fast(x) for name, x in inputs.items()}, seconds, CPU, 3)
    return [row(group, 1.0, x, times[name]) for name, x in inputs.items()]


def odd(shape: Odd, seconds: float) -> tuple[Row, str | None]:
    """One odd shape against torchvision, and what is wrong with our logits, if anything."""
    mine, theirs = make_models(shape.width)
    x = torch.randn(shape.batch, 3, shape.height, shape.width_px)
    exact = theirs.double()(x.double())
    theirs = theirs.float().to(memory_format=torch.channels_last)
    fast, last = mbv2.optimize_for_inference(mine), x.to(memory_format=torch.channels_last)
    errors = [check.error([logits], [exact]) for logits in (fast(x), theirs(last))]
    wrong = check.fault(errors[0], errors[1], torch.float32)
    runs = {"eager": lambda: theirs(last), "mbv2": lambda: fast(x)}
    times = timing.interleaved(runs, seconds, CPU, 5)
    low, middle, high = timing.quartiles([a / b for a, b in zip(times["eager"].cpu, times["mbv2"].cpu, strict=True)])
    ratios = {"eager_over_ours": middle, "eager_over_ours_low": low, "eager_over_ours_high": high}
    return {**row("odd shapes", shape.width, x, times["mbv2"]), **ratios}, wrong


@torch.no_grad()
def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu_scaling", __doc__.split("\n")[0], seconds=30.0)
    parser.add_argument("--most", type=int, default=256, help="largest batch [%(default)s]")
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise UserError(cpu_network.refusal())
    settings = {"device": "cpu", "isa": cpu_network.isa(), "threads": 1, "seconds": options.seconds}
    result = schema.new("cpu_scaling", argv, settings)
    torch.set_num_threads(1)
    with Progress(2 + len(ODD), "cpu_scaling", "groups") as progress:
        batches = [(batch, 224) for batch in BATCHES if batch <= options.most]
        for group, shapes in (("batch", batches), ("size", [(1, side) for side in SIZES])):
            result.rows.extend(scaling(group, shapes, options.seconds))
            progress.advance()
        for shape in ODD:
            found, wrong = odd(shape, options.seconds / len(ODD))
            if wrong:
                result.left_out[f"mbv2 at {found['shape']}, width {shape.width}"] = wrong
            else:
                result.rows.append(found)
            progress.advance()
    return report.finish(result, COLUMNS, options.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
