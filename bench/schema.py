"""What every benchmark writes: one JSON schema with the rows, and where, when and by which command they came about."""

import importlib.metadata
import json
import os
import platform
import re
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from mbv2.errors import UserError
from mbv2.files import write_atomic

SCHEMA = "mbv2-bench-1"
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "nvidia-dali-cuda130",
    "onnxruntime",
    "openvino",
    "ai-edge-litert",
    "timm",
    "pillow",
)
Row = dict[str, Any]


@dataclass(frozen=True)
class Result:
    """One run of a benchmark.

    Attributes:
        bench: which one, e.g. "loader".
        command: how to run it again; folders are shortened to their names.
        date: when it started, ISO 8601 in UTC, to the minute.
        machine: CPU, cores, memory, GPU if any, and the load average at the start.
        versions: of Python, of mbv2 and of the packages that took part.
        settings: what was measured and how, e.g. rounds, threads, type.
        rows: the figures; the unit is the end of a key (`_ms`, `_mb`, `_per_s`, `_percent`), a ratio has none.
        left_out: what was not measured, by name, with the reason: not installed, or its result was wrong.
    """

    bench: str
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    settings: dict[str, Any]
    rows: list[Row]
    left_out: dict[str, str] = field(default_factory=dict)

    def write(self, path: Path | str) -> None:
        """Write as JSON, one row a line, whole or not at all.

        Raises:
            UserError: what the file system refused.
        """
        head = {"schema": SCHEMA, **{name: value for name, value in asdict(self).items() if name != "rows"}}
        lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
        rows = ",\n".join(f"    {json.dumps(row)}" for row in self.rows)
        text = "{\n" + ",\n".join([*lines, f'  "rows": [\n{rows}\n  ]']) + "\n}\n"
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, text.encode())
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def read(path: Path | str) -> Result:
    """The result in a file that `Result.write` wrote.

    Raises:
        UserError: missing, not JSON, or not of this schema.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise UserError(f'{path}: no result of `python -m bench` (its "schema" is not {SCHEMA})')
    names = {entry.name for entry in fields(Result)}
    missing = sorted(names - set(content) - {"left_out"})
    if missing:
        raise UserError(f"{path}: {missing[0]!r} is missing; run the benchmark again")
    return Result(**{name: content[name] for name in names & set(content)})


def new(bench: str, argv: Sequence[str], settings: dict[str, Any]) -> Result:
    """A result without rows yet, with what is known of this machine at this moment."""
    return Result(bench, command(bench, argv), _now(), machine(), versions(), settings, rows=[])


def command(bench: str, argv: Sequence[str]) -> str:
    """The command line without the folders of this machine, which mean nothing on another."""
    return shlex.join(["python", "-m", "bench", bench, *(_without_folders(word) for word in argv)])


def machine() -> dict[str, Any]:
    """CPU, cores, memory, system, GPU and the load average; no names of hosts or people."""
    import torch

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.system(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 1),
    }


def versions() -> dict[str, str]:
    """Python, mbv2, and those of PACKAGES that are installed."""
    import mbv2

    found = {"python": platform.python_version(), "mbv2": mbv2.__version__}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def place(result: Result) -> str:
    """One line on where and when, for tables and pictures."""
    where = result.machine["gpu"] or f"{result.machine['cores']} cores of {_short_cpu(result.machine['cpu'])}"
    return f"{where}, torch {result.versions['torch']}, {result.date[:10]}, load {result.machine['load']}"


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="minutes")


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return f"{option}{equals}{Path(value).name}" if "/" in value else word


def _cpu() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _short_cpu(name: str) -> str:
    return re.sub(r"\s*(\d+-Core )?Processor.*|\(R\)|\(TM\)| CPU @.*", "", name).strip()
