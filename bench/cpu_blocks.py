"""`python -m bench cpu_blocks`: single blocks trained on one CPU thread, down to a few positions, against plain torch.

A run is a few steps, each one block forward and backward with batch statistics; both sides have channels_last
parameters, inputs and gradients. Before a shape is timed, our output and all our gradients are compared with
float64's, and where they are further off than plain torch's in float32 may be, there is no time. Rounds are
interleaved; times are on the core.
"""

import copy
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bench import check, report, schema, timing
from bench.schema import Row
from bench.tables import Column
from mbv2 import kernels
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.model import InvertedResidual
from mbv2.progress import Progress

CPU = torch.device("cpu")
LAST = torch.channels_last
STEPS = 5
COLUMNS = (
    Column("shape", "input"),
    Column("outputs", "outputs"),
    Column("stride", "stride"),
    Column("rounds", "rounds"),
    Column("cpu_min_us", "least us a step", ".0f"),
    Column("eager_min_us", "plain torch", ".0f"),
    Column("faster", "x plain torch", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
    Column("error", "error", ".1e"),
)


class Block(NamedTuple):
    """One block on one input: pictures, channels in and out, the picture's size, stride, expansion."""

    batch: int
    inputs: int
    outputs: int
    height: int
    width: int
    stride: int
    expansion: int = 6

    @property
    def shape(self) -> str:
        """The input's, as tables have it."""
        return f"{self.batch} x {self.inputs} x {self.height} x {self.width}"


# Late blocks at batch 1 and 2, where weights are more than activations; what tiny pictures come to; odd sizes.
BLOCKS = (
    Block(1, 160, 320, 7, 7, 1),
    Block(1, 160, 160, 7, 7, 1),
    Block(2, 160, 160, 7, 7, 1),
    Block(1, 96, 160, 14, 14, 2),
    Block(1, 96, 96, 14, 14, 1),
    Block(1, 64, 64, 14, 14, 1),
    Block(1, 32, 32, 28, 28, 1),
    Block(1, 32, 16, 112, 112, 1, 1),
    Block(3, 8, 8, 2, 2, 1),
    Block(5, 8, 8, 1, 1, 1),
    Block(8, 160, 160, 1, 1, 1),
    Block(3, 24, 24, 37, 53, 1),
    Block(3, 24, 24, 37, 53, 2),
)


def make(block: Block) -> tuple[InvertedResidual, Tensor, Tensor]:
    """A block in training mode, its input and the gradient at its output."""
    torch.manual_seed(0)
    module = InvertedResidual(block.inputs, block.outputs, block.stride, block.expansion).train()
    x = torch.randn(block.batch, block.inputs, block.height, block.width)
    height, width = ((size - 1) // block.stride + 1 for size in (block.height, block.width))
    grad = torch.randn(block.batch, block.outputs, height, width)
    return module.to(memory_format=LAST), x.to(memory_format=LAST), grad.to(memory_format=LAST)


def results(module: InvertedResidual, x: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    """Output and gradients of the input and of all parameters of a copy of `module`, after one step."""
    module, x = copy.deepcopy(module), x.clone(memory_format=torch.preserve_format).requires_grad_()
    with kernels.backend(backend):
        out = module(x)
    out.backward(grad)
    return [out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())]


def stepper(module: InvertedResidual, x: Tensor, grad: Tensor, backend: str) -> Callable[[], None]:
    """A run of `STEPS` steps."""
    module, x = copy.deepcopy(module), x.clone(memory_format=torch.preserve_format).requires_grad_()

    def run() -> None:
        with kernels.backend(backend):
            for _ in range(STEPS):
                module(x).backward(grad)
                module.zero_grad()
                x.grad = None

    return run


def error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The error of all tensors taken together, each relative to its own norm.

    Single values flip at ReLU6's corners on either side, so that one gradient's error says little.
    """
    return sum(check.error([one], [exact]) ** 2 for one, exact in zip(got, expected, strict=True)) ** 0.5


def measure(block: Block, seconds: float) -> tuple[Row, str | None]:
    """One block's times against plain torch's, and what is wrong with our results, if anything."""
    module, x, grad = make(block)
    exact = results(copy.deepcopy(module).double(), x.double(), grad.double(), "aten")
    own, plain = (error(results(module, x, grad, backend), exact) for backend in ("cpu", "aten"))
    row: Row = {"shape": block.shape, "outputs": block.outputs, "stride": block.stride, "error": own}
    # Gradients that cancel to nothing (of a BatchNorm's bias before another) have no digits in float32.
    wrong = check.fault(own, plain, torch.float32, floor=1e-4)
    if wrong:
        return row, wrong
    runs = {"mbv2": stepper(module, x, grad, "cpu"), "eager": stepper(module, x, grad, "aten")}
    times = timing.interleaved(runs, seconds, CPU, 5)
    ratios = [theirs / ours for ours, theirs in zip(times["mbv2"].cpu, times["eager"].cpu, strict=True)]
    low, middle, high = timing.quartiles(ratios)
    least = {name: 1e6 * min(taken.cpu) / STEPS for name, taken in times.items()}
    row |= {"rounds": len(ratios), "cpu_min_us": least["mbv2"], "eager_min_us": least["eager"]}
    return {**row, "faster": middle, "faster_low": low, "faster_high": high}, None


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("cpu_blocks", __doc__.split("\n")[0], seconds=4.0)
    options = parser.parse_args(argv)
    if cpu_network.refusal() is not None:
        raise UserError(cpu_network.refusal())
    settings = {"device": "cpu", "dtype": "float32", "isa": cpu_network.isa(), "threads": 1, "steps": STEPS}
    result = schema.new("cpu_blocks", argv, {**settings, "seconds": options.seconds})
    torch.set_num_threads(1)
    with Progress(len(BLOCKS), "cpu_blocks", "blocks") as progress:
        for block in BLOCKS:
            row, wrong = measure(block, options.seconds)
            if wrong:
                result.left_out[f"mbv2 at {block.shape} to {block.outputs}, stride {block.stride}"] = wrong
            else:
                result.rows.append(row)
            progress.advance()
    return report.finish(result, COLUMNS, options.out)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
