"""How many bytes the training block's kernels really move, counted in 32-byte sectors, against the plan.

`python -m bench.traffic` prints the table and gates it. No GPU is needed: every kernel's PTX runs on the CPU on small
pictures, which shows how many sectors of each of its arrays it touches; the same calls on tensors without memory show
how large these arrays are for a batch of 256 at 224. The product is what DRAM moves per image when each kernel finds
nothing in L2 that an earlier one left there, and everything that it reads twice itself.

The second of these is what the column "blocks" watches: activations fetched by all thread blocks together, each with
an ideal L1, over the distinct ones. What is above 1 comes from L2, as neighbouring blocks, which run at the same time,
share what they read.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from bench import plan
from bench.plan import Block
from mbv2.files import write_atomic
from mbv2.kernels import block as block_stages
from mbv2.kernels.layout import channels_last
from mbv2.kernels.triton import support, tuning

# The emulator belongs to the tests.
_TESTS = str(Path(__file__).resolve().parents[1] / "tests")
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

from ptxcpu import Sectors  # noqa: E402
from ptxcpu.triton_driver import compiled_only, emulated  # noqa: E402

ARCH, DTYPE = 80, torch.float16
BATCH, RESOLUTION = 256, 224
# Sides of the pictures that kernels run on: at most this, and no more rows per program than there are.
RUN_SIDE = 28
# Activations may exceed the plan's by this share. Weights, statistics and partial sums may add twice as much, as sums
# are written and read back; or they may be so few bytes that they come back from L2.
TOLERANCE = 0.1
L2_SHARE = 16e6
PRODUCTS = ("expand", "project", "project_backward", "expand_backward")


@dataclass(frozen=True)
class Array:
    """An array argument of a launch: which memory it is, its size, and whether it grows with the pictures."""

    memory: tuple[int, int]
    bytes: int
    activation: bool


@dataclass
class Launch:
    """One launch of a kernel: its arrays by name and, where it ran, the sectors it touched of each."""

    kernel: str
    arrays: dict[str, Array]
    sectors: dict[str, Sectors] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """What one stage of a block moves, in bytes per image."""

    stage: str
    kernels: tuple[str, ...]
    planned: float
    activations: float
    small: float  # weights, statistics, partial sums
    blocks: float  # activations fetched by all blocks over distinct ones

    @property
    def moved(self) -> float:
        return self.activations + self.small

    def faults(self) -> list[str]:
        """Why the plan is not met; empty when it is."""
        out = []
        if self.activations > (1 + TOLERANCE) * self.planned:
            share = self.activations / self.planned if self.planned else float("inf")
            out.append(f"{self.stage}: moves {share:.2f} times the activations of the plan")
        if self.small > 2 * TOLERANCE * self.planned and self.small * BATCH > 2 * L2_SHARE:
            megabytes = self.small * BATCH / 1e6
            out.append(f"{self.stage}: weights, statistics and partial sums are {megabytes:.0f} MB, too much for L2")
        if self.blocks > (plan.MOST_PRODUCT if self.stage in PRODUCTS else plan.MOST_HALO):
            out.append(f"{self.stage}: blocks fetch {self.blocks:.2f} times the distinct sectors of activations")
        return out


class _Watched:
    """A backend's stages that note which launches each call makes."""

    def __init__(self, stages: Any, launches: list[Launch]):
        self._stages, self._launches = stages, launches
        self.calls: list[tuple[str, list[Launch]]] = []

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            first = len(self._launches)
            result = getattr(self._stages, name)(*args)
            self.calls.append((name, self._launches[first:]))
            return result

        return call


def measure(block: Block, stages: Any = None, run_side: int | None = RUN_SIDE) -> list[Stage]:
    """Every stage of one training step of a block, in the order of the first calls.

    Args:
        block: the shape.
        stages: a backend's stage functions, the Triton kernels by default.
        run_side: side of the pictures on which kernels run; None: run none, take every array as touched once, whole.
    """
    stages = support.stages() if stages is None else stages
    real, tiles = _note_real(block, stages)
    ran = real if run_side is None else _run_small(block, stages, min(run_side, block.side), tiles)
    assert [name for name, _ in real] == [name for name, _ in ran]
    wanted = plan.planned(block, DTYPE.itemsize)
    merged: dict[str, list[tuple[Launch, Launch]]] = {}
    for (name, large), (_, small) in zip(real, ran, strict=True):
        kernels = [launch.kernel for launch in large], [launch.kernel for launch in small]
        assert kernels[0] == kernels[1], f"{name} of {block} launches other kernels on small pictures: {kernels}"
        merged.setdefault(name, []).extend(zip(large, small, strict=True))
    return [_stage(name, pairs, wanted.get(name, 0)) for name, pairs in merged.items()]


def _stage(name: str, pairs: list[tuple[Launch, Launch]], planned: int) -> Stage:
    moved = {True: 0.0, False: 0.0}
    distinct = fetched = 0
    for large, small in pairs:
        for argument, sectors in small.sectors.items():
            here, there = small.arrays[argument], large.arrays[argument]
            touched = 32 * (sectors.loads + sectors.stores)
            moved[there.activation] += touched / here.bytes * there.bytes / BATCH
            if there.activation:
                distinct += sectors.loads + sectors.stores
                fetched += sectors.block_loads + sectors.block_stores
        if not small.sectors:
            for array in {array.memory: array for array in large.arrays.values()}.values():
                moved[array.activation] += array.bytes / BATCH
    kernels = tuple(dict.fromkeys(large.kernel for large, _ in pairs))
    return Stage(name, kernels, planned, moved[True], moved[False], fetched / distinct if distinct else 1.0)


def _note_real(block: Block, stages: Any) -> tuple[list[tuple[str, list[Launch]]], dict[str, dict[str, int]]]:
    """The launches of a real batch, which neither compile nor run, and the tiles that were chosen for them."""
    tiles: dict[str, dict[str, int]] = {}
    choose = tuning.tile

    def noted(kernel: str, *args: Any, **sizes: int) -> dict[str, int]:
        tiles[kernel] = choose(kernel, *args, **sizes)
        return dict(tiles[kernel])  # launchers take theirs apart

    with compiled_only(ARCH), _launches(block, BATCH, block.side, run=False) as launches:
        watched = _Watched(stages, launches)
        tuning.tile = noted
        try:
            _train(watched, block, BATCH, block.side, "meta")
        finally:
            tuning.tile = choose
    return watched.calls, tiles


def _run_small(
    block: Block, stages: Any, side: int, tiles: dict[str, dict[str, int]]
) -> list[tuple[str, list[Launch]]]:
    """The launches of one small picture with the tiles of the real batch, and the sectors they touched."""
    with (
        emulated(ARCH, count_sectors=True) as stats,
        _launches(block, 1, side, run=True) as launches,
        ExitStack() as stack,
    ):
        for kernel, tile in tiles.items():
            stack.enter_context(tuning.forced(kernel, **tile))
        watched = _Watched(stages, launches)
        _train(watched, block, 1, side, "cpu")
    for launch, ran in zip(launches, stats, strict=True):
        launch.sectors = ran.sectors
    return watched.calls


@contextmanager
def _launches(block: Block, batch: int, side: int, run: bool) -> Iterator[list[Launch]]:
    """Every launch inside is noted with its arrays, and made if `run`."""
    log: list[Launch] = []
    # Weights are no multiples of these: they have no factor 7 twice.
    positions = batch * side**2, batch * ((side - 1) // block.stride + 1) ** 2
    original = JITFunction.run

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        arrays = {
            name: Array(
                (value.untyped_storage()._cdata, value.storage_offset()),
                value.numel() * value.element_size(),
                value.dtype == DTYPE and any(value.numel() % rows == 0 for rows in positions),
            )
            for name, value in given.items()
            if isinstance(value, Tensor)
        }
        log.append(Launch(kernel.__name__, arrays))
        return original(kernel, *args, grid=grid, warmup=warmup, **kwargs) if run else None

    JITFunction.run = note
    try:
        yield log
    finally:
        JITFunction.run = original


def _train(stages: Any, block: Block, batch: int, side: int, device: str) -> None:
    """Forward and backward of a block, all gradients asked for."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        if device == "meta":
            return torch.empty(shape, dtype=DTYPE, device="meta")
        return torch.randn(shape, generator=generator).to(DTYPE)

    def norm(channels: int) -> block_stages.Norm:
        return block_stages.Norm(
            torch.ones(channels, device=device), torch.ones(channels, device=device), None, None, 1e-5
        )

    w1 = random(block.hidden, block.cin, 1, 1) / block.cin**0.5 if block.expands else None
    wd = random(block.hidden, 1, 3, 3) / 3
    w3 = random(block.cout, block.hidden, 1, 1) / block.hidden**0.5
    x = channels_last(random(batch, block.cin, side, side))
    out, y1, y2, y3, bn1, bn2, bn3 = block_stages.block_forward(
        stages,
        x,
        w1,
        norm(block.hidden),
        wd,
        norm(block.hidden),
        w3,
        norm(block.cout),
        block.stride,
        block.residual,
        "",
    )
    block_stages.block_backward(
        stages, out, x, y1, y2, y3, bn1, bn2, bn3, w1, wd, w3, block.stride, block.residual, False, "", [True] * 7
    )


# --- the network ---------------------------------------------------------------------------------------------


def totals(blocks: list[Block], measured: dict[Block, list[Stage]]) -> dict[str, dict[str, float]]:
    """MB per image over all blocks, of every stage and of the forward and the backward pass: the three kinds."""
    names = (*plan.FORWARD, *plan.BACKWARD, "forward", "backward")
    total = {name: {"planned": 0.0, "activations": 0.0, "small": 0.0} for name in names}
    for block in blocks:
        for stage in measured[block]:
            part = "forward" if stage.stage in plan.FORWARD else "backward"
            for name in (stage.stage, part):
                row = total[name]
                row["planned"] += stage.planned / 1e6
                row["activations"] += stage.activations / 1e6
                row["small"] += stage.small / 1e6
    return total


def table(blocks: list[Block], measured: dict[Block, list[Stage]]) -> str:
    """The report."""
    lines = [f"{'block':22}{'stage':20}{'plan':>8}{'moved':>8}{'small':>8}{'ratio':>7}{'blocks':>8}  KB per image"]
    for block, stages in measured.items():
        times = blocks.count(block)
        label = f"{block}" + (f" (x{times})" if times > 1 else "")
        for stage in stages:
            ratio = f"{stage.activations / stage.planned:7.2f}" if stage.planned else " " * 7
            lines.append(
                f"{label:22}{stage.stage:20}{stage.planned / 1e3:8.0f}{stage.moved / 1e3:8.0f}{stage.small / 1e3:8.1f}"
                f"{ratio}{stage.blocks:8.2f}  {', '.join(stage.kernels)}"
            )
            lines += [f"{'':22}^ {fault}" for fault in stage.faults()]
    lines += ["", f"{'MB per image':22}{'plan':>8}{'moved':>8}  of it weights, statistics, partial sums"]
    for name, row in totals(blocks, measured).items():
        lines.append(f"{name:22}{row['planned']:8.2f}{row['activations'] + row['small']:8.2f}{row['small']:8.2f}")
    for name, (forward, backward) in (
        ("gate on activations", plan.GATE),
        ("torch.compile (model)", plan.COMPILED),
        ("eager (model)", plan.EAGER),
    ):
        lines.append(f"{name:22} forward {forward:6.1f}  backward {backward:6.1f} MB per image")
    return "\n".join(lines)


def faults(blocks: list[Block], measured: dict[Block, list[Stage]]) -> list[str]:
    """Everything that keeps the kernels from the plan."""
    out = [f"{block}: {fault}" for block, stages in measured.items() for stage in stages for fault in stage.faults()]
    total = totals(blocks, measured)
    for name, limit in zip(("forward", "backward"), plan.GATE, strict=True):
        row = total[name]
        if row["activations"] > limit:
            out.append(f"{name}: {row['activations']:.1f} MB of activations per image, more than {limit}")
        if row["small"] > TOLERANCE * row["activations"]:
            out.append(f"{name}: {row['small']:.1f} MB of weights, statistics and partial sums per image")
    return out


def report(blocks: list[Block], measured: dict[Block, list[Stage]]) -> dict[str, Any]:
    """The numbers of the table, bytes and megabytes per image."""

    def plain(stage: Stage) -> dict[str, Any]:
        return {name: round(v, 2) if isinstance(v, float) else v for name, v in asdict(stage).items()}

    return {
        "batch": BATCH,
        "resolution": RESOLUTION,
        "megabytes_per_image": {
            name: {kind: round(mb, 3) for kind, mb in row.items()} for name, row in totals(blocks, measured).items()
        },
        "bytes_per_image": {str(block): [plain(s) for s in stages] for block, stages in measured.items()},
        "faults": faults(blocks, measured),
    }


def main() -> int:
    """Print the table, write it as JSON; 1 if the plan is not met."""
    parser = argparse.ArgumentParser(prog="python -m bench.traffic", description=__doc__.split("\n")[0])
    results = Path(__file__).parent / "results" / "traffic.json"
    parser.add_argument("--json", type=Path, default=results, help="where the numbers go (%(default)s)")
    parser.add_argument("--side", type=int, default=RUN_SIDE, help="side of the pictures that kernels run on")
    options = parser.parse_args()
    blocks = plan.network(1.0, RESOLUTION)
    measured = {block: measure(block, run_side=options.side) for block in dict.fromkeys(blocks)}
    print(table(blocks, measured))
    found = faults(blocks, measured)
    print("\n" + "\n".join(found or ["the plan is met"]))
    options.json.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(options.json, (json.dumps(report(blocks, measured), indent=1) + "\n").encode())
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
