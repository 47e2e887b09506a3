"""What the docs tell readers to type: found in the Markdown, and run small."""

import re
import shlex
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

# Commands that are not run by this test, with the reason. What they start is covered where the reason says so.
NOT_RUN = {
    r"^make (quickstart|test|setup)": "continuous integration runs them (.ci/run)",
    r"^pip install ": "it would change this environment; .ci/run installs the wheel, test_packaging.py builds it",
    r"^python -m bench\.(traffic|resources|proof|cpu_stages|tune|dataflow)": "minutes long; tested on their own",
    r"^python -m bench (kernels|model|train|loader|memory|accuracy|cold|cpu\w*) ": "minutes; test_bench_*.py: small",
    r"^#!|^#SBATCH|^first=|^srun ": "needs Slurm; the variables of srun are covered by test_distributed.py",
    r"^torchrun --nnodes=": "needs several machines; test_train_distributed.py runs torchrun on one",
}
# Put before the same training by launchers; several processes are test_train_distributed.py's.
LAUNCHERS = r"^(torchrun --nproc_per_node=\d+ -m mbv2\.train|mpirun -n \d+ python -m mbv2\.train|mbv2 train)\b"
# Options that come last win: a run of seconds, whatever the page says.
SMALL = (
    "--epoch_size=1 --decay_epoch=1 --resize=32 --batch_size=4 --num_parallel_workers=0 --device_target=CPU "
    "--alpha=0.35 --loader=torch"
)


class Block(NamedTuple):
    """A fenced block: the page and line it is from, its language, and its text."""

    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path, *languages: str) -> list[Block]:
    """The fenced blocks of a page in these languages."""
    found, language, start, lines = [], None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is None:
                language, start, lines = line[3:].strip(), number, []
            else:
                if language in languages:
                    found.append(Block(page.relative_to(ROOT).as_posix(), start, language, "\n".join(lines) + "\n"))
                language = None
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block is not closed"
    return found


def commands(block: Block) -> list[str]:
    """The commands of a shell block, continued lines joined, comments and empty lines left out."""
    joined = re.sub(r"\\\n\s*", "", block.text)
    lines = [line.strip() for line in joined.splitlines()]
    return [line for line in lines if line and not re.match(r"# ", line)]


def reason_not_run(command: str) -> str | None:
    """Why a command is not run here, or None."""
    return next((reason for pattern, reason in NOT_RUN.items() if re.search(pattern, command)), None)


def as_argv(command: str) -> list[str]:
    """The arguments of `mbv2` for a command, made small where it trains.

    Raises:
        ValueError: no rule says how to run it, nor why not.
    """
    training = re.match(LAUNCHERS, command)
    if training:
        return ["train", *shlex.split(command[training.end() :], comments=True), *SMALL.split()]
    words = shlex.split(command, comments=True)
    if words[:1] == ["mbv2"]:
        return words[1:]
    raise ValueError(f"no rule for {command!r}: let tests/doc_commands.py run it, or say there why not")
