"""ImageNet's classes and the names a network's classes get."""

import csv
from pathlib import Path

from mbv2.labels import class_names, imagenet_names, imagenet_synsets, short_name


def test_there_are_1000_different_synsets_in_ascending_order() -> None:
    synsets = imagenet_synsets()
    assert len(synsets) == len(imagenet_names()) == 1000
    assert synsets == sorted(set(synsets))
    assert all(len(synset) == 9 and synset[0] == "n" and synset[1:].isdigit() for synset in synsets)


def test_known_labels_have_their_names() -> None:
    named = {label: (imagenet_synsets()[label], imagenet_names()[label]) for label in (0, 283, 999)}
    assert named[0] == ("n01440764", "tench, Tinca tinca")
    assert named[283] == ("n02123394", "Persian cat")
    assert named[999][1].startswith("toilet tissue, ")


def test_the_short_name_is_the_first_synonym() -> None:
    assert short_name("tench, Tinca tinca") == "tench"
    assert short_name("Persian cat") == "Persian cat"


def test_a_network_takes_its_names_from_its_weights_then_imagenet_then_numbers() -> None:
    assert class_names({"class_names": ["cat, big", "dog"]}, 2) == (["cat, big", "dog"], True)
    assert class_names({}, 1000)[0][283] == "Persian cat"
    assert class_names({}, 3) == (["class 0", "class 1", "class 2"], False)


def test_names_of_another_count_are_not_used() -> None:
    assert class_names({"class_names": ["cat", "dog"]}, 3) == (["class 0", "class 1", "class 2"], False)


def test_the_synsets_are_those_of_real_labels(shared_data: Path) -> None:
    with (shared_data / "eval" / "ilsvrc_val_227" / "labels.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 1000
    assert all(imagenet_synsets()[int(row["label"])] == row["synset"] for row in rows)
