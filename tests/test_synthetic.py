"""Synthetic batches."""

import torch

from mbv2.data.recipe import Recipe
from mbv2.data.synthetic import SyntheticLoader
from mbv2.distributed import World


def test_batches_have_the_asked_for_shape_type_and_layout() -> None:
    loader = SyntheticLoader(Recipe(resolution=32), 4, World(), num_classes=7, length=26, dtype=torch.bfloat16)
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    for batch in batches:
        assert batch.images.shape == (4, 3, 32, 32)
        assert batch.images.dtype == torch.bfloat16
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert batch.labels.dtype == torch.int64
        assert 0 <= batch.labels.min() <= batch.labels.max() < 7
        assert len(batch.names) == 4


def test_resuming_mid_epoch_gives_the_same_batches() -> None:
    loader = SyntheticLoader(Recipe(resolution=32), 2, World(), num_classes=7, length=14)
    whole = list(loader)
    loader.set_epoch(0, start_batch=5)
    rest = list(loader)
    assert len(rest) == 2
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[5:], rest, strict=True))


def test_ranks_see_different_pictures() -> None:
    first, second = (SyntheticLoader(Recipe(resolution=32), 2, World(rank, rank, 2), 7, 8) for rank in range(2))
    assert len(first) == len(second) == 2
    assert not torch.equal(next(iter(first)).images, next(iter(second)).images)


def test_a_length_below_one_batch_is_one_batch() -> None:
    assert len(list(SyntheticLoader(Recipe(resolution=32), 8, World(), 7, length=3))) == 1
