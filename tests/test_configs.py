from importlib import resources

import pytest
import yaml

from mbv2.zoo import VARIANTS

FOLDER = resources.files("mbv2") / "configs"


def read(variant):
    return (FOLDER / f"{variant}_imagenet2012.yaml").read_text()


def test_there_is_one_file_for_each_variant_and_no_other():
    names = {entry.name for entry in FOLDER.iterdir()}
    assert names == {f"{name}_imagenet2012.yaml" for name in VARIANTS}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_file_describes_its_variant(variant):
    options = yaml.safe_load(read(variant))
    assert (options["alpha"], options["resize"]) == (VARIANTS[variant].alpha, VARIANTS[variant].resolution)


@pytest.mark.parametrize("variant", VARIANTS)
def test_published_accuracy_stands_beside_it_marked_as_theirs(variant):
    text, published = read(variant), VARIANTS[variant]
    assert "theirs, not ours" in text
    assert f"MindSpore   top-1 {published.mindspore_top1}, top-5 {published.mindspore_top5}" in text
    assert f"TensorFlow  top-1 {published.tf_top1}, top-5 {published.tf_top5}" in text


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_key_is_a_training_option_with_a_value_of_its_type(variant):
    from dataclasses import fields, is_dataclass

    from mbv2.train.options import TrainOptions

    def check(options, defaults):
        known = {field.name: getattr(defaults, field.name) for field in fields(defaults)}
        for key, value in options.items():
            assert key in known, f"{key} is no training option"
            if is_dataclass(known[key]):
                check(value, known[key])
            elif known[key] is not None:
                assert isinstance(value, type(known[key])), f"{key}: {value!r}"

    check(yaml.safe_load(read(variant)), TrainOptions())
