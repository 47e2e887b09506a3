"""The DALI loader against the torch loader: same pictures, order, crops, and treatment of broken files."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mbv2.data import dali_loader
from mbv2.data.batch import Batch
from mbv2.data.dali_loader import DaliLoader, dali_available
from mbv2.data.jpeg_header import plain_jpeg_size
from mbv2.data.recipe import Recipe
from mbv2.data.sources import Sample, Source, open_source
from mbv2.data.torch_loader import TorchLoader
from mbv2.distributed import World
from mbv2.errors import UserError

pytest.importorskip("nvidia.dali", reason="DALI is not installed: pip install 'mbv2[dali]'")

# With this normalisation tensors are in pixel values, 0 to 255.
PIXELS = {"mean": (0.0, 0.0, 0.0), "std": (1 / 255, 1 / 255, 1 / 255)}
RECIPE = Recipe(resolution=64, **PIXELS)
# Of 255. Both resize across, then down, rounding to 8 bits each time; a rare rounding falls the other way.
MEAN_TOLERANCE = 0.15
# Chroma at a training window's edge: DALI decodes the window alone, torchvision the picture.
MAX_TOLERANCE = 12.0


def picture(seed: int, height: int, width: int, channels: int = 3) -> np.ndarray:
    """A smooth coloured picture with some grain; uint8 [H, W, 3] or [H, W]."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    values = np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)
    return values if channels == 3 else values[:, :, 0]


def encoded(image: Image.Image, format: str = "JPEG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def jpeg(seed: int, height: int = 90, width: int = 120) -> bytes:
    return encoded(Image.fromarray(picture(seed, height, width)), quality=92)


def source_of(folder: Path, files: list[bytes]) -> Source:
    """A source whose picture i has label i."""
    samples = []
    for i, data in enumerate(files):
        path = folder / f"picture_{i:03d}"
        path.write_bytes(data)
        samples.append(Sample(path.name, i, str(path)))
    return Source(samples, [f"class {i}" for i in range(len(files))])


def many(folder: Path, count: int) -> Source:
    return source_of(folder, [jpeg(i, 70 + 7 * (i % 5), 80 + 11 * (i % 4)) for i in range(count)])


def epoch_of(loader: DaliLoader | TorchLoader) -> list[Batch]:
    try:
        return list(loader)
    finally:
        loader.close()


def both(source: Source, recipe: Recipe, train: bool, batch_size: int = 4, **options: object) -> list[list[Batch]]:
    return [
        epoch_of(kind(source, recipe, train, batch_size, World(), workers=workers, **options))
        for kind, workers in ((DaliLoader, 2), (TorchLoader, 0))
    ]


def assert_close(mine: list[Batch], reference: list[Batch]) -> None:
    assert [b.names for b in mine] == [b.names for b in reference]
    assert [b.labels.tolist() for b in mine] == [b.labels.tolist() for b in reference]
    for a, b in zip(mine, reference, strict=True):
        difference = (a.images - b.images).abs()
        assert difference.mean() < MEAN_TOLERANCE
        assert difference.max() <= MAX_TOLERANCE


@pytest.mark.parametrize("train", [False, True])
def test_tensors_are_close_to_the_torch_loaders_on_real_pictures(shared_data: Path, train: bool) -> None:
    whole = open_source(shared_data / "eval" / "nips17_ccby_299", "val")
    source = Source(whole.samples[:24], whole.class_names)
    assert_close(*both(source, Recipe(resolution=160, **PIXELS), train, batch_size=8))


@pytest.mark.parametrize("train", [False, True])
def test_tensors_are_close_to_the_torch_loaders_on_odd_sizes(tmp_path: Path, train: bool) -> None:
    sizes = [(64, 64), (65, 301), (301, 65), (73, 74), (74, 73), (200, 133), (40, 50), (17, 90)]
    source = source_of(tmp_path, [jpeg(i, *size) for i, size in enumerate(sizes)])
    assert_close(*both(source, RECIPE, train))


@pytest.mark.parametrize("recipe", [{"trivial_augment": True}, {"random_erasing": 1.0}])
def test_trivial_augment_and_random_erasing_draw_as_the_torch_loader(tmp_path: Path, recipe: dict) -> None:
    mine, reference = both(many(tmp_path, 12), Recipe(resolution=64, **recipe), True, seed=5)
    for a, b in zip(mine, reference, strict=True):
        # Colour operations such as equalize magnify a difference of one pixel value, but only in few pixels.
        assert (a.images - b.images).abs().mean() < 0.05
        assert a.names == b.names


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_images_are_normalised_and_channels_last(tmp_path: Path, dtype: torch.dtype) -> None:
    mine, reference = both(many(tmp_path, 4), Recipe(resolution=64), False, dtype=dtype)
    images = mine[0].images
    assert images.dtype == dtype
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert images.shape == (4, 3, 64, 64)
    assert (images.float() - reference[0].images.float()).abs().mean() < 0.02


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 18])
def test_validation_sees_every_picture_exactly_once(tmp_path: Path, ranks: int) -> None:
    source = many(tmp_path, 17)
    seen = []
    for rank in range(ranks):
        loader = DaliLoader(source, RECIPE, False, 4, World(rank, rank, ranks), workers=1)
        batches = epoch_of(loader)
        assert len(batches) == len(loader)
        seen += [label for batch in batches for label in batch.labels.tolist()]
    assert sorted(seen) == list(range(17))


def test_training_over_two_ranks_follows_the_torch_loaders_order_with_repeats(tmp_path: Path) -> None:
    source = many(tmp_path, 13)
    for rank in range(2):
        orders = []
        for kind, workers in ((DaliLoader, 2), (TorchLoader, 0)):
            loader = kind(source, RECIPE, True, 3, World(rank, rank, 2), workers=workers, seed=7, repeat=2)
            loader.set_epoch(3)
            assert len(loader) == 4
            orders.append([batch.labels.tolist() for batch in epoch_of(loader)])
        assert orders[0] == orders[1]
        assert len(orders[0]) == 4


def test_resuming_mid_epoch_gives_the_same_batches(tmp_path: Path) -> None:
    source = many(tmp_path, 20)
    loader = DaliLoader(source, RECIPE, True, 3, World(), workers=2, seed=1)
    loader.set_epoch(2)
    whole = list(loader)
    loader.set_epoch(2, start_batch=4)
    rest = epoch_of(loader)
    assert len(whole) == 6
    assert len(rest) == 2
    for a, b in zip(whole[4:], rest, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)


def test_an_epoch_left_early_does_not_leak_into_the_next(tmp_path: Path) -> None:
    source = many(tmp_path, 20)
    loader = DaliLoader(source, RECIPE, True, 3, World(), workers=2)
    whole = list(loader)
    for batch in loader:
        assert torch.equal(batch.images, whole[0].images)
        break
    again = epoch_of(loader)
    assert [b.labels.tolist() for b in again] == [b.labels.tolist() for b in whole]


def test_a_closed_loader_can_be_iterated_again(tmp_path: Path) -> None:
    loader = DaliLoader(many(tmp_path, 5), RECIPE, False, 2, World(), workers=2)
    assert [batch.names for batch in epoch_of(loader)] == [batch.names for batch in epoch_of(loader)]


def test_a_gpu_that_dali_cannot_use_is_one_clear_error(tmp_path: Path) -> None:
    loader = DaliLoader(many(tmp_path, 2), RECIPE, False, 2, World(device=torch.device("cuda", 99)), workers=1)
    with pytest.raises(UserError, match="DALI cannot start on cuda:99 .*--loader torch"):
        list(loader)
    loader.close()


def test_batches_stay_intact_while_later_ones_are_made(tmp_path: Path) -> None:
    loader = DaliLoader(many(tmp_path, 24), RECIPE, False, 2, World(), workers=2)
    kept, sums = [], []
    for batch in loader:
        kept.append(batch.images)
        sums.append(batch.images.double().sum().item())
    loader.close()
    assert [images.double().sum().item() for images in kept] == sums
    assert len(set(sums)) == 12


def odd_picture(kind: str) -> bytes:
    rgb = Image.fromarray(picture(1, 90, 120))
    gray = picture(1, 90, 120, channels=1)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees, if anyone asks
    makers: dict[str, Callable[[], bytes]] = {
        "cmyk jpeg": lambda: encoded(rgb.convert("CMYK"), quality=92),
        "gray jpeg": lambda: encoded(Image.fromarray(gray), quality=92),
        "progressive jpeg": lambda: encoded(rgb, quality=92, progressive=True),
        "turned jpeg": lambda: encoded(rgb, quality=92, exif=exif),
        "rgb jpeg": lambda: encoded(rgb, quality=92, keep_rgb=True),
        "jpeg with a tail": lambda: encoded(rgb, quality=92) + b"\0" * 100,
        "png": lambda: encoded(rgb, "PNG"),
        "alpha png": lambda: encoded(rgb.convert("RGBA"), "PNG"),
        "palette png": lambda: encoded(rgb.convert("P"), "PNG"),
        "16-bit png": lambda: encoded(Image.fromarray(gray.astype(np.uint16) * 257), "PNG"),
        "animated gif": lambda: encoded(
            rgb, "GIF", save_all=True, append_images=[Image.fromarray(picture(2, 90, 120))]
        ),
        "webp": lambda: encoded(rgb, "WEBP"),
        "bmp": lambda: encoded(rgb, "BMP"),
    }
    return makers[kind]()


@pytest.mark.parametrize("train", [False, True])
def test_pictures_of_every_kind_are_read_as_by_the_torch_loader(tmp_path: Path, train: bool) -> None:
    kinds = "cmyk jpeg,gray jpeg,progressive jpeg,turned jpeg,rgb jpeg,jpeg with a tail,png,alpha png,palette png"
    files = [odd_picture(kind) for kind in (kinds + ",16-bit png,animated gif,webp,bmp").split(",")]
    assert_close(*both(source_of(tmp_path, files), RECIPE, train, batch_size=1))


WHOLE = jpeg(3)
SCAN = WHOLE.index(b"\xff\xda")
BROKEN = {
    "zero bytes": b"",
    "no picture": b"this is text, not a picture",
    "truncated jpeg": WHOLE[:1500],
    "header alone": WHOLE[:200],
    "truncated png": encoded(Image.fromarray(picture(3, 90, 120)), "PNG")[:3000],
    # These two have a whole header and an end; DALI itself has to find that what is between makes no picture.
    "no scan": WHOLE[:SCAN] + b"\xff\xd9",
    "broken scan header": WHOLE[: SCAN + 4] + b"\x77" * 6 + WHOLE[SCAN + 10 :],
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_picture_fails_with_its_name(tmp_path: Path, kind: str) -> None:
    files = [jpeg(i) for i in range(8)]
    files[5] = BROKEN[kind]
    loader = DaliLoader(source_of(tmp_path, files), RECIPE, False, 2, World(), workers=2)
    delivered = []
    with pytest.raises(UserError, match=r"picture_005.*--on_corrupt skip"):
        delivered.extend(batch.labels.tolist() for batch in loader)
    assert delivered == [[0, 1], [2, 3]]
    loader.close()


@pytest.mark.parametrize("train", [False, True])
def test_broken_pictures_are_skipped_as_by_the_torch_loader(tmp_path: Path, train: bool) -> None:
    files = [jpeg(i) for i in range(16)]
    for place, data in zip((0, 4, 5, 6, 7, 9, 15), BROKEN.values(), strict=True):
        files[place] = data
    source = source_of(tmp_path, files)
    mine = DaliLoader(source, RECIPE, train, 4, World(), workers=2, on_corrupt="skip")
    reference = TorchLoader(source, RECIPE, train, 4, World(), workers=0, on_corrupt="skip")
    assert_close(list(mine), list(reference))
    assert mine.skipped == reference.skipped > 0
    again = epoch_of(mine)
    assert mine.skipped == reference.skipped
    assert len(again) == (len(mine) if train else len(mine) - 1)
    reference.close()


DAMAGED = {
    "noise in the scan": WHOLE[:1500] + bytes(range(100)) + WHOLE[1600:],
    "scan cut short": WHOLE[:1500] + b"\xff\xd9",
    "nothing in the scan": WHOLE[: SCAN + 14] + b"\xff\xd9",
    "end marker inside": WHOLE[:1500] + b"\xff\xd9" + WHOLE[1502:],
}


@pytest.mark.parametrize("train", [False, True])
def test_damage_that_the_torch_loader_takes_is_taken_alike(tmp_path: Path, train: bool) -> None:
    source = source_of(tmp_path, [*DAMAGED.values(), jpeg(1)])
    assert_close(*both(source, RECIPE, train, batch_size=5))


def test_a_picture_only_dali_refuses_is_decoded_by_the_other_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A text file that passes the header check stands for a JPEG with whatever defect DALI alone minds.
    files = [jpeg(i) for i in range(10)]
    files[3] = files[8] = b"not a picture at all"
    monkeypatch.setattr(
        dali_loader, "plain_jpeg_size", lambda data: (90, 120) if data[:3] == b"not" else plain_jpeg_size(data)
    )
    source = source_of(tmp_path, files)
    loader = DaliLoader(source, RECIPE, False, 2, World(), workers=2, on_corrupt="skip")
    batches = epoch_of(loader)
    assert [batch.labels.tolist() for batch in batches] == [[0, 1], [2], [4, 5], [6, 7], [9]]
    assert loader.skipped == 2
    loader = DaliLoader(source, RECIPE, False, 2, World(), workers=2)
    with pytest.raises(UserError, match="picture_003"):
        list(loader)
    loader.close()


def test_only_broken_pictures_is_an_error_in_training(tmp_path: Path) -> None:
    loader = DaliLoader(source_of(tmp_path, [b""] * 4), RECIPE, True, 2, World(), workers=1, on_corrupt="skip")
    with pytest.raises(UserError, match="4 pictures in a row"):
        list(loader)
    loader.close()


def test_the_header_check_reads_the_size_and_passes_on_what_is_unusual() -> None:
    assert plain_jpeg_size(jpeg(0, 37, 53)) == (37, 53)
    assert plain_jpeg_size(odd_picture("gray jpeg")) == (90, 120)
    assert plain_jpeg_size(odd_picture("progressive jpeg")) == (90, 120)
    for kind in ("cmyk jpeg", "rgb jpeg", "png", "animated gif"):
        assert plain_jpeg_size(odd_picture(kind)) is None
    whole = jpeg(0)
    assert all(plain_jpeg_size(whole[:cut]) is None for cut in range(0, len(whole) - 1, 7))


def test_without_dali_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert dali_available()
    monkeypatch.setattr(dali_loader.importlib.util, "find_spec", lambda name: None)
    assert not dali_available()
    with pytest.raises(UserError, match=r"pip install 'mbv2\[dali\]'"):
        DaliLoader(many(tmp_path, 2), RECIPE, False, 2, World())
