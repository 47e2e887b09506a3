"""WebDataset-style tar shards: `key.jpg` beside `key.cls` (a number) or `key.json` ({"label": number})."""

import json
import tarfile
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from mbv2.errors import UserError

_LABEL_BYTES = 1 << 20
MAX_CLASSES = 1_000_000
"""Labels from here on are taken for mistakes rather than for a classifier of that size."""


class Member(NamedTuple):
    """One picture inside a shard: its bytes are `size` bytes from `offset` of the tar file."""

    name: str
    label: int
    offset: int
    size: int


def index(tar: Path, image_suffixes: Collection[str]) -> list[Member]:
    """List the labelled pictures of an uncompressed tar, reading only headers and labels.

    Raises:
        UserError: a damaged tar, a picture without a label, or a label that is no number.
    """
    images: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(tar, "r:") as archive:
            for info in archive:
                if not info.isfile():
                    continue
                key, suffix = _split(info.name)
                if suffix in image_suffixes:
                    images[key] = info
                elif suffix in (".cls", ".json"):
                    file = archive.extractfile(info)
                    text = file.read(_LABEL_BYTES) if file else b""
                    labels[key] = _label(text, suffix, f"{tar}:{info.name}")
            # tarfile takes a damaged header for the end of the archive; the real end is a block of zeros.
            archive.fileobj.seek(archive.offset)
            if any(archive.fileobj.read(tarfile.BLOCKSIZE)):
                raise UserError(f"{tar}: damaged after {len(images)} pictures; copy or write the shard anew")
    except (tarfile.TarError, OSError, EOFError) as error:
        raise UserError(f"{tar}: not a readable uncompressed tar ({error})") from error
    for key, info in images.items():
        if key not in labels:
            raise UserError(f"{tar}:{info.name} has no label; put {key}.cls or {key}.json beside it")
    return [Member(info.name, labels[key], info.offset_data, info.size) for key, info in images.items()]


def _split(name: str) -> tuple[str, str]:
    # The key ends at the first dot of the file's name: a.seg.png belongs to key "a" (WebDataset's rule); only
    # single-part suffixes are ours.
    folder, _, base = name.rpartition("/")
    stem, _, suffix = base.partition(".")
    return f"{folder}/{stem}" if folder else stem, f".{suffix.lower()}"


def _label(text: bytes, suffix: str, where: str) -> int:
    try:
        value = json.loads(text)["label"] if suffix == ".json" else int(text)
        label = int(value)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f'{where}: no label in it; needs a number, or {{"label": number}} in .json') from error
    if not 0 <= label < MAX_CLASSES:
        raise UserError(f"{where}: label {label} is out of range; classes are counted from 0")
    return label
