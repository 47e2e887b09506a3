"""Which tile a kernel runs with: read from JSON tables, never measured at run time, so that ranks cannot disagree.

`tiles/<kernel>.json` maps an architecture ("sm_80", or "default") to a list of entries

    {"bytes": 2, "cout": 32, "tile": {"BLOCK_M": 128, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}}

The first entry is taken whose `bytes` (of an activation) equals the call's and whose every other key bounds the
call's size of that name from above; a key that is left out matches anything. The tables come from the static
planner (`python -m bench.resources`). A folder in `MBV2_TILES` with tables of the same form, as a measurement on a
real GPU writes them, is looked at first.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

_TABLES = Path(__file__).parent / "tiles"
_forced: dict[str, dict[str, int]] = {}


class Lookup(NamedTuple):
    """One call of `tile` and what it gave."""

    kernel: str
    dtype: torch.dtype
    sizes: dict[str, int]
    meta: dict[str, int]


_record: list[Lookup] | None = None


def tile(kernel: str, dtype: torch.dtype, **sizes: int) -> dict[str, int]:
    """The meta-parameters (BLOCK_*, num_warps, num_stages, ...) for one launch of `kernel`.

    Raises:
        LookupError: the kernel has no table, or none of its entries takes these sizes.
    """
    meta = dict(_forced[kernel]) if kernel in _forced else _from_tables(kernel, dtype, sizes)
    if _record is not None:
        _record.append(Lookup(kernel, dtype, sizes, meta))
    return meta


def _from_tables(kernel: str, dtype: torch.dtype, sizes: dict[str, int]) -> dict[str, int]:
    for entry in _entries(kernel, architecture(), os.environ.get("MBV2_TILES", "")):
        if entry.get("bytes", dtype.itemsize) == dtype.itemsize and all(
            size <= entry.get(name, size) for name, size in sizes.items()
        ):
            return dict(entry["tile"])
    raise LookupError(f"no tile for kernel {kernel!r} on {architecture()} with {dtype} and {sizes}")


def architecture() -> str:
    """The compute architecture kernels are compiled for now, as "sm_80"; "default" in Triton's interpreter."""
    if triton.knobs.runtime.interpret:
        return "default"
    return f"sm_{triton.runtime.driver.active.get_current_target().arch}"


def dot_precision(dtype: torch.dtype) -> str:
    """tl.dot's input_precision for float32: "tf32" where torch is allowed it, else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 else "ieee"


@contextmanager
def forced(kernel: str, **meta: int) -> Iterator[None]:
    """Launch `kernel` with these meta-parameters inside, whatever the tables say (tests and measurements)."""
    before = _forced.get(kernel)
    _forced[kernel] = meta
    try:
        yield
    finally:
        if before is None:
            del _forced[kernel]
        else:
            _forced[kernel] = before


@contextmanager
def recorded() -> Iterator[list[Lookup]]:
    """Every call of `tile` inside, in order: what a planner needs to know about the launches of a workload."""
    global _record
    before, _record = _record, []
    try:
        yield _record
    finally:
        _record = before


@cache
def _entries(kernel: str, arch: str, measured: str) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    if measured and (own := Path(measured) / f"{kernel}.json").is_file():
        entries += json.loads(own.read_text()).get(arch, [])
    path = _TABLES / f"{kernel}.json"
    if not path.is_file():
        raise LookupError(f"no table of tiles for kernel {kernel!r}")
    table = json.loads(path.read_text())
    return entries + table.get(arch, []) + table["default"]
