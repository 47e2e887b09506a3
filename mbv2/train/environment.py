"""What a run ran on: versions, source revision, devices and command line, written beside its results."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import mbv2
from mbv2.distributed import World
from mbv2.files import write_atomic

_PACKAGES = ("torch", "torchvision", "triton", "numpy", "pillow", "safetensors", "jsonargparse", "torchmetrics")
_DALI = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
# Only variables that change what a run does: an environment may hold secrets.
_VARIABLES = ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "MBV2_BACKEND", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID")


def describe(world: World) -> dict[str, Any]:
    """Versions, git revision (None outside a checkout), devices, launch and time, as plain JSON values."""
    device = world.device
    described: dict[str, Any] = {
        "mbv2": mbv2.__version__,
        "git_revision": git_revision(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "world_size": world.world_size,
        "device": str(device),
        "packages": {package: _version(package) for package in _PACKAGES},
        "dali": next((found for found in map(_version, _DALI) if found), None),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "variables": {key: os.environ[key] for key in _VARIABLES if key in os.environ},
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        described["gpu"] = {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": properties.total_memory,
            "visible": torch.cuda.device_count(),
        }
    return described


def write(path: Path | str, world: World) -> None:
    """Write `describe(world)` as JSON to `path`. Call it on rank 0 only."""
    write_atomic(path, (json.dumps(describe(world), indent=2) + "\n").encode())


def git_revision(folder: Path | None = None) -> str | None:
    """The commit of the checkout that this package (or `folder`) is the top of, with `-dirty` for local changes.

    None when it is installed elsewhere, git is missing, or the checkout has no commit.
    """
    folder = (folder or Path(__file__).resolve().parents[2]).resolve()
    top = _git(folder, "rev-parse", "--show-toplevel")
    # A venv inside somebody's own repository must not report that repository's commit as ours.
    if top is None or Path(top).resolve() != folder:
        return None
    commit = _git(folder, "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changes else commit


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        finished = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
