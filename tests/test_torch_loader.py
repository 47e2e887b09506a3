"""The torch loader: order, augmentation, resuming, broken pictures and worker processes."""

import io
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from mbv2.data.batch import Batch
from mbv2.data.decode import decode
from mbv2.data.recipe import Recipe, sample_generator
from mbv2.data.sources import Sample, Source, open_source
from mbv2.data.torch_loader import TorchLoader, augment, eval_picture, train_picture
from mbv2.distributed import World
from mbv2.errors import UserError

RECIPE = Recipe(resolution=32)
AUGMENTED = Recipe(resolution=32, trivial_augment=True, random_erasing=0.5)
BROKEN = (b"", b"text", b"\xff\xd8\xff\xe0 no jpeg")


def picture(seed: int, height: int = 48, width: int = 64) -> bytes:
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def source_of(folder: Path, files: list[bytes]) -> Source:
    """A source whose picture i has label i."""
    samples = []
    for i, data in enumerate(files):
        path = folder / f"picture_{i:03d}.jpg"
        path.write_bytes(data)
        samples.append(Sample(path.name, i, str(path)))
    return Source(samples, [f"class {i}" for i in range(len(files))])


def many(folder: Path, count: int) -> Source:
    return source_of(folder, [picture(i) for i in range(count)])


def epoch_of(loader: TorchLoader) -> list[Batch]:
    try:
        return list(loader)
    finally:
        loader.close()


def labels(batches: list[Batch]) -> list[list[int]]:
    return [batch.labels.tolist() for batch in batches]


def assert_same(mine: list[Batch], others: list[Batch]) -> None:
    assert labels(mine) == labels(others)
    assert [batch.names for batch in mine] == [batch.names for batch in others]
    for a, b in zip(mine, others, strict=True):
        assert torch.equal(a.images, b.images)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two worker processes also where there is one core."""
    monkeypatch.setattr("mbv2.data.torch_loader.usable_cores", lambda: 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_batches_are_normalised_and_channels_last(tmp_path: Path, dtype: torch.dtype) -> None:
    source = many(tmp_path, 3)
    (batch,) = epoch_of(TorchLoader(source, RECIPE, False, 4, World(), workers=0, dtype=dtype))
    assert batch.images.shape == (3, 3, 32, 32)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [0, 1, 2]
    assert batch.names == ["picture_000.jpg", "picture_001.jpg", "picture_002.jpg"]
    pixels = eval_picture(decode(source.read(source.samples[1]), ""), RECIPE)
    expected = v2.functional.normalize(pixels / 255, list(RECIPE.mean), list(RECIPE.std))
    assert (batch.images[1].float() - expected).abs().max() < (1e-5 if dtype == torch.float32 else 2e-3)


@pytest.mark.parametrize("size", [(48, 64), (64, 48), (37, 37), (20, 90), (300, 211)])
def test_evaluation_is_torchvisions_resize_and_centre_crop(size: tuple[int, int]) -> None:
    image = torch.randint(256, (3, *size), dtype=torch.uint8)
    stock = v2.Compose([v2.Resize(37, antialias=True), v2.CenterCrop(32)])
    assert torch.equal(eval_picture(image, RECIPE), stock(image))


@pytest.mark.parametrize("size", [(1, 60_000), (60_000, 1), (3, 40_000)])
def test_a_line_of_pixels_is_evaluated_in_little_memory(size: tuple[int, int]) -> None:
    image = torch.full((3, *size), 7, dtype=torch.uint8)
    assert torch.equal(eval_picture(image, Recipe()), torch.full((3, 224, 224), 7, dtype=torch.uint8))


def test_training_without_randomness_left_is_a_plain_resize() -> None:
    image = torch.randint(256, (3, 48, 48), dtype=torch.uint8)
    recipe = Recipe(resolution=32, area=(1.0, 1.0), ratio=(1.0, 1.0), flip=1.0)
    mine = train_picture(image, recipe, sample_generator(0, 0, 0))
    assert torch.equal(mine, v2.functional.resize(image, [32, 32], antialias=True).flip(2))


def test_the_recipes_share_of_pictures_is_flipped() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    image[:, :, :8] = 255
    recipe = Recipe(resolution=32, area=(1.0, 1.0), ratio=(1.0, 1.0), flip=0.25)
    flipped = sum(train_picture(image, recipe, sample_generator(0, 0, i))[0, 0, 31].item() == 255 for i in range(400))
    assert 70 < flipped < 130


def test_random_erasing_leaves_the_mean() -> None:
    image = torch.zeros(3, 32, 32, dtype=torch.uint8)
    erased = augment(image, Recipe(resolution=32, random_erasing=1.0), seed=3)
    found = {tuple(value) for value in erased.flatten(1).T.tolist()}
    assert found == {(0, 0, 0), (124, 116, 104)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 18])
def test_validation_sees_every_picture_exactly_once(tmp_path: Path, ranks: int) -> None:
    source = many(tmp_path, 17)
    seen = []
    for rank in range(ranks):
        loader = TorchLoader(source, RECIPE, False, 4, World(rank, rank, ranks), workers=0)
        batches = epoch_of(loader)
        assert len(batches) == len(loader)
        seen += [label for batch in batches for label in batch.labels.tolist()]
    assert sorted(seen) == list(range(17))


def test_two_ranks_see_in_each_step_what_one_sees_with_the_joint_batch(tmp_path: Path) -> None:
    source = many(tmp_path, 15)
    first, second = (
        epoch_of(TorchLoader(source, AUGMENTED, True, 3, World(rank, rank, 2), workers=0)) for rank in range(2)
    )
    joint = epoch_of(TorchLoader(source, AUGMENTED, True, 6, World(), workers=0))
    assert len(first) == len(second) == len(joint) == 2
    for a, b, both in zip(first, second, joint, strict=True):
        assert torch.equal(torch.cat([a.images, b.images]), both.images)
        assert a.names + b.names == both.names


def test_batches_do_not_depend_on_the_number_of_workers(tmp_path: Path, two_cores: None) -> None:
    source = many(tmp_path, 14)
    alone, one, two = (
        epoch_of(TorchLoader(source, AUGMENTED, True, 3, World(), workers=workers, seed=4)) for workers in (0, 1, 2)
    )
    assert len(alone) == 4
    assert_same(alone, one)
    assert_same(alone, two)


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_mid_epoch_gives_the_same_batches(tmp_path: Path, two_cores: None, workers: int) -> None:
    source = many(tmp_path, 20)
    loader = TorchLoader(source, AUGMENTED, True, 3, World(), workers=workers, seed=1)
    loader.set_epoch(1)
    list(loader)
    loader.set_epoch(2)
    whole = epoch_of(loader)
    resumed = TorchLoader(source, AUGMENTED, True, 3, World(), workers=workers, seed=1)
    resumed.set_epoch(2, start_batch=4)
    assert len(resumed) == len(whole) == 6
    assert_same(whole[4:], epoch_of(resumed))


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_in_order_and_augmentation(tmp_path: Path, two_cores: None, workers: int) -> None:
    loader = TorchLoader(many(tmp_path, 8), RECIPE, True, 8, World(), workers=workers)
    (first,) = list(loader)
    loader.set_epoch(1)
    (second,) = epoch_of(loader)
    assert first.names != second.names
    places = [second.names.index(name) for name in first.names]
    assert not any(torch.equal(a, b) for a, b in zip(first.images, second.images[places], strict=True))


def test_repeats_of_a_picture_within_an_epoch_are_augmented_differently(tmp_path: Path) -> None:
    loader = TorchLoader(many(tmp_path, 4), RECIPE, True, 4, World(), workers=0, repeat=2)
    first, second = epoch_of(loader)
    assert sorted(first.names) == sorted(second.names)
    places = [second.names.index(name) for name in first.names]
    assert not any(torch.equal(a, b) for a, b in zip(first.images, second.images[places], strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_left_early_does_not_leak_into_the_next(tmp_path: Path, two_cores: None, workers: int) -> None:
    loader = TorchLoader(many(tmp_path, 20), RECIPE, True, 3, World(), workers=workers)
    whole = list(loader)
    for batch in loader:
        assert torch.equal(batch.images, whole[0].images)
        break
    assert_same(whole, epoch_of(loader))


@pytest.mark.parametrize("workers", [0, 2])
def test_loading_leaves_trainings_random_numbers_alone(tmp_path: Path, two_cores: None, workers: int) -> None:
    loader = TorchLoader(many(tmp_path, 6), AUGMENTED, True, 3, World(), workers=workers)
    before = torch.get_rng_state()
    assert len(epoch_of(loader)) == 2
    assert torch.equal(before, torch.get_rng_state())


def test_a_closed_loader_can_be_iterated_again(tmp_path: Path, two_cores: None) -> None:
    loader = TorchLoader(many(tmp_path, 5), RECIPE, False, 2, World(), workers=2)
    assert_same(epoch_of(loader), epoch_of(loader))


def test_augmentation_does_not_touch_the_gpus_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    augment(torch.zeros(3, 32, 32, dtype=torch.uint8), AUGMENTED, seed=1)
    assert seeded == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_a_broken_picture_fails_with_its_name(tmp_path: Path, two_cores: None, train: bool, workers: int) -> None:
    files = [picture(i) for i in range(8)]
    files[5] = picture(5)[:900]
    loader = TorchLoader(source_of(tmp_path, files), RECIPE, train, 2, World(), workers=workers)
    with pytest.raises(UserError, match=r"^picture_005\.jpg: truncated JPEG.*--on_corrupt skip$"):
        list(loader)
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_leaves_broken_pictures_out_and_counts_them(tmp_path: Path, two_cores: None, workers: int) -> None:
    files = [picture(i) for i in range(9)]
    files[0], files[1], files[5] = BROKEN
    loader = TorchLoader(source_of(tmp_path, files), RECIPE, False, 2, World(), workers=workers, on_corrupt="skip")
    for _ in range(2):
        assert labels(list(loader)) == [[2, 3], [4], [6, 7], [8]]
        assert loader.skipped == 3
    loader.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_training_puts_good_pictures_with_their_own_labels_in_place_of_broken_ones(
    tmp_path: Path, two_cores: None, workers: int
) -> None:
    files = [picture(i) for i in range(9)]
    files[3], files[4], files[8] = BROKEN
    source = source_of(tmp_path, files)
    plain = Recipe(resolution=32, area=(1.0, 1.0), ratio=(64 / 48, 64 / 48), flip=0.0)
    pixels = Recipe(resolution=32, area=plain.area, ratio=plain.ratio, flip=0.0, mean=(0, 0, 0), std=(1 / 255,) * 3)
    loader = TorchLoader(source, pixels, True, 3, World(), workers=workers, on_corrupt="skip")
    batches = epoch_of(loader)
    assert len(batches) == len(loader) == 3
    assert loader.skipped == 4  # 3 by way of 4 to 5, 4 to 5, 8 to 0
    assert sorted(label for batch in labels(batches) for label in batch) == [0, 0, 1, 2, 5, 5, 5, 6, 7]
    for batch in batches:
        for image, label, name in zip(batch.images, batch.labels.tolist(), batch.names, strict=True):
            assert name == f"picture_{label:03d}.jpg"
            expected = train_picture(decode(files[label], name), plain, sample_generator(0, 0, label))
            assert (image - expected).abs().max() < 1e-3


def test_every_rank_has_as_many_batches_when_pictures_are_broken(tmp_path: Path) -> None:
    files = [picture(i) for i in range(6)] + [b""] * 7
    source = source_of(tmp_path, files)
    counts, skipped = [], 0
    for rank in range(3):
        loader = TorchLoader(source, RECIPE, True, 2, World(rank, rank, 3), workers=0, on_corrupt="skip")
        counts.append([len(batch.names) for batch in epoch_of(loader)])
        skipped += loader.skipped
    assert counts == [[2, 2]] * 3
    assert skipped > 0


def test_nothing_but_broken_pictures_is_an_error_in_training(tmp_path: Path) -> None:
    loader = TorchLoader(source_of(tmp_path, [b""] * 4), RECIPE, True, 2, World(), workers=0, on_corrupt="skip")
    with pytest.raises(UserError, match="4 pictures in a row cannot be decoded"):
        list(loader)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_vanished_picture_is_an_error_with_its_name(tmp_path: Path, two_cores: None, workers: int) -> None:
    source = many(tmp_path, 4)
    Path(source.samples[2].path).unlink()
    loader = TorchLoader(source, RECIPE, False, 2, World(), workers=workers)
    with pytest.raises(UserError, match=r"^picture_002\.jpg: cannot be read"):
        list(loader)
    loader.close()


def worker_ids(loader: TorchLoader) -> list[int]:
    return [worker.pid for worker in loader._loader._iterator._workers]


def test_workers_are_kept_over_epochs_and_ended_by_close(tmp_path: Path, two_cores: None) -> None:
    loader = TorchLoader(many(tmp_path, 8), RECIPE, True, 2, World(), workers=2)
    list(loader)
    first = worker_ids(loader)
    loader.set_epoch(1)
    list(loader)
    assert worker_ids(loader) == first
    loader.close()
    for process in first:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


class KillsItsReader(Source):
    """Its first picture takes the process that reads it along, as the kernel does when memory runs out."""

    def read(self, sample: Sample) -> bytes:
        if sample.label == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().read(sample)


def test_a_killed_worker_is_an_error_that_says_so(tmp_path: Path, two_cores: None) -> None:
    whole = many(tmp_path, 8)
    loader = TorchLoader(KillsItsReader(whole.samples, whole.class_names), RECIPE, False, 2, World(), workers=2)
    with pytest.raises(UserError, match="a loader process died .*--num_parallel_workers"):
        list(loader)
    loader.close()


def test_workers_are_out_of_reach_of_signals_to_the_process_group(tmp_path: Path, two_cores: None) -> None:
    loader = TorchLoader(many(tmp_path, 8), RECIPE, True, 2, World(), workers=2)
    list(loader)
    assert os.getpgid(0) not in {os.getpgid(process) for process in worker_ids(loader)}
    loader.close()


def test_real_pictures_are_prepared_as_by_stock_torchvision(shared_data: Path) -> None:
    whole = open_source(shared_data / "eval" / "nips17_ccby_299", "val")
    source = Source(whole.samples[:8], whole.class_names, whole.synsets)
    (batch,) = epoch_of(TorchLoader(source, Recipe(), False, 8, World(), workers=0))
    stock = v2.Compose(
        [
            v2.Resize(256, antialias=True),
            v2.CenterCrop(224),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.stack([stock(decode(source.read(sample), sample.name)) for sample in source.samples])
    assert (batch.images - expected).abs().max() < 1e-5
