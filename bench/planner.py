"""Choosing tiles without a GPU: of each kernel's candidates the one predicted fastest, written as short tables.

For every architecture a few shapes of the full-width network are compiled with every candidate. Candidates that
spill, do not fit or leave an SM less than eight warps are out; of the others the predicted time counts
(`Launch.seconds`). A decision tree of few leaves over the sizes the launcher names then becomes the table's entries.
"""

import importlib
import json
import pkgutil
from collections.abc import Iterable
from dataclasses import dataclass
from math import dist, log2
from pathlib import Path
from typing import Any

import torch
from triton.compiler.errors import CompilationError
from triton.runtime.errors import TritonError

from bench import launches, workload
from bench.occupancy import ARCHITECTURES, Architecture
from bench.plan import MOST_PRODUCT, SECTOR
from bench.workload import INFERENCE, TRAINING, Call
from mbv2.kernels import triton as package
from mbv2.kernels.triton import tuning

TILES = Path(package.__file__).parent / "tiles"
ENTRIES = 6
_SHAPES = 6
# A further entry has to save this share of what one tile for all its sizes costs.
_WORTH = 0.03
_FAULTY, IMPOSSIBLE = 1e2, 1e6
_OF_BATCH = ("rows", "vectors", "images", "parts")
# Kernels whose tile of rows may have any height.
_ANY_ROWS = ("expand", "project", "pointwise_folded", "project_backward_input")
# Kernels that have a way in several launches beside their own.
_SPLITTING = ("project_backward", "expand_backward")
# Sizes that one tile has to cover, by the tile's parameter that covers them.
_COVERED = {"expand_backward": {"cin": "BLOCK_C"}}
# Tensor-core code of these is so much alike that one is compiled for all, and all other code is alike everywhere; the
# gate looks at what was chosen on every architecture afterwards.
_COMPILED_AS = {86: 80, 89: 80, 120: 80}

Meta = dict[str, int]


@dataclass(frozen=True)
class Point:
    """One shape of one kernel, and what each candidate costs there: its time over the best one's, times a weight."""

    sizes: dict[str, int]
    costs: tuple[float, ...]


def candidates() -> dict[str, tuple[Meta, ...]]:
    """Every tuned kernel and its candidates."""
    found: dict[str, tuple[Meta, ...]] = {}
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "support":
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            found.update(getattr(loaded, "CANDIDATES", {}))
    return {name: (*metas, {"SPLIT": 1}) if name in _SPLITTING else metas for name, metas in found.items()}


def plan(kernel: str, arch: Architecture, itemsize: int) -> list[dict[str, Any]]:
    """The entries of `kernel`'s table for one architecture and one size in bytes of what it works on."""
    metas = candidates()[kernel]
    if arch.number == 100 and kernel in _ANY_ROWS:
        metas = with_low_tiles(metas)
    times = [(sizes, predicted(kernel, sizes, call, metas, arch)) for sizes, call in shapes(kernel, arch, itemsize)]
    return [{"bytes": itemsize, **within(kernel, entry)} for entry in entries_of(points_of(times), metas)]


def points_of(times: list[tuple[dict[str, int], list[float]]]) -> list[Point]:
    """Costs from the seconds of each candidate, by shape: shapes that take long weigh more, as the root of it."""
    bests = [min(seconds) for _, seconds in times]
    longest = max((best for best in bests if best < float("inf")), default=1.0)
    return [
        Point(sizes, tuple(min(s / best, IMPOSSIBLE) * (best / longest) ** 0.5 for s in seconds))
        for (sizes, seconds), best in zip(times, bests, strict=True)
        if best < float("inf")
    ]


def covers(kernel: str, sizes: dict[str, int], meta: Meta) -> bool:
    """Whether the tile computes all of these sizes."""
    return all(sizes[size] <= meta.get(block, sizes[size]) for size, block in _COVERED.get(kernel, {}).items())


def overfetches(kernel: str, sizes: dict[str, int], meta: Meta, itemsize: int) -> bool:
    """Whether blocks would ask L2 for more than `traffic` allows; what that costs is not in the predicted times."""
    if kernel == "project":
        read, written = sizes["hidden"], sizes["cout"]
        return -(-written // meta["BLOCK_N"]) * read + written > MOST_PRODUCT * (read + written)
    # Tiles that cut rows of channels within a sector both fetch it.
    return kernel == "bn_sums" and meta["BLOCK_C"] < sizes["channels"] and sizes["channels"] * itemsize % SECTOR != 0


def within(kernel: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The entry with bounds on the sizes its tile has to cover."""
    tile = entry["tile"]
    limits = {size: tile[block] for size, block in _COVERED.get(kernel, {}).items() if block in tile}
    return {**entry, **{size: min(limit, entry.get(size, limit)) for size, limit in limits.items()}}


def shapes(kernel: str, arch: Architecture, itemsize: int) -> list[tuple[dict[str, int], Call]]:
    """A few calls that launch `kernel`, spread over its sizes, each with the sizes it names."""
    dtype = torch.float16 if itemsize == 2 else torch.float32
    found: dict[tuple[tuple[str, int], ...], Call] = {}
    for phases, batches in (((TRAINING,), (128, 16)), ((INFERENCE,), (128, 1))):
        for batch in batches:
            of_batch: dict[tuple[tuple[str, int], ...], Call] = {}
            for call in workload.calls(1.0, 224, batch, dtype, phases):
                for lookup in launches.lookups(call, arch):
                    if lookup.kernel == kernel and lookup.dtype.itemsize == itemsize:
                        of_batch.setdefault(tuple(lookup.sizes.items()), call)
            keep = _spread(list(of_batch), _SHAPES)
            for sizes in keep:
                found.setdefault(sizes, of_batch[sizes])
    return [(dict(sizes), call) for sizes, call in found.items()]


def predicted(kernel: str, sizes: dict[str, int], call: Call, metas: Iterable[Meta], arch: Architecture) -> list[float]:
    """Predicted time of `call` with each candidate; more where it breaks a rule, infinite where it cannot be used."""
    seconds = []
    for meta in metas:
        if not covers(kernel, sizes, meta):
            seconds.append(float("inf"))
            continue
        try:
            with tuning.forced(kernel, **meta):
                found = _compiled(call, arch)
        except (CompilationError, TritonError, RuntimeError, ValueError, AssertionError):
            seconds.append(float("inf"))
            continue
        faulty = any(launch.faults() for launch in found if launch.uses(meta))
        faulty = faulty or overfetches(kernel, sizes, meta, call.args[0].element_size())
        total = sum(launch.seconds() for launch in found)
        seconds.append(total * _FAULTY if faulty else total)
    return seconds


def _compiled(call: Call, arch: Architecture) -> list[launches.Launch]:
    found = launches.run(call, ARCHITECTURES[80])
    own = arch.number not in (80, *_COMPILED_AS)
    if own and any(launch.machine.tensor_core() for launch in found):
        found = launches.run(call, arch)
    return [launch.on(arch) for launch in found]


def with_low_tiles(metas: tuple[Meta, ...]) -> tuple[Meta, ...]:
    """The candidates, and their like with tiles of 32 rows, for sm_100.

    From 64 rows on, Triton uses the tensor memory there, in whose layout a thread holds a whole row: sums over the rows
    of a tile, as statistics are, then take several times the instructions, and registers run out.
    """
    high = [meta for meta in metas if meta.get("BLOCK_M", 0) >= 64]
    low = [{**meta, "BLOCK_M": 32, "num_warps": max(2, meta["num_warps"] // 2)} for meta in high]
    return tuple({tuple(meta.items()): meta for meta in [*metas, *low]}.values())


def entries_of(points: list[Point], metas: tuple[Meta, ...]) -> list[dict[str, Any]]:
    """At most ENTRIES entries, first match wins, the last without a bound."""
    if not points:
        return []
    leaves: list[tuple[dict[str, int], list[Point]]] = [({}, points)]
    whole = _cost(points)
    while len(leaves) < ENTRIES:
        options = [
            (_cost(leaf) - _cost(low) - _cost(high), index, name, bound, low, high)
            for index, (_, leaf) in enumerate(leaves)
            for name, bound, low, high in _splits(leaf)
        ]
        best = max(options, key=lambda option: option[0], default=None)
        if best is None or best[0] < _WORTH * whole:
            break
        _, index, name, bound, low, high = best
        bounds = leaves[index][0]
        # The lower part comes first, so the upper one needs no bound from below.
        leaves[index : index + 1] = [({**bounds, name: bound}, low), (bounds, high)]
    return [{**bounds, "tile": dict(metas[_best(leaf)])} for bounds, leaf in leaves]


def write(kernel: str, lists: dict[str, list[dict[str, Any]]]) -> None:
    """Put the lists of architectures into the kernel's table; what it has for others stays."""
    path = TILES / f"{kernel}.json"
    table = json.loads(path.read_text())
    table.update(lists)
    order = sorted((arch for arch in table if arch != "default"), key=lambda arch: int(arch[3:]))
    path.write_text(formatted({arch: table[arch] for arch in ["default", *order]}))


def formatted(table: dict[str, list[dict[str, Any]]]) -> str:
    """JSON with one entry a line."""
    parts = []
    for arch, entries in table.items():
        rows = ",\n".join(f"    {json.dumps(entry)}" for entry in entries)
        parts.append(f'  "{arch}": [\n{rows}\n  ]')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _spread(sizes: list[tuple[tuple[str, int], ...]], count: int) -> list[tuple[tuple[str, int], ...]]:
    """`count` of them far from each other: the first, then each time the one farthest from all taken so far."""
    places = {one: [log2(size) for _, size in one] for one in sizes}
    taken = sizes[:1]
    while len(taken) < min(count, len(sizes)):
        taken.append(max(sizes, key=lambda one: min(dist(places[one], places[other]) for other in taken)))
    return taken


def _splits(points: list[Point]) -> Iterable[tuple[str, int, list[Point], list[Point]]]:
    # A batch's sizes go along with the layers' here, but not in general: of equal splits the layers' are taken.
    for name in sorted(points[0].sizes, key=lambda name: name in _OF_BATCH):
        for bound in sorted({p.sizes[name] for p in points})[:-1]:
            low = [p for p in points if p.sizes[name] <= bound]
            yield name, bound, low, [p for p in points if p.sizes[name] > bound]


def _cost(points: list[Point]) -> float:
    return min(sum(costs) for costs in zip(*(p.costs for p in points), strict=True))


def _best(points: list[Point]) -> int:
    sums = [sum(costs) for costs in zip(*(p.costs for p in points), strict=True)]
    return sums.index(min(sums))
