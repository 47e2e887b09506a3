"""What each launch of a stage call needs and costs on an architecture, from the compiler's output; nothing is run."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from hashlib import sha256
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import triton
from torch import Tensor

from bench import sass, ttir
from bench.occupancy import DRAM_SHARE, ISSUE_SHARE, TENSOR_SHARE, Architecture, warps_per_sm
from bench.workload import Call
from mbv2.kernels.triton import tuning

# The driver that compiles without a GPU belongs to the tests' emulator.
_TESTS = str(Path(__file__).resolve().parents[1] / "tests")
if _TESTS not in sys.path:
    sys.path.append(_TESTS)

from ptxcpu.triton_driver import Compiled, compiled_only  # noqa: E402

# L2 delivers some multiple of DRAM's bytes; with it, tiles that read a tensor several times are told apart.
_L2_OVER_DRAM = 4.0
# Seconds from a load to its use, under load.
_ROUND_TRIP = 0.8e-6
# Of two bounds alike, the sum of their powers makes this root of two: how little the smaller ones are hidden.
_SHARPNESS = 3
# Fewer warps than this on an SM do not cover the latency of DRAM.
ENOUGH_WARPS = 8


@dataclass(frozen=True)
class Machine:
    """A kernel's machine code in numbers: instructions outside loops, and (depth, own instructions) of each loop."""

    registers: int
    stack_bytes: int
    straight: int
    loops: tuple[tuple[int, int], ...]
    opcodes: dict[str, int]

    def spills(self) -> int:
        """Instructions that touch local memory."""
        return sum(self.opcodes.get(opcode, 0) for opcode in sass.SPILLING)

    def tensor_core(self) -> int:
        """Instructions for the tensor cores."""
        return sum(self.opcodes.get(opcode, 0) for opcode in sass.TENSOR_CORE)


@dataclass(frozen=True)
class Launch:
    """One launch on one architecture."""

    arch: Architecture
    compiled: Compiled
    machine: Machine

    @property
    def kernel(self) -> str:
        return self.compiled.kernel

    @property
    def programs(self) -> int:
        return prod(self.compiled.grid)

    @property
    def tensor_columns(self) -> int:
        """Tensor memory of a block (sm_100)."""
        return getattr(self.compiled.metadata, "tmem_size", 0) or 0

    @property
    def warps_per_sm(self) -> int:
        c = self.compiled
        return warps_per_sm(self.arch, c.num_warps, self.machine.registers, c.shared_bytes, self.tensor_columns)

    @property
    def tile(self) -> dict[str, int]:
        """The tile it was launched with."""
        c = self.compiled
        blocks = {name: value for name, value in c.constants.items() if name.startswith("BLOCK_")}
        return {**blocks, "num_warps": c.num_warps, "num_stages": c.num_stages}

    def uses(self, meta: dict[str, int]) -> bool:
        """Whether it was launched with this tile; what a launcher makes of other parameters is its own business."""
        mine = {**self.compiled.metadata._asdict(), **self.compiled.constants}
        return all(
            mine.get(name) == value
            for name, value in meta.items()
            if name.startswith("BLOCK_") or name in ("num_warps", "num_stages", "maxnreg")
        )

    def on(self, arch: Architecture) -> "Launch":
        """The same machine code, judged by another architecture's limits and rates."""
        return replace(self, arch=arch)

    @cached_property
    def program(self) -> ttir.Program:
        """The mean of a launch's first, middle and last programs."""
        grid = self.compiled.grid
        ids = list(product(*(sorted({0, size // 2, size - 1}) for size in grid)))
        programs = [ttir.follow(self.compiled.ttir, self.compiled.arguments, grid, place) for place in ids]
        mean = ttir.Program(unknown=programs[0].unknown)
        for part in programs:
            mean.loaded_bytes += part.loaded_bytes / len(ids)
            mean.stored_bytes += part.stored_bytes / len(ids)
            for kind, fma in part.dots.items():
                mean.dots[kind] = mean.dots.get(kind, 0) + fma / len(ids)
        for same in zip(*(part.loops for part in programs), strict=True):
            mean.loops.append(same[0]._replace(runs=sum(loop.runs for loop in same) / len(ids)))
        return mean

    @cached_property
    def instructions(self) -> float:
        """Instructions of all threads together, idle lanes of padded tiles included."""
        total, scale = float(self.machine.straight), [1.0]
        runs = matched(self.machine.loops, self.program.loops)
        for (depth, own), count in zip(self.machine.loops, runs, strict=True):
            scale[depth + 1 :] = [scale[depth] * count]
            total += own * scale[depth + 1]
        return total * self.programs * self.compiled.num_warps * 32

    @property
    def elements(self) -> int:
        """Elements of the largest tensor: what instructions are counted per."""
        return max((t.numel() for t in self.tensors()), default=1)

    @property
    def bytes(self) -> int:
        """What DRAM has to move at least: every tensor once."""
        return sum(t.numel() * t.element_size() for t in self.tensors())

    @property
    def instructions_per_element(self) -> float:
        return self.instructions / self.elements

    @property
    def instructions_per_byte(self) -> float:
        return self.instructions / self.bytes

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, each once."""
        found = {}
        for value in self.compiled.arguments.values():
            if isinstance(value, Tensor):
                found[value.untyped_storage()._cdata, value.storage_offset(), value.shape] = value
        return list(found.values())

    def seconds(self) -> float:
        """Predicted: whatever is slowest of issue, DRAM, L2, tensor cores and latency, the others hidden in part."""
        arch, program, resident = self.arch, self.program, self.warps_per_sm
        if not resident:
            return float("inf")
        # Where an SM starts fewer FP32 operations than instructions, half of these are taken to be such operations.
        issue = self.instructions / (arch.issue_per_second * ISSUE_SHARE * min(1.0, 0.5 + arch.fp32_lanes / 256))
        dram = self.bytes / (arch.bandwidth * DRAM_SHARE)
        asked = (program.loaded_bytes + program.stored_bytes) * self.programs
        l2 = asked / (arch.bandwidth * DRAM_SHARE * _L2_OVER_DRAM)
        fma = sum(n for kind, n in program.dots.items() if kind in ("f16", "bf16")) * self.programs
        rate = arch.mma_sync_share if self.machine.opcodes.get("HMMA") else 1.0
        tensor = fma / (arch.tensor_fma * TENSOR_SHARE * rate)
        warps = self.programs * self.compiled.num_warps / arch.processors
        busy = min(1.0, warps / ENOUGH_WARPS)
        throughput = (t / busy for t in (issue, dram, l2, tensor))
        latency = self._round_trips() * _ROUND_TRIP * max(1.0, warps / resident)
        return sum(t**_SHARPNESS for t in (*throughput, latency)) ** (1 / _SHARPNESS)

    def _round_trips(self) -> float:
        """How often a program waits for memory: once a pass of a loop, less where loads are issued stages ahead."""
        passes, entries = 1.0, [1.0]
        for loop in self.program.loops:
            entries[loop.depth + 1 :] = [entries[loop.depth] * loop.runs]
            passes += entries[loop.depth + 1]
        ahead = self.compiled.num_stages if self.machine.opcodes.get("LDGSTS") else 1
        return passes / ahead

    def faults(self) -> list[str]:
        """Why this kernel must not be used there; empty when it may."""
        c, out = self.compiled, []
        if self.machine.spills() or self.machine.stack_bytes:
            out.append(f"{self.machine.spills()} accesses to local memory ({self.machine.stack_bytes} bytes)")
        if c.shared_bytes > self.arch.shared_per_block:
            out.append(f"{c.shared_bytes} bytes of shared memory, {self.arch.shared_per_block} are there")
        if self.tensor_columns > 512:
            out.append(f"{self.tensor_columns} columns of tensor memory, 512 are there")
        if not out and self.warps_per_sm < ENOUGH_WARPS:
            out.append(f"{self.warps_per_sm} warps on an SM, {ENOUGH_WARPS} are wanted")
        if self.machine.opcodes.get("BPT") and len(self.machine.loops) == 0 and not self.machine.opcodes.get("STG"):
            out.append("nothing but a trap")
        if {"f16", "bf16"} & set(self.program.dots) and not self.machine.tensor_core():
            out.append("tl.dot without tensor cores")
        return out


def run(call: Call, arch: Architecture) -> list[Launch]:
    """Compile what `call` launches on `arch`, with the tiles the tables (or `tuning.forced`) give."""
    from mbv2.kernels.triton import stages

    with compiled_only(arch.number) as log:
        getattr(stages, call.stage)(*call.args)
    return [Launch(arch, compiled, machine_of(compiled.cubin)) for compiled in log]


def lookups(call: Call, arch: Architecture) -> list[tuning.Lookup]:
    """The tiles `call` asks for on `arch`."""
    from mbv2.kernels.triton import stages

    with compiled_only(arch.number), tuning.recorded() as record, _asked_before_compiling(lambda **_: True):
        getattr(stages, call.stage)(*call.args)
    return record


@contextmanager
def one_of_a_kind(seen: set[Any]) -> Iterator[None]:
    """Inside, of kernels that differ in little but sizes only the first is compiled; launches of others are left out.

    Two kernels are of a kind if their code, types, tiles and options are the same, and every size that is a constant
    in them has the same divisors up to 16 and lies alike to each side of the tile (below it; a multiple of it).
    """

    def known(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        names = fn.jit_function.arg_names
        constants = {names[path[0]]: value for path, value in compile["constants"].items()}
        kind = (
            fn.name,
            tuple(compile["signature"].items()),
            str(compile["configs"]),
            tuple((name, _alike(name, value, constants)) for name, value in constants.items()),
            key.rpartition("{")[2],  # num_warps, num_stages, maxnreg
        )
        if kind in seen:
            return True
        seen.add(kind)
        return False

    with _asked_before_compiling(known):
        yield


def _alike(name: str, value: Any, constants: dict[str, Any]) -> Any:
    if type(value) is not int or value < 8 or name.startswith("BLOCK_"):
        return str(value)
    sides = [side for other, side in constants.items() if other.startswith("BLOCK_")]
    return min(value & -value, 16), *((value <= side, value % side == 0) for side in sides)


@contextmanager
def _asked_before_compiling(known: Callable[..., bool]) -> Iterator[None]:
    before = triton.knobs.runtime.jit_cache_hook
    triton.knobs.runtime.jit_cache_hook = known
    try:
        yield
    finally:
        triton.knobs.runtime.jit_cache_hook = before


def matched(machine: tuple[tuple[int, int], ...], source: list[ttir.Loop]) -> list[float]:
    """Runs of each loop of the machine code, given those of the source.

    Loops whose number of runs is a constant may have been unrolled, the innermost first; the others are all there, in
    the source's order. A loop the compiler made itself counts as run once.
    """
    left = list(source)
    while len(left) > len(machine):
        del left[max(range(len(left)), key=lambda i: (left[i].constant, left[i].depth, -left[i].runs))]
    runs = [loop.runs for loop in left]
    return runs + [1.0] * (len(machine) - len(runs))


@cache
def machine_of(cubin: bytes) -> Machine:
    """Read a cubin, once for good: the result is kept in Triton's cache folder."""
    name = sha256(cubin + Path(sass.__file__).read_bytes()).hexdigest()
    kept = Path(triton.knobs.cache.dir) / "mbv2_sass" / f"{name}.json"
    if kept.is_file():
        fields = json.loads(kept.read_text())
        return Machine(**{**fields, "loops": tuple((d, n) for d, n in fields["loops"])})
    code = sass.read(cubin)
    straight, own = code.own_instructions()
    loops = tuple((loop.depth, count) for loop, count in zip(code.loops, own, strict=True))
    opcodes = dict(Counter(i.opcode for i in code.instructions).most_common())
    machine = Machine(code.registers, code.stack_bytes, straight, loops, opcodes)
    kept.parent.mkdir(parents=True, exist_ok=True)
    partial = kept.with_suffix(f".{id(machine)}")
    partial.write_text(json.dumps(asdict(machine)))
    partial.replace(kept)
    return machine
