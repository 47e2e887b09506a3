"""The recipe's geometry and random numbers."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from mbv2.data.recipe import Recipe, eval_geometry, sample_generator, train_window
from mbv2.errors import UserError

SIDES = st.integers(1, 600)


@pytest.mark.parametrize(("resolution", "resized"), [(224, 256), (192, 219), (160, 183), (128, 146), (96, 110)])
def test_evaluation_resize_scales_with_the_resolution(resolution: int, resized: int) -> None:
    assert Recipe(resolution=resolution).eval_resize == resized


def test_evaluation_resize_can_be_given() -> None:
    assert Recipe(resolution=224, resize=232).eval_resize == 232


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"resolution": 31}, "--resize 31"),
        ({"area": (0.0, 1.0)}, "area"),
        ({"area": (0.9, 0.1)}, "area"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"flip": 1.5}, "flip"),
        ({"random_erasing": -0.1}, "random_erasing"),
        ({"std": (0.2, 0.0, 0.2)}, "std"),
        ({"resize": 200}, "resize 200"),
    ],
)
def test_impossible_recipes_are_refused(options: dict, named: str) -> None:
    with pytest.raises(UserError, match=named):
        Recipe(**options)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (256, 256), (227, 227), (97, 500), (501, 333)])
def test_evaluation_geometry_is_torchvisions(size: tuple[int, int]) -> None:
    recipe = Recipe()
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    resized = v2.Resize(256, antialias=True)(image)
    (height, width), (top, left) = eval_geometry(*size, recipe)
    assert (height, width) == tuple(resized.shape[1:])
    assert torch.equal(resized[:, top : top + 224, left : left + 224], v2.CenterCrop(224)(resized))


@given(height=SIDES, width=SIDES)
def test_evaluation_crop_lies_inside_the_resized_picture(height: int, width: int) -> None:
    (resized_height, resized_width), (top, left) = eval_geometry(height, width, Recipe(resolution=64))
    assert 0 <= top <= resized_height - 64
    assert 0 <= left <= resized_width - 64


@given(height=SIDES, width=SIDES, index=st.integers(0, 1000))
def test_training_window_lies_inside_the_picture(height: int, width: int, index: int) -> None:
    top, left, h, w = train_window(height, width, Recipe(), sample_generator(0, 0, index))
    assert h > 0
    assert w > 0
    assert 0 <= top <= height - h
    assert 0 <= left <= width - w


def test_training_windows_have_the_recipes_area_and_ratio() -> None:
    recipe = Recipe(area=(0.25, 0.5), ratio=(0.8, 1.25))
    windows = [train_window(1000, 1000, recipe, sample_generator(0, 0, i))[2:] for i in range(500)]
    areas = [h * w / 1e6 for h, w in windows]
    ratios = [w / h for h, w in windows]
    assert 0.249 < min(areas) < 0.27
    assert 0.48 < max(areas) < 0.501
    assert 0.79 < min(ratios) < 0.82
    assert 1.22 < max(ratios) < 1.26


def test_a_picture_too_narrow_for_the_ratio_gives_its_central_part() -> None:
    recipe = Recipe(area=(1.0, 1.0))
    assert train_window(1000, 30, recipe, sample_generator(0, 0, 0)) == (480, 0, 40, 30)
    assert train_window(30, 1000, recipe, sample_generator(0, 0, 0)) == (0, 480, 30, 40)


def test_each_picture_epoch_and_seed_has_random_numbers_of_its_own() -> None:
    draws = {
        torch.rand(2, generator=sample_generator(seed, epoch, index), dtype=torch.float64).tolist()[0]
        for seed in range(8)
        for epoch in range(8)
        for index in range(8)
    }
    assert len(draws) == 512


def test_a_pictures_random_numbers_are_the_same_every_time() -> None:
    first, again = (torch.rand(9, generator=sample_generator(5, 3, 77)) for _ in range(2))
    assert torch.equal(first, again)
