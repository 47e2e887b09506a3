"""Atomic writes and fresh folders."""

import errno
from pathlib import Path

import pytest

from mbv2.files import fresh_dir, write_atomic


def test_write_replaces_the_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old and longer")
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def half(file) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_atomic(path, half)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.bin"]


def test_fresh_dir_never_returns_a_folder_with_content(tmp_path: Path) -> None:
    first = fresh_dir(tmp_path / "run")
    assert first == tmp_path / "run"
    assert fresh_dir(tmp_path / "run") == first
    (first / "x").touch()
    second = fresh_dir(tmp_path / "run")
    assert second == tmp_path / "run-1"
    (second / "x").touch()
    assert fresh_dir(tmp_path / "run") == tmp_path / "run-2"
