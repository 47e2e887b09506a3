"""What a cubin holds: its registers, and its machine code (SASS) taken apart into instructions and loops."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import triton.backends.nvidia

_TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?(\S+?)(?:\s+(.*?))?\s*;\s*$")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")

TENSOR_CORE = ("HMMA", "HGMMA", "UTCHMMA", "UTCMMA", "DMMA", "BMMA", "QMMA", "IMMA")
SPILLING = ("LDL", "STL")


@dataclass(frozen=True)
class Instruction:
    """One SASS instruction; `opcode` is without its modifiers."""

    opcode: str
    full_opcode: str
    conditional: bool
    target: int | None  # index of the instruction it may jump to


@dataclass(frozen=True)
class Loop:
    """A natural loop: indices of its instructions (inner loops' included), and how many loops it lies in."""

    body: frozenset[int]
    depth: int

    @property
    def first(self) -> int:
        return min(self.body)


@dataclass(frozen=True)
class Code:
    """A kernel's machine code.

    Attributes:
        instructions: in the order of memory, without the padding behind the last one.
        loops: outer before inner, and in the order of memory; loops that only wait for a barrier are left out.
        registers: per thread.
        stack_bytes: local memory per thread, of spills or arrays.
    """

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]
    registers: int
    stack_bytes: int

    def count(self, *opcodes: str) -> int:
        """How many instructions have one of these opcodes."""
        return sum(i.opcode in opcodes for i in self.instructions)

    def own_instructions(self) -> tuple[int, list[int]]:
        """Instructions outside all loops, and for each loop those that lie in it and in no inner one."""
        inner = [self._inner(loop) for loop in self.loops]
        in_loops = frozenset().union(*(loop.body for loop in self.loops)) if self.loops else frozenset()
        return len(self.instructions) - len(in_loops), [
            len(loop.body - nested) for loop, nested in zip(self.loops, inner, strict=True)
        ]

    def opcodes_of(self, loop: Loop) -> Counter[str]:
        """The mix of instructions of one loop."""
        return Counter(self.instructions[i].opcode for i in loop.body)

    def _inner(self, loop: Loop) -> frozenset[int]:
        return frozenset().union(*(other.body for other in self.loops if other.body < loop.body))


def read(cubin: bytes) -> Code:
    """Disassemble the one kernel of a cubin.

    Raises:
        subprocess.CalledProcessError: the bundled tools cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = _USAGE.search(tool("cuobjdump", "-res-usage", str(path)))
        text = tool("nvdisasm", "-c", "-ndf", str(path))
    assert usage is not None
    instructions = parse(text)
    registers, stack, local = (int(value) for value in usage.groups())
    return Code(instructions, find_loops(instructions), registers, stack + local)


def parse(text: str) -> tuple[Instruction, ...]:
    """The instructions of nvdisasm's listing, up to the endless loop that ends a function."""
    rows: list[tuple[str, bool, str | None]] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(rows)
        elif found := _INSTRUCTION.match(line):
            predicate, opcode, operands = found[1], found[2], found[3] or ""
            target = _TARGET.search(operands)
            uniform = re.match(r"!?UP\d", operands) if opcode.startswith("BRA") else None
            conditional = (predicate is not None and predicate != "PT") or uniform is not None
            rows.append((opcode, conditional, target[1] if target else None))
    known = [
        Instruction(opcode.split(".")[0], opcode, conditional, labels.get(target) if target else None)
        for opcode, conditional, target in rows
    ]
    return tuple(_without_padding(known))


def find_loops(instructions: tuple[Instruction, ...], every: bool = False) -> tuple[Loop, ...]:
    """Natural loops of the control-flow graph (a jump back to an instruction that dominates it).

    Args:
        instructions: of the kernel.
        every: those too that touch neither memory nor floating-point numbers.
    """
    successors = [_successors(instructions, i) for i in range(len(instructions))]
    starts = {0} | {j for i, after in enumerate(successors) for j in after if after != [i + 1]}
    blocks = sorted(starts)
    block_of = {}
    for number, start in enumerate(blocks):
        stop = blocks[number + 1] if number + 1 < len(blocks) else len(instructions)
        block_of.update(dict.fromkeys(range(start, stop), number))
    last = [i - 1 for i in blocks[1:]] + [len(instructions) - 1]
    edges = [[block_of[j] for j in successors[end]] for end in last]
    dominators = _dominators(edges)
    bodies: dict[int, set[int]] = {}
    for block, after in enumerate(edges):
        for header in after:
            if header in dominators[block]:
                bodies.setdefault(header, {header}).update(_reaching(edges, block, header))
    found = [frozenset(i for b in body for i in range(blocks[b], last[b] + 1)) for _, body in sorted(bodies.items())]
    found = [body for body in found if every or _computes(instructions, body)]
    loops = [Loop(body, sum(body < other for other in found)) for body in found]
    return tuple(sorted(loops, key=lambda loop: (loop.first, loop.depth)))


def tool(name: str, *arguments: str) -> str:
    """What one of the disassemblers that come with Triton prints."""
    done = subprocess.run([str(_TOOLS / name), *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def _without_padding(instructions: list[Instruction]) -> list[Instruction]:
    """Drop NOPs and the jump to itself at the end of each function; indices of targets are kept right."""
    keep = [
        i
        for i, this in enumerate(instructions)
        if this.opcode != "NOP" and not (this.target == i and not this.conditional)
    ]
    # A jump to something dropped goes to what follows it.
    new_index = {old: new for new, old in enumerate(keep)}
    upcoming = len(keep)
    following: dict[int, int] = {}
    for old in range(len(instructions), -1, -1):
        upcoming = new_index.get(old, upcoming)
        following[old] = upcoming
    return [
        Instruction(i.opcode, i.full_opcode, i.conditional, None if i.target is None else following[i.target])
        for i in (instructions[old] for old in keep)
    ]


def _successors(instructions: tuple[Instruction, ...], index: int) -> list[int]:
    this = instructions[index]
    after = []
    # A call to a label inside the function never returns here: ptxas uses it for far jumps.
    jumps = this.target is not None and this.opcode in ("BRA", "CALL", "JMP", "BRX")
    if jumps and this.target < len(instructions):
        after.append(this.target)
    ends = (jumps or this.opcode in ("EXIT", "RET")) and not this.conditional
    if not ends and index + 1 < len(instructions):
        after.append(index + 1)
    return after


def _dominators(edges: list[list[int]]) -> list[set[int]]:
    everything = set(range(len(edges)))
    before: list[list[int]] = [[] for _ in edges]
    for block, after in enumerate(edges):
        for other in after:
            before[other].append(block)
    dominators = [{0}] + [set(everything) for _ in edges[1:]]
    changed = True
    while changed:
        changed = False
        for block in range(1, len(edges)):
            meet = set.intersection(*(dominators[b] for b in before[block])) if before[block] else set()
            if (new := meet | {block}) != dominators[block]:
                dominators[block], changed = new, True
    return dominators


def _reaching(edges: list[list[int]], block: int, header: int) -> set[int]:
    """Blocks from which `block` is reached without passing `header`."""
    found, waiting = set(), [block]
    while waiting:
        this = waiting.pop()
        if this in found or this == header:
            continue
        found.add(this)
        waiting += [other for other, after in enumerate(edges) if this in after]
    return found | {header}


def _computes(instructions: tuple[Instruction, ...], body: frozenset[int]) -> bool:
    """Whether a loop does more than wait for a barrier or for tensor memory."""
    opcodes = {instructions[i].opcode for i in body}
    return bool(opcodes & {"LDG", "LDGSTS", "LDS", "STG", "FFMA", "FADD", "DADD", "DFMA", *TENSOR_CORE})
