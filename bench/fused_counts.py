"""Instructions of the fused block and of pairs in CUDA C++: what machine code holds, by part, times how often it runs.

Machine code is compiled with source lines (nvcc -lineinfo), so that every loop and every instruction outside of loops
is known to belong to one function of csrc/cuda/fused_*.cuh. How often each of them runs follows from the plan. Of code
that lies behind a condition of the plan's own (a shortcut, no expansion, splits) what the plan takes counts; both sides
of any other branch do. `python -m bench.resources_cuda --write` counts and writes results/cuda_fused.json.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from bench import sass
from mbv2.kernels.cuda import fused

SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
# Functions that instructions are booked under, together with what they call; anything else is "run".
PARTS = (
    "fill_tables", "clear_a1", "copy_x", "copy_a1", "copy_expand_weights", "copy_depthwise_weights",
    "copy_project_weights", "expand", "depthwise", "project", "stage_alone", "stage_with_shortcut", "store_partial",
    "store_hidden", "store",
)  # fmt: skip
# Loops of which a function has several that differ, in the order of the machine code; of all others a pass takes one.
SEVERAL = {
    "fill_tables": ("units", "places"),
    "copy_depthwise_weights": ("taps", "biases", "taps", "biases"),
    "depthwise": ("s1", "s2"),
}
_FUNCTION = re.compile(r"__device__ __forceinline__ (?:[\w:<>]+[&*]? )+[&*]?(?:Block<Tr>::)?(\w+)\(.*[^;]$")
_LINE = re.compile(r'^\s*//## File "[^"]*?([^"/]+)", line (\d+)')
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s")

# Instructions of a thread by part: "once/store" outside of loops, "chunk/project" in the loop over chunks, and in loops
# of their own "expand", "expand/inner", "depthwise s1".
# A product's are "once", "chunk" in the loop over channels, "store" and "store/inner" in those that write results.
Counts = dict[str, int]
_PRODUCT_VECTORS = 4  # 16 bytes each, kProductChunk in csrc/cuda/product_params.h


class Tile(NamedTuple):
    """A line of MBV2_FUSED_TILES in csrc/cuda/fused_params.h."""

    chunk_bytes: int
    walk: int
    warps_m: int
    warps_n: int
    tiles_m: int
    tiles_n: int
    blocks: int


class ProductTile(NamedTuple):
    """A line of MBV2_PRODUCT_TILES in csrc/cuda/product_params.h."""

    warps_m: int
    warps_n: int
    tiles_m: int
    tiles_n: int
    blocks: int


def counts(listing: str, wanted: Callable[[sass.Instruction], bool] = lambda this: True) -> Counts:
    """Instructions by part, from what nvdisasm -gi prints of one kernel.

    Args:
        listing: of the kernel.
        wanted: instructions that count.
    """
    instructions = sass.parse(listing)
    parts = _parts_of_instructions(listing)
    loops = sass.find_loops(instructions, every=True)
    main = max(loops, key=lambda loop: len(loop.body))
    names = _names(loops, main, parts)
    found: Counter[str] = Counter()
    taken: set[str] = set()
    for loop in (None, *loops):
        inner = [other for other in loops if loop is None or other.body < loop.body]
        body = range(len(instructions)) if loop is None else sorted(loop.body)
        own = [i for i in body if not any(i in other.body for other in inner) and wanted(instructions[i])]
        if loop is None or loop is main:
            found.update(f"{'once' if loop is None else 'chunk'}/{parts[index]}" for index in own)
        elif names[loop] not in taken:
            # What is compiled at two places runs at one of them in a pass.
            taken.add(names[loop])
            found[names[loop]] += len(own)
    return dict(found)


def executed(shape: fused.Shape, plan: fused.Plan, known: dict[str, Counts]) -> float:
    """Instructions of all threads of a launch, that of the partial sums included.

    Args:
        shape: of the block, pictures included.
        plan: its plan.
        known: counts by tile.
    """
    times = runs(shape, plan)
    warps = sum(count * times(part) for part, count in known[str(plan.tile)].items())
    total = 32.0 * warps * plan.blocks / plan.splits
    if plan.partial_bytes:
        # A thread makes four values; its loop over the splits is unrolled, and counted as one pass.
        values = shape.images * shape.outputs * _side(shape, shape.height) * _side(shape, shape.width)
        total += values / 4 * sum(known["sum"].values())
    return total


def product_counts(listing: str, wanted: Callable[[sass.Instruction], bool] = lambda this: True) -> Counts:
    """As `counts`, of a pair's second kernel."""
    instructions = sass.parse(listing)
    loops = sass.find_loops(instructions, every=True)
    [chunk] = [loop for loop in loops if any(instructions[i].opcode in sass.TENSOR_CORE for i in loop.body)]
    [outer] = [loop for loop in loops if loop is not chunk and not loop.depth]
    # Where a row has one pass only, it is no loop.
    inner = next((loop.body for loop in loops if loop.depth), frozenset())
    assert len(loops) == 2 + bool(inner) and inner < outer.body, f"{len(loops)} loops in a product"
    bodies = {"chunk": chunk.body, "store": outer.body - inner, "store/inner": inner}
    bodies["once"] = frozenset(range(len(instructions))) - chunk.body - outer.body
    return {part: sum(wanted(instructions[i]) for i in body) for part, body in bodies.items()}


def product_executed(shape: fused.Shape, plan: fused.Product, known: dict[str, Counts]) -> float:
    """As `executed`, of a pair's second launch; rows and columns past the last cost what the others cost."""
    tile = product_tiles()[plan.tile]
    warps = plan.threads // 32
    item = 4 if shape.element == 2 else 2
    rows = 16 * tile.warps_m * tile.tiles_m * _PRODUCT_VECTORS / plan.threads
    vectors = min(shape.outputs, 8 * tile.warps_n * tile.tiles_n) * item / 16
    passes = {
        "once": 1,
        "chunk": -(-shape.hidden * item // (16 * _PRODUCT_VECTORS)),
        "store": rows,
        "store/inner": rows * -(-vectors // _PRODUCT_VECTORS),
    }
    mine = known[f"product{plan.tile}"]
    return 32.0 * warps * plan.blocks * sum(mine[part] * count for part, count in passes.items())


def pair_executed(shape: fused.Shape, plan: fused.Pair, known: dict[str, Counts]) -> tuple[float, float]:
    """Instructions of all threads of both launches."""
    return executed(shape, plan.front, known), product_executed(shape, plan.product, known)


def runs(shape: fused.Shape, plan: fused.Plan) -> Callable[[str], float]:
    """How often warps run each part for one tile of outputs, all of its splits together, on the average."""
    tile = tiles()[plan.tile]
    warps = plan.threads // 32
    item = 4 if shape.element == 2 else 2
    vector, chunk = 16 // item, tile.chunk_bytes // item
    walks = -(-plan.height // tile.walk)
    groups = -(-plan.images * walks * plan.width // 16)
    positions = _positions(shape, plan)
    padded = -(-positions // 32) * 32
    x_vectors = -(-shape.inputs * item // 32) * 2
    a1_rows = (walks * tile.walk - 1) * shape.stride + 3
    a1_columns = (plan.width - 1) * shape.stride + 3
    chunks = -(-shape.hidden // chunk)
    expands = shape.expands

    def dealt(items: float) -> float:
        """Passes of all warps over items that the block's threads share, one each."""
        return -(-items // 32)

    columns = 2 * -(-shape.outputs // 16)
    known = {
        "fill_tables units": dealt(groups * 16) * plan.splits,
        "fill_tables places": dealt(padded) * plan.splits,
        "clear_a1": dealt(plan.images * a1_rows * a1_columns * (tile.chunk_bytes // 16 + 1)) * plan.splits,
        "copy_x": dealt(padded * x_vectors) * plan.splits * expands,
        "copy_a1": dealt(positions * tile.chunk_bytes // 16) * chunks * (not expands),
        "copy_expand_weights": dealt(chunk * x_vectors) * chunks * expands,
        "copy_depthwise_weights taps": dealt(9 * tile.chunk_bytes // 16) * chunks,
        "copy_depthwise_weights biases": dealt(chunk // 2) * chunks,
        "copy_project_weights": dealt(-(-shape.outputs // 16) * 16 * tile.chunk_bytes // 16) * chunks,
        "expand": padded // 32 * -(-shape.hidden // (4 * vector)) * expands,
        f"depthwise s{shape.stride}": groups * -(-shape.hidden // (2 * vector)),
        # Compiled at two places, of which a pass takes one.
        "chunk/copy_expand_weights": warps * chunks / 2 * expands,
        "chunk/copy_depthwise_weights": warps * chunks / 2,
        "chunk/copy_project_weights": warps * chunks / 2,
        "chunk/copy_a1": warps * chunks * (not expands),
        "chunk/expand": warps * chunks * expands,
        "once/copy_x": warps * plan.splits * expands,
        "once/stage_alone": warps * (not shape.residual and plan.splits == 1),
        "once/stage_with_shortcut": warps * (shape.residual and plan.splits == 1),
        "store_hidden": dealt(groups * tile.chunk_bytes) * chunks,
        "chunk/store_hidden": warps * chunks,
        "chunk/project": chunks
        * warps
        * (columns / (tile.warps_n * max(tile.tiles_n, 1)))
        * (-(-shape.hidden // (2 * vector)) / (chunks * chunk / (2 * vector))),
        "store": dealt(groups * tile.walk * 16 * (shape.outputs // vector)) * (plan.splits == 1),
        "once/store": warps * (plan.splits == 1),
        "once/store_partial": warps * plan.splits * (plan.splits > 1),
        "store_partial": 0,
    }
    known["expand/inner"] = known["expand"] * x_vectors // 2
    # In float32 an inner loop makes the two halves of an item.
    known[f"depthwise s{shape.stride}/inner"] = 2 * known[f"depthwise s{shape.stride}"]

    def times(part: str) -> float:
        if part in known:
            return known[part]
        if part.startswith("depthwise s"):
            return 0
        where = part.partition("/")[0]
        assert where in ("once", "chunk"), f"no formula says how often {part} runs"
        return warps * (plan.splits if where == "once" else chunks + plan.splits)

    return times


@cache
def product_tiles() -> tuple[ProductTile, ...]:
    """The compiled tile shapes of products."""
    text = (SOURCES / "product_params.h").read_text()
    return tuple(ProductTile(*map(int, found.split(","))) for found in re.findall(r"\bX\(\d+,([\d, ]+)\)", text))


@cache
def tiles() -> tuple[Tile, ...]:
    """The compiled tile shapes."""
    text = (SOURCES / "fused_params.h").read_text()
    return tuple(Tile(*map(int, found.split(","))) for found in re.findall(r"\bX\(\d+,([\d, ]+)\)", text))


def _positions(shape: fused.Shape, plan: fused.Plan) -> int:
    """Input positions inside the picture that a tile of outputs needs, rounded up from the average."""

    def along(extent: int, tile: int) -> float:
        outs = _side(shape, extent)
        starts = range(0, outs, tile)
        total = 0
        for start in starts:
            first, last = start * shape.stride - 1, (min(start + tile, outs) - 1) * shape.stride + 1
            total += min(last, extent - 1) - max(first, 0) + 1
        return total / len(starts)

    return -int(-plan.images * along(shape.height, plan.height) * along(shape.width, plan.width) // 1)


def _side(shape: fused.Shape, extent: int) -> int:
    return (extent - 1) // shape.stride + 1


def _names(loops: Sequence[sass.Loop], main: sass.Loop, parts: list[str]) -> dict[sass.Loop, str]:
    named: dict[sass.Loop, str] = {}
    by_part: dict[str, list[sass.Loop]] = {}
    for loop in loops:
        outer = [other for other in loops if loop.body < other.body and other is not main]
        if loop is main:
            continue
        part = Counter(parts[index] for index in loop.body).most_common(1)[0][0]
        # It has no loop of its own: on sm_120 the one behind it in `store` carries its lines.
        part = "store" if part == "stage_alone" else part
        if outer:
            named[loop] = named[outer[-1]] + "/inner"
        else:
            by_part.setdefault(part, []).append(loop)
            several = SEVERAL.get(part, ("",))
            named[loop] = f"{part} {several[(len(by_part[part]) - 1) % len(several)]}".strip()
    # The compiler may put either stride first; stride 2 takes the more instructions.
    first, second = sorted(by_part["depthwise"], key=lambda loop: len(loop.body))
    inner = {loop: outer for loop in loops for outer in (first, second) if loop.body < outer.body}
    named |= {first: "depthwise s1", second: "depthwise s2"}
    named |= {loop: named[outer] + "/inner" for loop, outer in inner.items()}
    return named


def _parts_of_instructions(listing: str) -> list[str]:
    """The part of every instruction, in the order of the listing."""
    out: list[str] = []
    chain: list[tuple[str, int]] = []
    fresh = True
    for line in listing.splitlines():
        if (found := _LINE.match(line)) is not None:
            chain = [] if fresh else chain
            fresh = False
            chain.append((found[1], int(found[2])))
        elif _INSTRUCTION.match(line):
            fresh = True
            functions = [_functions(file).get(number, "") for file, number in chain]
            out.append(next((name for name in functions if name in PARTS), "run"))
    return out


@cache
def _functions(file: str) -> dict[int, str]:
    """The device function that each line of a source file lies in."""
    path = SOURCES / file
    name, found = "", {}
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        if (start := _FUNCTION.search(line)) is not None:
            name = start[1]
        found[number] = name
    return found
