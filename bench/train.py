"""`python -m bench train`: images/s of a training step (forward, loss, backward, SGD) against torchvision.

Before anything is timed, every runner's loss and gradients of one step, from the same weights on the same pictures,
must be as near to those in float64 as torchvision's are; dropout is off so that this can be asked. They are compared
twice. With random weights one rounding moves some value past a bend of ReLU6, which changes gradients by a percent or
so; with BatchNorms that keep all values between the bends only roundings are left, and the limit is tight. With --dtype
bfloat16 or float16 the steps run under autocast.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import check, report, schema, timing
from bench.kernels import DTYPES, variant
from bench.model import models, pictures
from bench.tables import Column
from mbv2 import kernels
from mbv2.kernels import dispatch
from mbv2.progress import Progress

CHECKED_BATCH = 8
# What a stage's gradients may differ by in any case: by values that cross a bend of ReLU6, and by roundings alone.
BENDS = 0.1
ROUNDINGS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 8e-2}
BASELINE = "torchvision eager"
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("runner", "runner"),
    Column("median_ms", "median ms", ".1f"),
    Column("p25_ms", "p25", ".1f"),
    Column("p75_ms", "p75", ".1f"),
    Column("cpu_median_ms", "on cores", ".1f"),
    Column("images_per_s", "images/s", ".1f"),
    Column("faster", "x eager", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
    Column("error", "error", ".1e"),
)


class Step:
    """A network with its optimizer; calling it trains one step on given pictures and returns the loss."""

    def __init__(
        self,
        model: nn.Module,
        memory_format: torch.memory_format,
        within: Callable[[], AbstractContextManager[Any]] = nullcontext,
        autocast: torch.dtype | None = None,
        run: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.model = model.train().to(memory_format=memory_format)
        self.memory_format = memory_format
        self.autocast = autocast
        self._within = within
        # Not `or`: the truth of a compiled module is its length, which it has not.
        self._run = self.model if run is None else run
        self._optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01, momentum=0.9)

    def __call__(self, x: Tensor, labels: Tensor) -> Tensor:
        loss = self.loss(x, labels)
        self._optimizer.step()
        return loss

    def loss(self, x: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward: the loss, with the parameters' gradients in place."""
        cast = torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext()
        with self._within():
            with cast:
                loss = F.cross_entropy(self._run(x).float() if self.autocast else self._run(x), labels)
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
        return loss.detach()


def steps(width: float, device: torch.device, dtype: torch.dtype, wanted: Sequence[str]) -> dict[str, Step]:
    """Every way to train the network, with the same weights: torchvision's, and ours by each backend."""
    ours, theirs = models(width)
    for model in (ours, theirs):
        model.classifier[0].p = 0.0
        model.to(device)
    autocast = None if dtype == torch.float32 else dtype
    last, first = torch.channels_last, torch.contiguous_format

    def peer(memory_format: torch.memory_format) -> Step:
        return Step(copy.deepcopy(theirs), memory_format, autocast=autocast)

    def compiled() -> Step:
        model = copy.deepcopy(theirs).to(memory_format=last).train()
        return Step(model, last, autocast=autocast, run=torch.compile(model))

    makers: dict[str, Callable[[], Step]] = {
        BASELINE: lambda: peer(first),
        "torchvision channels_last": lambda: peer(last),
        "torchvision torch.compile": compiled,
    }
    for name in dispatch.available():
        makers[f"mbv2 {name}"] = lambda name=name: Step(
            copy.deepcopy(ours), last, lambda: kernels.backend(name), autocast
        )
    return {name: make() for name, make in makers.items() if not wanted or name in (*wanted, BASELINE)}


def first_step(
    step: Step, resolution: int, device: torch.device, between_bends: bool, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    """The loss of one step, and each stage's gradients as one vector; the network is as before afterwards.

    Not each parameter's: what stands before a BatchNorm has gradients that are nothing but rounding.
    """
    state = copy.deepcopy(step.model.state_dict())
    if between_bends:
        for module in step.model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.constant_(module.weight, 0.4)
                nn.init.constant_(module.bias, 3.0)
    x, labels = batch_of(CHECKED_BATCH, resolution, device, step.memory_format)
    loss = step.loss(x.to(dtype), labels)
    stages = [*step.model.features, step.model.classifier]
    gradients = [torch.cat([p.grad.flatten() for p in stage.parameters()]).cpu() for stage in stages]
    step.model.load_state_dict(state)
    return [loss.cpu(), *gradients]


def batch_of(
    batch: int, resolution: int, device: torch.device, memory_format: torch.memory_format
) -> tuple[Tensor, Tensor]:
    """Random pictures and labels."""
    labels = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(2))
    return pictures(batch, resolution).to(device).to(memory_format=memory_format), labels.to(device)


def checked(
    found: dict[str, Step], width: float, resolution: int, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str]]:
    """The errors (between the bends) of the runners that are right, and why the others are left out."""
    _, theirs = models(width)
    theirs.classifier[0].p = 0.0
    reference = Step(theirs.double(), torch.contiguous_format)
    errors, left_out = {}, {}
    for between_bends in (True, False):
        expected = first_step(reference, resolution, torch.device("cpu"), between_bends, torch.float64)
        plain = None
        for name, step in found.items():
            if name in left_out:
                continue
            try:
                error = check.error(first_step(step, resolution, device, between_bends), expected)
            except kernels.BackendError as refused:
                left_out[name] = str(refused)
                continue
            plain = error if plain is None else plain
            errors.setdefault(name, error)
            wrong = check.fault(error, plain, dtype, ROUNDINGS[dtype] if between_bends else BENDS)
            if wrong:
                left_out[name] = wrong
    return {name: error for name, error in errors.items() if name not in left_out}, left_out


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("train", __doc__.split("\n")[0], seconds=60.0)
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[32])
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: by autocast")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU [%(default)s]")
    parser.add_argument("--runners", nargs="+", default=[], help=f"only these and {BASELINE} (default: all)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    device = report.device_of(options.device)
    torch.set_num_threads(options.threads)
    dtype = DTYPES[options.dtype]
    settings = {"dtype": options.dtype, "device": device.type, "threads": options.threads, "seconds": options.seconds}
    result = schema.new("train", argv, settings)
    with Progress(len(options.models) * len(options.batches), "train", "cases") as progress:
        for model in options.models:
            width, resolution = variant(model)
            found = steps(width, device, dtype, options.runners)
            errors, left_out = checked(found, width, resolution, device, dtype)
            result.left_out.update(left_out)
            for batch in options.batches:
                runs = {name: _runner(found[name], batch, resolution, device) for name in errors}
                times = timing.interleaved(runs, options.seconds, device)
                for name, taken in times.items():
                    figures = timing.summary(taken, times[BASELINE], device)
                    rate = 1e3 * batch / figures["median_ms"]
                    where = {"model": model, "batch": batch, "runner": name}
                    result.rows.append({**where, **figures, "images_per_s": rate, "error": errors[name]})
                progress.advance()
    return report.finish(result, COLUMNS, options.out)


def _runner(step: Step, batch: int, resolution: int, device: torch.device) -> Callable[[], object]:
    x, labels = batch_of(batch, resolution, device, step.memory_format)
    return lambda: step(x, labels)
