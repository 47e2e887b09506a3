import pytest
import torch

from mbv2.train.batch_augment import BatchAugment

IMAGES = torch.arange(4 * 3 * 8 * 8, dtype=torch.float32).view(4, 3, 8, 8).contiguous(memory_format=torch.channels_last)
LABELS = torch.tensor([0, 1, 2, 3])


def mixed(mixup=0.0, cutmix=0.0, seed=0, epoch=0, batch=0, rank=0):
    return BatchAugment(5, mixup, cutmix, seed, rank)(IMAGES, LABELS, epoch, batch)


def test_off_it_changes_nothing():
    images, targets = mixed()
    assert images is IMAGES
    assert targets is LABELS


@pytest.mark.parametrize("kind", [{"mixup": 0.5}, {"cutmix": 1.0}])
def test_targets_are_the_shares_of_two_labels(kind):
    _, targets = mixed(**kind)
    assert targets.shape == (4, 5)
    torch.testing.assert_close(targets.sum(1), torch.ones(4))
    shares = targets[range(4), LABELS]
    torch.testing.assert_close(targets[range(4), LABELS.roll(1)], 1 - shares)


def test_mixup_mixes_pictures_by_the_targets_shares():
    images, targets = mixed(mixup=0.5)
    share = targets[0, 0]
    torch.testing.assert_close(images, IMAGES * share + IMAGES.roll(1, 0) * (1 - share))


def test_the_result_is_channels_last():
    assert mixed(cutmix=1.0)[0].is_contiguous(memory_format=torch.channels_last)


def test_the_draw_depends_on_seed_epoch_batch_and_rank_alone():
    first = mixed(mixup=0.5)[1]
    torch.manual_seed(123)
    assert torch.equal(first, mixed(mixup=0.5)[1])
    for change in ({"seed": 1}, {"epoch": 1}, {"batch": 1}, {"rank": 1}):
        assert not torch.equal(first, mixed(mixup=0.5, **change)[1])


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    mixed(mixup=0.5)
    assert torch.equal(before, torch.get_rng_state())


def test_with_both_some_batches_are_mixed_and_some_are_cut():
    def is_cut(batch: int) -> bool:
        images = mixed(mixup=1.0, cutmix=1.0, batch=batch)[0]
        return bool(((images == IMAGES) | (images == IMAGES.roll(1, 0))).all())

    assert {is_cut(batch) for batch in range(12)} == {True, False}
