"""The end of every benchmark: the table on stdout, JSON and pictures where asked for."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import plots, tables
from bench.schema import Result
from bench.tables import Column
from mbv2.errors import UserError


def parser(name: str, about: str, seconds: float | None = None) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; `seconds` is the default time for each comparison."""
    made = argparse.ArgumentParser(prog=f"python -m bench {name}", description=about)
    made.add_argument("--out", type=Path, help="file name without suffix for the JSON and the pictures")
    if seconds is not None:
        made.add_argument("--seconds", type=float, default=seconds, help="for each comparison [%(default)s]")
    return made


def device_of(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: cuda, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def finish(result: Result, columns: Sequence[Column], out: Path | None) -> int:
    """Print, write, draw; 1 when something of ours was wrong or nothing could be measured, else 0."""
    print(tables.text(result, columns), flush=True)
    if out is not None:
        json = out.parent / f"{out.name}.json"
        result.write(json)
        written = [json, *(plots.draw(result, json) if result.rows else [])]
        print("wrote " + ", ".join(map(str, written)))
    wrong = [name for name, why in result.left_out.items() if why.startswith("wrong") and "mbv2" in name]
    return 1 if wrong or not result.rows else 0
