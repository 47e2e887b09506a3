"""Where pictures and labels come from: class folders, ImageNet synset folders, labels.csv, or tar shards.

A source is a list of samples and the classes; it reads bytes and knows nothing of decoding or ranks.
"""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from mbv2.data import shards
from mbv2.errors import UserError
from mbv2.labels import imagenet_names, imagenet_synsets, short_name

IMAGE_SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".ppm", ".tif", ".tiff"))
_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid", "test")}


class Sample(NamedTuple):
    """One picture: its name in messages, its real class, and where its bytes lie (in a tar: offset and size)."""

    name: str
    label: int
    path: str
    offset: int | None = None
    size: int | None = None


@dataclass(frozen=True)
class Source:
    """Pictures of one split.

    Attributes:
        samples: in a fixed order, the same on every rank.
        class_names: by label.
        synsets: by label, where the classes are ImageNet's.
    """

    samples: Sequence[Sample] = field(repr=False)
    class_names: list[str] = field(repr=False)
    synsets: list[str] | None = field(default=None, repr=False)

    @property
    def num_classes(self) -> int:
        """Real classes, those without a picture included."""
        return len(self.class_names)

    @property
    def is_imagenet(self) -> bool:
        """Whether labels are ImageNet's 1000."""
        return self.synsets is not None

    def read(self, sample: Sample) -> bytes:
        """The bytes of one picture file."""
        try:
            with Path(sample.path).open("rb") as file:
                if sample.offset is None:
                    return file.read()
                file.seek(sample.offset)
                return file.read(sample.size)
        except OSError as error:
            raise UserError(f"{sample.name}: cannot be read ({error.strerror})") from error


def open_source(root: str | Path, split: str, class_names: list[str] | None = None) -> Source:
    """Find the pictures of `split` under `root`, in whichever of the known layouts it has.

    Layouts: `root/train` and `root/val` (or validation, valid, test), each a folder per class, a flat folder with
    labels.csv, or tar shards; or root itself being one of these. Folders named by ImageNet synsets get ImageNet's
    labels even when only some of the 1000 are there.

    Args:
        root: the data folder.
        split: "train" or "val".
        class_names: the classes to number by; None: from the folder, and for "val" from the training split's class
            folders where there are any, so that a class without validation pictures does not shift the others.

    Raises:
        UserError: missing or empty folder, no such split, an unknown class or a label out of range.
    """
    if not str(root):
        raise UserError("--data_url is empty: give it the folder that holds the pictures")
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"no folder at {root}; give --data_url the folder that holds the pictures")
    folder = _split_folder(root, split)
    prefix = "" if folder != root else f"{split}-"
    tars = sorted(folder.glob("*.tar"))
    if prefix and any(tar.name.startswith(("train-", "val-")) for tar in tars):
        tars = [tar for tar in tars if tar.name.startswith(prefix)]
        if not tars:
            raise UserError(f"{root}: no {split}-*.tar among its shards")
    if tars:
        return _from_shards(folder, tars, class_names)
    if (folder / "labels.csv").is_file():
        return _from_csv(folder, class_names)
    training = root / "train"
    if class_names is None and split == "val" and training.is_dir() and not (training / "labels.csv").is_file():
        trained = _class_folders(training)
        if not set(trained) <= set(imagenet_synsets()):
            class_names = trained
    return _from_folders(folder, class_names)


def image_files(folder: Path) -> list[Path]:
    """Every picture file under `folder`, sorted, links followed, hidden ones left out."""
    found = []
    for base, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            Path(base, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES
        ]
    return found


def has_split(root: str | Path, split: str) -> bool:
    """Whether `root` has a part of its own for `split`."""
    root = Path(root)
    return any((root / name).is_dir() for name in _SPLITS[split]) or any(root.glob(f"{split}-*.tar"))


def _split_folder(root: Path, split: str) -> Path:
    for name in _SPLITS[split]:
        if (root / name).is_dir():
            return root / name
    others = [name for names in _SPLITS.values() for name in names if (root / name).is_dir()]
    if others:
        raise UserError(
            f"{root} has {others[0]}/ but no {_SPLITS[split][0]}/; put the pictures of the {split} split there, "
            "one folder per class"
        )
    return root


def _imagenet() -> tuple[list[str], list[str]]:
    return [short_name(name) for name in imagenet_names()], imagenet_synsets()


def _class_folders(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _from_folders(folder: Path, class_names: list[str] | None) -> Source:
    classes = _class_folders(folder)
    if not classes:
        raise UserError(
            f"{folder}: no pictures in a known layout; needs one folder per class, or labels.csv (file,label), "
            "or .tar shards"
        )
    names, synsets = class_names, None
    known = set(imagenet_synsets())
    if all(name in known for name in classes) and (class_names is None or len(class_names) == 1000):
        names, synsets = _imagenet()
        index = {synset: label for label, synset in enumerate(synsets)}
    else:
        names = class_names or classes
        index = {name: label for label, name in enumerate(names)}
    samples = []
    for name in classes:
        if name not in index:
            raise UserError(f"{folder / name}: class {name!r} is not among the {len(index)} classes of the training")
        samples += [
            Sample(str(path.relative_to(folder)), index[name], str(path)) for path in image_files(folder / name)
        ]
    if not samples:
        raise UserError(f"{folder}: its class folders hold no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return Source(samples, names, synsets)


def _from_csv(folder: Path, class_names: list[str] | None) -> Source:
    table = folder / "labels.csv"
    samples: list[Sample] = []
    synsets: list[str | None] = []
    for where, row in _rows(table):
        label = _label(row["label"], where)
        path = _beside(folder, row["file"] or "")
        if path is None:
            raise UserError(f"{where}: no file {row['file']!r} in {folder} or its images/")
        samples.append(Sample(row["file"], label, str(path)))
        synsets.append(row.get("synset"))
    if not samples:
        raise UserError(f"{table}: lists no picture")
    return _numbered(samples, class_names, _are_imagenet(samples, synsets, str(table)), str(table))


def _rows(table: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """("file, line N", row) of each row of a table that has a file and a label column."""
    try:
        # utf-8-sig: spreadsheets put a byte order mark in front.
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if reader.fieldnames is None or not {"file", "label"} <= set(reader.fieldnames):
                raise UserError(f"{table}: the first line must be file,label[,synset]")
            for row in reader:
                yield f"{table}, line {reader.line_num}", row
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
    except (csv.Error, OSError) as error:
        raise UserError(f"{table}: cannot be read ({error})") from error


def _are_imagenet(samples: list[Sample], synsets: list[str | None], where: str) -> bool:
    """Whether the table's synsets are ImageNet's; then each must be the one of its label."""
    known = {synset: label for label, synset in enumerate(imagenet_synsets())}
    if not all(synset in known for synset in synsets):
        return False
    for sample, synset in zip(samples, synsets, strict=True):
        if known[synset] != sample.label:
            raise UserError(f"{where}: {sample.name} has label {sample.label}, but {synset} is class {known[synset]}")
    return True


def _from_shards(folder: Path, tars: list[Path], class_names: list[str] | None) -> Source:
    samples = [
        Sample(f"{tar.name}:{member.name}", member.label, str(tar), member.offset, member.size)
        for tar in tars
        for member in shards.index(tar, IMAGE_SUFFIXES)
    ]
    if not samples:
        raise UserError(f"{folder}: its .tar shards hold no picture with a .cls or .json label")
    listed = folder / "classes.txt"
    if not listed.is_file():
        listed = folder.parent / "classes.txt"
    if class_names is None and listed.is_file():
        class_names = listed.read_text(encoding="utf-8").split("\n")
        class_names = [name for name in class_names if name.strip()]
    # ImageNet's own list as the list of classes: the labels are ImageNet's.
    is_imagenet = class_names == imagenet_synsets()
    return _numbered(samples, class_names, is_imagenet, str(folder))


def _numbered(samples: list[Sample], class_names: list[str] | None, is_imagenet: bool, where: str) -> Source:
    """A source whose labels are numbers already, checked against the number of classes."""
    top = max(samples, key=lambda sample: sample.label)
    synsets = None
    if is_imagenet and (class_names is None or len(class_names) == 1000):
        class_names, synsets = _imagenet()
    elif class_names is None:
        class_names = [f"class {label}" for label in range(top.label + 1)]
    if top.label >= len(class_names):
        raise UserError(
            f"{where}: {top.name} has label {top.label}, but there are {len(class_names)} classes "
            f"(0..{len(class_names) - 1})"
        )
    return Source(samples, class_names, synsets)


def _label(text: str | None, where: str) -> int:
    try:
        label = int(text or "")
    except ValueError as error:
        raise UserError(f"{where}: label {text!r} is not a number") from error
    if not 0 <= label < shards.MAX_CLASSES:
        raise UserError(f"{where}: label {label} is out of range; classes are counted from 0")
    return label


def _beside(folder: Path, name: str) -> Path | None:
    for candidate in (folder / "images" / name, folder / name):
        if name and candidate.is_file():
            return candidate
    return None
