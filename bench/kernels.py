"""`python -m bench kernels`: every operator of a network, forward and backward, by each backend of this machine.

The operators are the stem, each distinct inverted-residual block and the head. `aten`, which is plain torch in eager
mode, is what the others are compared with. A backend is timed on an operator only when its outputs and gradients are
as near to float64 as those of plain torch.

GFLOP/s counts the convolutions' multiply-adds twice. GB/s counts what any implementation has to move: inputs, outputs
and their gradients, each once; a kernel that stores tensors in between moves more and shows a lower figure.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import check, report, schema, timing
from bench.tables import Column
from mbv2 import kernels
from mbv2.errors import UserError
from mbv2.kernels import dispatch
from mbv2.model import InvertedResidual, MobileNetV2, Stem
from mbv2.progress import Progress

PASSES = ("inference", "forward", "backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "aten"
COLUMNS = (
    Column("operator", "operator"),
    Column("pass", "pass"),
    Column("backend", "backend"),
    Column("median_ms", "median ms", ".3f"),
    Column("p25_ms", "p25", ".3f"),
    Column("p75_ms", "p75", ".3f"),
    Column("gflop_per_s", "GFLOP/s", ".1f"),
    Column("gb_per_s", "GB/s", ".1f"),
    Column("faster", "x aten", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
)


@dataclass(frozen=True)
class Operator:
    """One operator of a network: the module that has its tensors, and its input's shape."""

    name: str
    module: nn.Module
    shape: tuple[int, int, int, int]

    def run(self, x: Tensor) -> Tensor:
        """The public operator on the module's tensors."""
        if isinstance(self.module, (Stem, InvertedResidual)):
            return self.module(x)
        return kernels.head(x, self.module.stage())


def operators(width: float, resolution: int, batch: int) -> Iterator[Operator]:
    """Stem, distinct blocks and head of a network, in order, with random weights and statistics."""
    torch.manual_seed(0)
    side, channels, seen = resolution, 3, set()
    for module in _random_statistics(MobileNetV2(width_mult=width)).features:
        shape = (batch, channels, side, side)
        convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
        stride, outputs = max(c.stride[0] for c in convolutions), convolutions[-1].out_channels
        if isinstance(module, InvertedResidual):
            hidden = convolutions[-1].in_channels
            name = f"block {channels}-{hidden}-{outputs} s{stride} {side}{' +x' if module.use_res_connect else ''}"
        else:
            name = f"{'stem' if isinstance(module, Stem) else 'head'} {channels}-{outputs} {side}"
        if name not in seen:
            seen.add(name)
            yield Operator(name, module, shape)
        side, channels = (side - 1) // stride + 1, outputs


def _random_statistics(model: MobileNetV2) -> MobileNetV2:
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            nn.init.normal_(module.running_mean, 0, 0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


def multiply_adds(operator: Operator) -> int:
    """Of the forward pass of all pictures."""
    n, _, side, _ = operator.shape
    total = 0
    for conv in operator.module.modules():
        if isinstance(conv, nn.Conv2d):
            side = (side - 1) // conv.stride[0] + 1
            total += conv.weight.numel() * side * side * n
    return total


def moved_bytes(operator: Operator, out: Tensor, itemsize: int, which: str) -> int:
    """Bytes of the operator's inputs and outputs, each once; backward: also of both gradients, less the output."""
    x, weights = torch.Size(operator.shape).numel(), sum(p.numel() for p in operator.module.parameters())
    if which != "backward":
        return (x + out.numel() + weights) * itemsize
    dx = 0 if isinstance(operator.module, Stem) else x
    return (x + dx + out.numel() + 2 * weights) * itemsize


def measure(operator: Operator, which: str, backends: Sequence[str], device: torch.device, seconds: float) -> Any:
    """(rows, what was left out with its reason) for one pass of one operator."""
    dtype = next(operator.module.parameters()).dtype
    x = _input(operator, device, dtype)
    expected = _results(operator, which, "aten", x.double())
    plain = check.error(_results(operator, which, BASELINE, x), expected)
    runs: dict[str, Callable[[], object]] = {}
    errors, left_out = {}, {}
    for backend in backends:
        label = f"mbv2 {backend}, {operator.name}, {which}"
        try:
            errors[backend] = check.error(_results(operator, which, backend, x), expected)
        except kernels.BackendError as error:
            left_out[f"mbv2 {backend}"] = str(error)
            continue
        wrong = check.fault(errors[backend], plain, dtype)
        if wrong:
            left_out[label] = wrong
        else:
            runs[backend] = _runner(operator, which, backend, x)
    times = timing.interleaved(runs, seconds, device)
    with torch.no_grad():
        out = operator.run(x)
    rows = []
    for backend, taken in times.items():
        figures = timing.summary(taken, times[BASELINE], device)
        operations = 2 * multiply_adds(operator) * _products(operator, which)
        rows.append(
            {
                "operator": operator.name,
                "pass": which,
                "backend": backend,
                **figures,
                "gflop_per_s": operations / figures["median_ms"] / 1e6,
                "gb_per_s": moved_bytes(operator, out, dtype.itemsize, which) / figures["median_ms"] / 1e6,
                "error": errors[backend],
            }
        )
    return rows, left_out


def _products(operator: Operator, which: str) -> int:
    """Products as large as the forward pass's: a gradient for the weights, and one for the input if it has one."""
    if which != "backward":
        return 1
    return 1 if isinstance(operator.module, Stem) else 2


def _input(operator: Operator, device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(operator.shape, generator=generator).to(device, dtype)
    return x.to(memory_format=torch.channels_last)


def _prepared(operator: Operator, which: str, x: Tensor) -> tuple[Operator, Tensor]:
    """The operator's module in x's type and the mode of the pass, and x with a gradient where the pass wants one."""
    module = operator.module.to(x.device, x.dtype).train(which != "inference")
    needs = which == "backward" and not isinstance(module, Stem)
    return Operator(operator.name, module, operator.shape), x.detach().requires_grad_(needs)


def _results(operator: Operator, which: str, backend: str, x: Tensor) -> list[Tensor]:
    """What the pass computes: the output, or the gradients of input and parameters."""
    dtype = next(operator.module.parameters()).dtype
    state = {name: value.clone() for name, value in operator.module.state_dict().items()}
    ready, x = _prepared(operator, which, x)
    with kernels.backend(backend), torch.no_grad() if which != "backward" else nullcontext():
        out = ready.run(x)
        results = [out] if which != "backward" else _gradients(ready, out, x)
    operator.module.to(dtype).load_state_dict(state)
    return [result.detach() for result in results]


def _gradients(operator: Operator, out: Tensor, x: Tensor) -> list[Tensor]:
    wanted = [*([x] if x.requires_grad else []), *operator.module.parameters()]
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    if grad.dim() == 4:
        grad = grad.to(memory_format=torch.channels_last)
    return list(torch.autograd.grad(out, wanted, grad, retain_graph=True))


def _runner(operator: Operator, which: str, backend: str, x: Tensor) -> Callable[[], object]:
    # Of its own module: a forward pass moves the running statistics that another runner's backward pass has saved.
    ready, x = _prepared(replace(operator, module=copy.deepcopy(operator.module)), which, x)
    if which == "backward":
        with kernels.backend(backend):
            out = ready.run(x)
        grad = torch.randn_like(out)
        wanted = [*([x] if x.requires_grad else []), *ready.module.parameters()]

        def run() -> object:
            with kernels.backend(backend):
                return torch.autograd.grad(out, wanted, grad, retain_graph=True)
    elif which == "forward":

        def run() -> object:
            with kernels.backend(backend):
                return ready.run(x)
    else:

        def run() -> object:
            with kernels.backend(backend), torch.no_grad():
                return ready.run(x)

    return run


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("kernels", __doc__.split("\n")[0], seconds=2.0)
    parser.add_argument("--model", default="1.0_224", help="width_resolution [%(default)s]")
    parser.add_argument("--batch", type=int, default=8, help="pictures [%(default)s]")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU [%(default)s]")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES))
    parser.add_argument("--backends", nargs="+", help="besides aten (default: all of this build)")
    parser.add_argument("--operators", nargs="+", default=[""], help="only those whose name begins with one of these")
    options = parser.parse_args(argv)
    device = report.device_of(options.device)
    torch.set_num_threads(options.threads)
    width, resolution = variant(options.model)
    backends = [BASELINE, *(name for name in options.backends or dispatch.available() if name != BASELINE)]
    settings = {
        "model": options.model,
        "batch": options.batch,
        "dtype": options.dtype,
        "device": device.type,
        "threads": options.threads,
    }
    result = schema.new("kernels", argv, settings)
    chosen = [o for o in operators(width, resolution, options.batch) if o.name.startswith(tuple(options.operators))]
    with Progress(len(chosen) * len(options.passes), "kernels", "passes") as progress:
        for operator in chosen:
            operator.module.to(device, DTYPES[options.dtype])
            for which in options.passes:
                rows, left_out = measure(operator, which, backends, device, options.seconds)
                result.rows.extend(rows)
                result.left_out.update(left_out)
                progress.advance()
    return report.finish(result, COLUMNS, options.out)


def variant(name: str) -> tuple[float, int]:
    """(width, resolution) of a name such as 0.75_192.

    Raises:
        UserError: it is no such name.
    """
    width, _, resolution = name.partition("_")
    try:
        return float(width), int(resolution)
    except ValueError:
        raise UserError(f"{name}: a model is width_resolution, e.g. 0.75_192") from None
