"""Training checkpoints: written whole or not at all, every byte covered by a checksum, the newest K kept.

A checkpoint is an ordinary `torch.save` archive (any `torch.load(weights_only=True)` reads it) whose zip comment
holds the SHA-256 of all bytes before it. torch itself reads a damaged archive without complaint, so the checksum
is what tells a flipped bit from a good file.
"""

import contextlib
import errno
import hashlib
import io
import os
import pickle
import random
import re
import struct
import sys
import tempfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mbv2.errors import UserError
from mbv2.files import write_atomic

BEST = "best.ckpt"
_NAME = re.compile(r"epoch-(\d{4,})(?:-step-(\d{6,}))?\.ckpt")
_LEFTOVER = re.compile(r"\.(?:epoch-\d{4,}(?:-step-\d{6,})?|best)\.ckpt\..*\.part")
_SEAL = b"mbv2-sha256:"
_SEAL_BYTES = len(_SEAL) + 64
_PLAIN = (str, bytes, int, float, bool, type(None), torch.Size, torch.dtype, torch.device)


def name(epoch: int, step: int = 0) -> str:
    """The file name of a checkpoint: `epoch-0003.ckpt`, or `epoch-0003-step-000120.ckpt` within epoch 3."""
    return f"epoch-{epoch:04d}.ckpt" if step == 0 else f"epoch-{epoch:04d}-step-{step:06d}.ckpt"


def save(directory: Path | str, state: dict[str, Any], epoch: int, step: int, keep: int, is_best: bool) -> Path:
    """Write a checkpoint, then delete the oldest ones beyond `keep`. Call it on rank 0 only.

    Args:
        directory: the folder of checkpoints; made when missing.
        state: tensors and plain Python values in dicts, lists and tuples (anything else could not be read back).
        epoch: the epoch this state belongs to, counted from 0.
        step: 0 when that epoch is finished, else how many of its steps are done.
        keep: how many checkpoints stay, at least 1. `best.ckpt` and files of other names are never deleted.
        is_best: also make this checkpoint `best.ckpt`.

    Returns:
        The file written.

    Raises:
        UserError: the disk is full or refuses; what was there before is intact.
        TypeError: `state` holds something that `weights_only` loading would refuse.
    """
    if keep < 1:
        raise UserError(f"--keep_checkpoint_max {keep}: at least 1 checkpoint must be kept")
    _check_plain(state, "state")
    directory = Path(directory)
    path = directory / name(epoch, step)
    data = _seal(state)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(directory)
        write_atomic(path, data)
        if is_best:
            _make_best(path, data)
    except OSError as error:
        raise _write_error(path, error) from error
    for old in _newest_first(directory)[keep:]:
        if old != path:
            old.unlink(missing_ok=True)
    return path


def load(path: Path | str) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, after checking every byte of it. Nothing in it is executed.

    Raises:
        UserError: missing, damaged, or not a checkpoint of mbv2.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no checkpoint at {path}") from error
    except OSError as error:
        raise UserError(f"could not read checkpoint {path}: {error.strerror}") from error
    body, seal = data[:-_SEAL_BYTES], data[-_SEAL_BYTES:]
    if seal != _SEAL + hashlib.sha256(body).hexdigest().encode():
        raise UserError(f"{path} is damaged, cut short, or not a training checkpoint of mbv2 (checksum does not fit)")
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} cannot be read by torch {torch.__version__}: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a training checkpoint of mbv2")
    return state


def load_newest(directory: Path | str) -> tuple[dict[str, Any], Path] | None:
    """The newest checkpoint that is whole, and its path; None when there is none at all.

    A damaged one is reported on stderr and the one before it is tried; `best.ckpt` is the last resort.

    Raises:
        UserError: there are checkpoints but every one is damaged (starting over is the user's choice to make).
    """
    directory = Path(directory)
    candidates = _newest_first(directory)
    if (directory / BEST).is_file():
        candidates.append(directory / BEST)
    for path in candidates:
        try:
            return load(path), path
        except UserError as error:
            print(f"mbv2: warning: {error}; trying the checkpoint before it", file=sys.stderr)
    if candidates:
        raise UserError(f"every checkpoint in {directory} is damaged; start over with another --ckpt_save_dir")
    return None


def rng_state() -> dict[str, Any]:
    """The state of Python's, NumPy's, torch's and this process's GPU's generators, fit for a checkpoint."""
    numpy_state = np.random.get_state(legacy=False)  # noqa: NPY002  (libraries draw from the global generator)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": {
            "bit_generator": str(numpy_state["bit_generator"]),
            "key": torch.from_numpy(numpy_state["state"]["key"].astype(np.int64)),
            "pos": int(numpy_state["state"]["pos"]),
            "has_gauss": int(numpy_state["has_gauss"]),
            "gauss": float(numpy_state["gauss"]),
        },
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        # The current device only: asking all of them would open a context on every GPU from every process.
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to what `rng_state` returned (a GPU's only when there is a GPU here)."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    saved = state["numpy"]
    np.random.set_state(  # noqa: NPY002
        {
            "bit_generator": saved["bit_generator"],
            "state": {"key": saved["key"].numpy().astype(np.uint32), "pos": saved["pos"]},
            "has_gauss": saved["has_gauss"],
            "gauss": saved["gauss"],
        }
    )
    torch.set_rng_state(state["torch"].cpu())
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())


def _seal(state: dict[str, Any]) -> bytes:
    """`state` as a torch archive whose zip comment is the checksum of all bytes before the comment."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    archive = buffer.getvalue()
    # A zip file ends with the comment's length (2 bytes, little endian) and the comment; torch writes none.
    if archive[-2:] != b"\0\0":
        raise RuntimeError("torch.save wrote an archive that does not end in an empty zip comment")
    body = archive[:-2] + struct.pack("<H", _SEAL_BYTES)
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode()


def _make_best(path: Path, data: bytes) -> None:
    """Make `best.ckpt` the same as `path` in one rename: a hard link where the file system has them, else a copy."""
    best = path.with_name(BEST)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{BEST}.", suffix=".part") as folder:
        link = Path(folder) / BEST
        try:
            os.link(path, link)
        except OSError:
            write_atomic(best, data)
        else:
            link.replace(best)


def _write_error(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    reason = "the disk is full" if full else error.strerror or str(error)
    remedy = f"{'free some space' if full else 'put that right'} and continue with --resume auto"
    # Only named, not read: reading may be slow, and load_newest checks it when it is needed.
    existing = _newest_first(path.parent)
    last = f"the last good checkpoint, {existing[0]}, is intact" if existing else "there is no earlier checkpoint"
    return UserError(f"could not write checkpoint {path}: {reason}; {last}; {remedy}")


def _newest_first(directory: Path) -> list[Path]:
    """The checkpoints in `directory` by epoch and step; a finished epoch comes after the steps within it."""
    found = []
    if directory.is_dir():
        for path in directory.iterdir():
            match = _NAME.fullmatch(path.name)
            if match and path.is_file():
                epoch, step = match.groups()
                found.append((int(epoch), float("inf") if step is None else int(step), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _remove_leftovers(directory: Path) -> None:
    """Delete what a process killed in the middle of writing left behind, or it would fill the disk."""
    for path in directory.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            if path.is_dir():
                (path / BEST).unlink(missing_ok=True)
                with contextlib.suppress(OSError):  # somebody else's file in it: leave it
                    path.rmdir()
            else:
                path.unlink(missing_ok=True)


def _check_plain(value: Any, where: str) -> None:
    """Refuse at saving time what could not be read at resuming time. Exact types: np.float64 is a float too."""
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            _check_plain(key, f"a key of {where}")
            _check_plain(item, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where} is a {type(value).__name__}; a checkpoint holds tensors and plain Python values")
