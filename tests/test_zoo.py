"""The 22 variants by name."""

from pathlib import Path

import pytest

import mbv2
from mbv2.errors import UserError


def test_there_are_22_variants_with_the_published_names() -> None:
    names = mbv2.list_models()
    assert len(names) == len(set(names)) == 22
    assert names[0] == "mobilenet_v2_1.4_224"
    assert {"mobilenet_v2_1.0_224", "mobilenet_v2_0.75_192", "mobilenet_v2_0.35_96"} <= set(names)


def test_every_variant_has_its_width() -> None:
    for name, variant in mbv2.VARIANTS.items():
        assert name == f"mobilenet_v2_{variant.alpha}_{variant.resolution}"
    assert mbv2.create_model("mobilenet_v2_0.5_160").last_channel == 1280
    assert mbv2.create_model("mobilenet_v2_1.4_224").last_channel == 1792


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UserError, match="mobilenet_v2_0.35_96"):
        mbv2.create_model("mobilenet_v3_large")


def test_parameter_count_of_1_0_is_the_published_one() -> None:
    model = mbv2.create_model("mobilenet_v2_1.0_224")
    assert sum(p.numel() for p in model.parameters()) == 3_504_872


def test_missing_attributes_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no_such_thing"):
        mbv2.no_such_thing  # noqa: B018
    assert Path(mbv2.__file__).with_name("py.typed").is_file()
