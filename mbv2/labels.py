"""ImageNet's 1000 classes: synset and name, in the order of the labels."""

from functools import cache
from importlib.resources import files
from typing import Any


@cache
def _lines() -> tuple[tuple[str, str], ...]:
    text = files("mbv2").joinpath("imagenet_classes.txt").read_text(encoding="utf-8")
    return tuple(tuple(line.split(" ", 1)) for line in text.splitlines() if line)  # type: ignore[misc]


def imagenet_synsets() -> list[str]:
    """The 1000 WordNet ids, e.g. "n02123394", by label."""
    return [synset for synset, _ in _lines()]


def imagenet_names() -> list[str]:
    """The 1000 names with their synonyms, e.g. "tench, Tinca tinca", by label."""
    return [name for _, name in _lines()]


def short_name(name: str) -> str:
    """The first of a name's synonyms: "tench" for "tench, Tinca tinca"."""
    return name.split(",", 1)[0]


def class_names(meta: dict[str, Any], num_real_classes: int) -> tuple[list[str], bool]:
    """Names by label for a network, and whether its weights file carried them.

    The file's own come first, then ImageNet's short names when there are 1000 real classes, else "class N".
    """
    own = meta.get("class_names")
    if isinstance(own, (list, tuple)) and len(own) == num_real_classes:
        return [str(name) for name in own], True
    if num_real_classes == 1000:
        return [short_name(name) for name in imagenet_names()], False
    return [f"class {label}" for label in range(num_real_classes)], False
