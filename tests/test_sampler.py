"""The order of pictures over epochs and ranks."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mbv2.data.sampler import batches_per_epoch, train_batches, train_order, val_batches

COUNTS = st.integers(1, 200)
BATCHES = st.integers(1, 17)
WORLDS = st.integers(1, 9)
REPEATS = st.integers(1, 3)


@given(n=COUNTS, batch=BATCHES, world=WORLDS)
def test_validation_counts_every_index_exactly_once(n: int, batch: int, world: int) -> None:
    seen = [i for rank in range(world) for part in val_batches(n, batch, rank, world) for i in part]
    assert sorted(seen) == list(range(n))


@given(n=COUNTS, batch=BATCHES, world=WORLDS)
def test_validation_batches_are_full_but_for_the_last(n: int, batch: int, world: int) -> None:
    for rank in range(world):
        parts = val_batches(n, batch, rank, world)
        assert all(len(part) == batch for part in parts[:-1])
        assert all(0 < len(part) <= batch for part in parts)


@given(n=COUNTS, batch=BATCHES, world=WORLDS, epoch=st.integers(0, 5), repeat=REPEATS)
def test_training_gives_every_rank_the_same_number_of_full_batches(
    n: int, batch: int, world: int, epoch: int, repeat: int
) -> None:
    steps = batches_per_epoch(n, batch, world, repeat)
    for rank in range(world):
        parts = train_batches(n, batch, rank, world, epoch, 0, repeat)
        assert len(parts) == steps
        assert all(len(part) == batch for part in parts)


@given(n=COUNTS, batch=BATCHES, world=WORLDS, repeat=REPEATS)
def test_training_drops_less_than_one_step_and_repeats_nothing(n: int, batch: int, world: int, repeat: int) -> None:
    seen = [i for rank in range(world) for part in train_batches(n, batch, rank, world, 1, 2, repeat) for i in part]
    assert len(set(seen)) == len(seen)
    assert set(seen) <= set(range(n * repeat))
    assert n * repeat - len(seen) < batch * world


@given(n=COUNTS, batch=BATCHES, world=WORLDS, repeat=REPEATS)
def test_each_step_is_that_of_one_rank_with_the_joint_batch(n: int, batch: int, world: int, repeat: int) -> None:
    ranks = [train_batches(n, batch, rank, world, 4, 9, repeat) for rank in range(world)]
    joint = train_batches(n, batch * world, 0, 1, 4, 9, repeat)
    assert [[i for part in parts for i in part] for parts in zip(*ranks, strict=True)] == joint


def test_repeats_go_through_every_picture_as_often_in_different_orders() -> None:
    parts = train_batches(12, 4, 0, 1, 0, 0, repeat=3)
    turns = [[i % 12 for part in parts[at : at + 3] for i in part] for at in (0, 3, 6)]
    assert all(Counter(turn) == Counter(range(12)) for turn in turns)
    assert turns[0] != turns[1] != turns[2]


@pytest.mark.parametrize("other", [{"epoch": 1, "seed": 0}, {"epoch": 0, "seed": 1}])
def test_the_order_differs_between_epochs_and_seeds(other: dict) -> None:
    assert train_order(50, 0, 0).tolist() != train_order(50, **other).tolist()


def test_the_order_is_the_same_every_time() -> None:
    assert train_order(50, 3, 7).tolist() == train_order(50, 3, 7).tolist()
