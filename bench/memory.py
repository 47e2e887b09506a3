"""`python -m bench memory`: what training keeps for the backward pass, and the peak of a training step.

Saved: bytes of activations that autograd saves per picture in the 17 inverted-residual blocks, counted with
saved-tensor hooks (each storage once, parameters left out) while the blocks run forward on the CPU: torchvision's own
blocks, the same through torch.compile's partitioner, and the operators of mbv2.kernels. The counts depend on shapes and
types only, so they hold for a GPU too.

Peak: most memory that a process of its own had resident at any time of two float32 training steps on a CPU, less what
it had before the first; allocators keep freed memory, so this is an upper bound of what is needed.
"""

import json
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from bench import report, schema
from bench.tables import Column
from mbv2.kernels import fused
from mbv2.model import MobileNetV2
from mbv2.progress import Progress

EAGER, COMPILED, OURS = "torchvision eager", "torchvision torch.compile", "mbv2 operators"
NETWORK = "mbv2 network"
COLUMNS = (
    Column("runner", "runner"),
    Column("saved_mb", "saved MB/picture", ".2f"),
    Column("less_saved", "x less", ".2f"),
    Column("peak_mb", "peak MB of a step", ".0f"),
    Column("less_peak", "x less", ".2f"),
)


def saved_bytes(run: Callable[[Tensor], Tensor], parameters: list[Tensor], x: Tensor) -> int:
    """Bytes of storages that autograd keeps while `run` maps x, not counting those of `parameters`."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = run(x)
    assert out.requires_grad
    return sum(kept.values())


def fused_blocks(net: MobileNetV2) -> Callable[[Tensor], Tensor]:
    """The 17 blocks through mbv2's operators, whichever backend would be chosen."""

    def run(x: Tensor) -> Tensor:
        for block in net.features[1:-1]:
            x = fused.inverted_residual(x, *block.stages(), block.stride, block.use_res_connect)
        return x

    return run


def saved_megabytes(resolution: int, batch: int, dtype: torch.dtype) -> dict[str, float]:
    """MB saved per picture by each way of running the blocks of width 1.0."""
    half = (resolution + 1) // 2
    x = torch.randn(batch, 32, half, half, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    peer = torchvision.models.mobilenet_v2(weights=None).to(dtype).train()
    blocks = nn.Sequential(*peer.features[1:-1]).to(memory_format=torch.channels_last)
    ours = MobileNetV2().to(dtype).train()
    # The partitioner decides what is saved; Inductor's code generation after it changes nothing about that.
    compiled = torch.compile(blocks, backend="aot_eager_decomp_partition")
    ways: dict[str, tuple[Callable[[Tensor], Tensor], nn.Module]] = {
        EAGER: (blocks, blocks),
        COMPILED: (compiled, blocks),
        OURS: (fused_blocks(ours), ours),
    }
    return {
        name: saved_bytes(run, [*module.parameters(), *module.buffers()], x) / batch / 1e6
        for name, (run, module) in ways.items()
    }


def peak_megabytes(runner: str, resolution: int, batch: int) -> tuple[str, float]:
    """(runner, and for ours the backends that ran; peak of two training steps), in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", runner, str(resolution), str(batch)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    backends, megabytes = json.loads(done.stdout)
    return (f"{runner} ({', '.join(backends)})" if backends else runner), megabytes


def _steps(runner: str, resolution: int, batch: int) -> tuple[list[str], float]:
    """The backends that ran, and the MB that the process grew by at its largest, over two steps."""
    from torch.nn import functional as F

    from mbv2 import kernels

    model = MobileNetV2() if runner == NETWORK else torchvision.models.mobilenet_v2(weights=None)
    model.train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.zeros(batch, dtype=torch.int64)
    before = _resident()
    x = torch.randn(batch, 3, resolution, resolution).to(memory_format=torch.channels_last)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    # ru_maxrss counts in KiB on Linux.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    backends = {call.split("/")[1] for call in kernels.report()["calls"]}
    return sorted(backends), (peak - before) / 1e6


def _put(rows: list[schema.Row], runner: str, peak: float) -> None:
    """Add a peak to the runner's row, or as a row of its own; `less_peak` is to the first one."""
    first = next((row["peak_mb"] for row in rows if "peak_mb" in row), peak)
    figures = {"peak_mb": peak, "less_peak": first / peak}
    for row in rows:
        if row["runner"] == runner:
            row.update(figures)
            return
    rows.append({"runner": runner, **figures})


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("memory", __doc__.split("\n")[0])
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2, help="pictures that saved bytes are counted with [%(default)s]")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of saved bytes"
    )
    parser.add_argument("--step_batch", type=int, default=32, help="pictures in a step; 0 leaves the peak out")
    given = parser.parse_args(argv)
    settings = {
        "model": f"1.0_{given.resolution}",
        "saved_dtype": given.dtype,
        "saved_batch": given.batch,
        "step_dtype": "float32",
        "step_batch": given.step_batch,
    }
    result = schema.new("memory", argv, settings)
    saved = saved_megabytes(given.resolution, given.batch, getattr(torch, given.dtype))
    for runner, megabytes in saved.items():
        result.rows.append({"runner": runner, "saved_mb": megabytes, "less_saved": saved[EAGER] / megabytes})
    measured = (EAGER, NETWORK) if given.step_batch else ()
    with Progress(len(measured), "memory", "processes") as progress:
        for runner in measured:
            name, megabytes = peak_megabytes(runner, given.resolution, given.step_batch)
            _put(result.rows, name, megabytes)
            progress.advance()
    return report.finish(result, COLUMNS, given.out)


if __name__ == "__main__":
    print(json.dumps(_steps(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
