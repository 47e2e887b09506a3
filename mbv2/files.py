"""Writing files so that a reader never sees half of one, and nothing a user made is overwritten by accident."""

import contextlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_atomic(path: Path | str, data: bytes | Callable[[BinaryIO], None]) -> None:
    """Write `path` whole or not at all: into a temporary file beside it, fsync, rename, fsync of the folder.

    Args:
        path: the file to create or replace; its folder must exist.
        data: the bytes, or a function that writes them into the open binary file it is given.

    Raises:
        OSError: what the file system said (disk full, no permission); the old file is untouched and the
            temporary one is gone.
    """
    path = Path(path)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def fresh_dir(path: Path | str) -> Path:
    """Create and return `path`, or `path-1`, `path-2`, … when it already holds something.

    Creation is what claims the name, so two runs started together get two folders.
    """
    path = Path(path)
    if path.is_dir() and not any(path.iterdir()):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        candidate = path if number == 0 else path.with_name(f"{path.name}-{number}")
        try:
            candidate.mkdir()
        except FileExistsError:
            number += 1
        else:
            return candidate


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def _sync_folder(folder: Path) -> None:
    # Some file systems cannot fsync a folder; the rename itself is atomic all the same.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
