"""ImageNet's 1000 classes: synset and name, in the order of the labels."""

from functools import cache
from importlib.resources import files


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
