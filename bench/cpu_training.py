"""`python -m bench cpu_training`: training steps on a CPU against what a PyTorch user has there.

A step is forward, cross entropy, backward and SGD with momentum. Every runner starts from the same weights; before
anything is timed its loss and all its gradients on a few pictures are compared with torchvision's in float64, and a
runner whose error is beyond that of eager in its own precision gets no time. Steps are interleaved: each round times
every runner once, so that all see the same disturbances. Ratios are of time on the cores, of all threads together;
with two threads the clock's are given as well. A runner that takes more than SLOW times mbv2's step is timed at the
smallest batch only: bfloat16 autocast where the CPU has no instructions for it. torch.compile, which compiles for
a minute, is there at the largest batch only. Saved MiB are what autograd keeps for the backward pass.
"""

import copy
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torchvision
from torch import Tensor, nn

import mbv2
from bench import report, schema, tables, timing
from bench.kernels import variant
from bench.memory import saved_bytes
from bench.schema import Row
from bench.tables import Column
from mbv2 import kernels
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.progress import Progress

CLASSES = 1000
# Pictures of the comparison with float64: batch statistics need a few, float64 is slow.
CHECKED = 4
ROUNDS = 3
SLOW = 6.0
CPU = torch.device("cpu")
BASELINE, COMPILED = "eager channels_last", "torch.compile"
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("threads", "threads"),
    Column("runner", "runner"),
    Column("rounds", "rounds"),
    Column("cpu_median_ms", "CPU ms", ".0f"),
    Column("cpu_min_ms", "least", ".0f"),
    Column("median_ms", "clock ms", ".0f"),
    Column("images_per_s", "images/s", ".1f"),
    Column("faster", "x eager", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
    Column("wall_faster", "x by the clock", ".2f"),
    Column("saved_mib_per_image", "saved MiB/image", ".1f"),
    Column("error", "error", ".1e"),
)


class Case(NamedTuple):
    """One model, batch and number of threads."""

    width: float
    resolution: int
    batch: int
    threads: int

    @property
    def name(self) -> str:
        """As tables and messages have it."""
        return f"{self.width}_{self.resolution} batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"


class Runner(NamedTuple):
    """A way to train: a model, the layout of its pictures, and the type autocast computes in (None: off)."""

    model: nn.Module
    layout: torch.memory_format
    autocast: torch.dtype | None

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of the logits."""
        with torch.autocast("cpu", self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            logits = self.model(x.to(memory_format=self.layout))
        return nn.functional.cross_entropy(logits.float(), labels)


NCHW, LAST, HALF = torch.contiguous_format, torch.channels_last, torch.bfloat16


def make_runners(width: float, wanted: list[str]) -> tuple[dict[str, Runner], nn.Module]:
    """The runners asked for, all with the weights of the plain torchvision model that is returned too."""
    torch.manual_seed(0)
    plain = torchvision.models.mobilenet_v2(width_mult=width, dropout=0.0).train()
    ours = mbv2.MobileNetV2(CLASSES, width, dropout=0.0).train()
    ours.load_state_dict(plain.state_dict())

    def last(model: nn.Module) -> nn.Module:
        return copy.deepcopy(model).to(memory_format=LAST)

    makers: dict[str, Callable[[], Runner]] = {
        "mbv2": lambda: Runner(last(ours), LAST, None),
        "mbv2 bf16 autocast": lambda: Runner(last(ours), LAST, HALF),
        BASELINE: lambda: Runner(last(plain), LAST, None),
        "eager NCHW": lambda: Runner(copy.deepcopy(plain), NCHW, None),
        "eager channels_last bf16 autocast": lambda: Runner(last(plain), LAST, HALF),
        COMPILED: lambda: Runner(torch.compile(copy.deepcopy(plain), dynamic=False), NCHW, None),
    }
    return {name: makers[name]() for name in wanted}, plain


RUNNERS = (
    "mbv2",
    BASELINE,
    "eager NCHW",
    "eager channels_last bf16 autocast",
    "mbv2 bf16 autocast",
    COMPILED,
)


def gradients(loss: Tensor, model: nn.Module) -> Tensor:
    """Loss and all gradients of `model` as one vector in float64; the gradients are cleared."""
    loss.backward()
    parts = [loss.detach().double().reshape(1)]
    for parameter in model.parameters():
        parts.append(parameter.grad.double().contiguous().flatten())
        parameter.grad = None
    return torch.cat(parts)


def checked(width: float, resolution: int, runners: dict[str, Runner], plain: nn.Module) -> tuple[dict, dict]:
    """Relative error of each right runner's loss and gradients against float64, and why the others are left out."""
    x = torch.randn(CHECKED, 3, resolution, resolution)
    labels = torch.randint(CLASSES, (CHECKED,))
    exact_model = copy.deepcopy(plain).double()
    exact = gradients(nn.functional.cross_entropy(exact_model(x.double()), labels), exact_model)
    found = {}
    for name, runner in runners.items():
        state = copy.deepcopy(runner.model.state_dict())
        got = gradients(runner.loss(x, labels), runner.model)
        runner.model.load_state_dict(state)
        found[name] = float((got - exact).norm() / exact.norm())
    wrong = {
        name: f"wrong: loss and gradients differ from float64 by {found[name]:.1e}"
        for name, runner in runners.items()
        if not found[name] <= allowed(found, runner, runners)
    }
    return {name: error for name, error in found.items() if name not in wrong}, wrong


def allowed(found: dict[str, float], runner: Runner, peers: dict[str, Runner]) -> float:
    """1.3 times the worst eager error in the runner's precision, and a floor."""
    eager = [found[name] for name, peer in peers.items() if "eager" in name and peer.autocast == runner.autocast]
    return 1.3 * max(eager, default=0.0) + (1e-4 if runner.autocast is None else 1e-2)


def saved_mib(runner: Runner, x: Tensor, labels: Tensor) -> float:
    """MiB per picture that autograd keeps between forward and backward."""
    kept = [*runner.model.parameters(), *runner.model.buffers(), x, labels]
    return saved_bytes(lambda y: runner.loss(y, labels), kept, x) / len(x) / 2**20


def stepper(runner: Runner, x: Tensor, labels: Tensor) -> Callable[[], None]:
    """One training step of `runner`, ready to be called."""
    optimizer = torch.optim.SGD(runner.model.parameters(), 1e-4, momentum=0.9, weight_decay=4e-5)
    pictures = x.to(memory_format=runner.layout)

    def step() -> None:
        runner.loss(pictures, labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(case: Case, runners: dict[str, Runner], found: dict[str, float], seconds: float) -> list[Row]:
    """Time `runners` against each other."""
    torch.set_num_threads(case.threads)
    x = torch.randn(case.batch, 3, case.resolution, case.resolution)
    labels = torch.randint(CLASSES, (case.batch,))
    saved = {name: saved_mib(runner, x, labels) for name, runner in runners.items() if name != COMPILED}
    runs = {name: stepper(runner, x, labels) for name, runner in runners.items()}
    times = timing.interleaved(runs, seconds, CPU, ROUNDS)
    baseline = BASELINE if BASELINE in times else next(iter(times))
    rows = []
    for name, taken in times.items():
        figures = timing.summary(taken, times[baseline], CPU)
        walls = [b / a for a, b in zip(taken.wall, times[baseline].wall, strict=True)]
        rows.append(
            {
                "model": f"{case.width}_{case.resolution}",
                "batch": case.batch,
                "threads": case.threads,
                "runner": name,
                "baseline": baseline,
                "rounds": len(taken.wall),
                **figures,
                "cpu_min_ms": 1e3 * min(taken.cpu),
                "wall_faster": statistics.median(walls),
                "images_per_s": 1e3 * case.batch / figures["median_ms"],
                "error": found[name],
                "saved_mib_per_image": saved.get(name),
            }
        )
    return rows


def too_slow(rows: Sequence[Row], threads: int) -> list[str]:
    """Runners whose step took more than SLOW times mbv2's, with as many threads, in a case that was measured."""
    times = {row["runner"]: row["cpu_median_ms"] for row in rows if row["threads"] == threads}
    return [name for name, taken in times.items() if taken > SLOW * times.get("mbv2", taken)]


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu_training", __doc__.split("\n")[0], seconds=40.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=RUNNERS)
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise UserError(cpu_network.refusal())
    batches = sorted(options.batches)
    settings = {"device": "cpu", "dtype": "float32", "seconds": options.seconds, "isa": cpu_network.isa()}
    settings["peak_gflops_a_core"] = torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()) / 1e9
    result = schema.new("cpu_training", argv, settings)
    cases = [(batch, threads) for batch in batches for threads in options.threads]
    with kernels.backend("auto"), Progress(len(options.models) * (1 + len(cases)), "cpu_training", "cases") as progress:
        for model in options.models:
            width, resolution = variant(model)
            torch.set_num_threads(max(options.threads))
            found, left_out = checked(width, resolution, *make_runners(width, options.runners))
            result.left_out.update(left_out)
            progress.advance()
            for batch, threads in cases:
                slow = too_slow([row for row in result.rows if row["model"] == model], threads)
                for name in slow:
                    result.left_out[f"{name}, batch {batch}, {threads} threads"] = f"over {SLOW:.0f} x mbv2's step"
                wanted = [n for n in found if n not in slow and (n != COMPILED or batch == batches[-1])]
                torch._dynamo.reset()
                torch.set_num_threads(threads)
                runners = make_runners(width, wanted)[0]
                result.rows.extend(measure(Case(width, resolution, batch, threads), runners, found, options.seconds))
                progress.advance()
                print(tables.text(result, COLUMNS), file=sys.stderr, flush=True)
    return report.finish(result, COLUMNS, options.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
