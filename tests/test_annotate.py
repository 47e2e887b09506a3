"""Annotated copies: legible whatever the size, and nothing overwritten."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mbv2.annotate import annotate, save_fresh
from mbv2.errors import UserError

PREDICTIONS = [("Persian cat", 0.912), ("tabby", 0.05)]


def _band(annotated: Image.Image, picture_height: int) -> np.ndarray:
    return np.asarray(annotated)[picture_height:]


@pytest.mark.parametrize("size", [(8, 8), (32, 20), (40, 600), (300, 200), (1600, 300)])
def test_the_band_holds_whole_bright_letters_at_any_size(size: tuple[int, int]) -> None:
    annotated = annotate(Image.new("RGB", size, (128, 0, 0)), PREDICTIONS[:1])
    is_band = ~(np.asarray(annotated)[:, annotated.width // 2] == (128, 0, 0)).all(axis=1)
    band = np.asarray(annotated)[is_band]
    rows = np.flatnonzero((band.min(axis=2) > 200).any(axis=1))
    assert rows[-1] - rows[0] + 1 >= 9  # letters with an ascender and a descender, in pixels
    assert rows[0] > 0
    assert rows[-1] < len(band) - 1


def test_the_picture_itself_is_whole_and_unchanged() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    annotated = annotate(image, PREDICTIONS)
    assert annotated.height > 200
    assert np.array_equal(np.asarray(annotated)[:200], pixels)
    assert np.array_equal(np.asarray(image), pixels)


def test_every_prediction_makes_the_band_taller_by_one_line() -> None:
    heights = [annotate(Image.new("RGB", (300, 200)), PREDICTIONS[:1] * lines).height for lines in (1, 2, 3)]
    assert heights[1] - heights[0] == heights[2] - heights[1] > 0


def test_a_name_too_long_leaves_the_margin_and_the_percentage_free() -> None:
    image = Image.new("RGB", (300, 200))
    long = _band(annotate(image, [("W" * 200, 0.5)]), 200)
    short = _band(annotate(image, [("W", 0.5)]), 200)
    assert long.shape == short.shape
    assert np.array_equal(long[:, 255:], short[:, 255:])


def test_a_huge_picture_is_shrunk_to_what_jpeg_can_hold(tmp_path: Path) -> None:
    annotated = annotate(Image.new("L", (70000, 4)), PREDICTIONS)
    assert annotated.width == 4096
    assert save_fresh(annotated, tmp_path, "wide.jpg").stat().st_size > 0


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_any_mode_becomes_rgb(mode: str) -> None:
    assert annotate(Image.new(mode, (200, 200)), PREDICTIONS).mode == "RGB"


def test_files_that_are_there_are_kept(tmp_path: Path) -> None:
    (tmp_path / "cat.jpg").write_bytes(b"mine")
    image = Image.new("RGB", (20, 20))
    names = [save_fresh(image, tmp_path, name).name for name in ("cat.jpg", "cat.JPEG", "cat.png", "a/cat.gif")]
    assert names == ["cat-1.jpg", "cat-2.jpg", "cat.png", "a_cat.jpg"]
    assert (tmp_path / "cat.jpg").read_bytes() == b"mine"
    for name, kind in (("cat.png", "PNG"), ("a_cat.jpg", "JPEG")):
        with Image.open(tmp_path / name) as written:
            assert written.format == kind


def test_a_folder_that_is_gone_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--output .*cannot be written"):
        save_fresh(Image.new("RGB", (20, 20)), tmp_path / "gone", "cat.jpg")
