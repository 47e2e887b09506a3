import io

import numpy as np
import pytest
from PIL import Image

from mbv2.errors import UserError
from mbv2.shapes import CLASS_NAMES, ShapesSpec, draw_shape, draw_shapes

SMALL = ShapesSpec(train_per_class=2, val_per_class=1, min_side=96, max_side=128, seed=3)


def files(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*.jpg"))}


def test_a_dozen_classes_in_the_order_of_a_folder_listing():
    assert len(CLASS_NAMES) == 12
    assert list(CLASS_NAMES) == sorted(CLASS_NAMES)


def test_draws_the_asked_number_of_jpegs_into_train_and_val_folders(tmp_path):
    drawn = files(draw_shapes(tmp_path / "set", SMALL))
    assert len(drawn) == 12 * 3
    for name in CLASS_NAMES:
        assert f"train/{name}/{name}-001.jpg" in drawn
        assert f"val/{name}/{name}-000.jpg" in drawn


def test_pictures_are_rgb_squares_of_varied_side_within_the_limits(tmp_path):
    sides = set()
    for data in files(draw_shapes(tmp_path, SMALL)).values():
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.mode == "RGB"
            assert picture.format == "JPEG"
            assert picture.width == picture.height
            assert 96 <= picture.width <= 128
            sides.add(picture.width)
    assert len(sides) > 5


def test_same_seed_gives_the_same_bytes(tmp_path):
    assert files(draw_shapes(tmp_path / "a", SMALL)) == files(draw_shapes(tmp_path / "b", SMALL))


def test_another_seed_gives_other_pictures_throughout(tmp_path):
    first = files(draw_shapes(tmp_path / "a", SMALL))
    other = files(draw_shapes(tmp_path / "b", ShapesSpec(2, 1, 96, 128, seed=4)))
    assert not set(first.values()) & set(other.values())


def test_no_validation_picture_is_a_training_picture(tmp_path):
    drawn = files(draw_shapes(tmp_path, SMALL))
    assert len(set(drawn.values())) == len(drawn)


@pytest.mark.parametrize("name", CLASS_NAMES)
def test_every_shape_stands_out_from_its_background(name):
    for seed in range(8):
        pixels = np.asarray(draw_shape(name, 96, np.random.default_rng(seed)), np.float32)
        brightness = pixels.mean(2)
        assert np.percentile(brightness, 97) - np.percentile(brightness, 10) > 25


def test_colour_alone_does_not_tell_the_class():
    means = np.array(
        [
            [np.asarray(draw_shape(name, 48, np.random.default_rng(seed))).mean((0, 1)) for seed in range(12)]
            for name in CLASS_NAMES
        ]
    )
    within, between = means.std(1).mean(), means.mean(1).std(0).mean()
    assert within > 2 * between


def test_an_unknown_shape_is_refused_with_the_known_ones_named():
    with pytest.raises(UserError, match="hexagon.*circle"):
        draw_shape("hexagon", 96, np.random.default_rng(0))
