import itertools
import math

import pytest

from mbv2.train.schedule import Schedule


def rates(mode: str, steps: int = 12, **changes) -> list[float]:
    settings = {"steps_per_epoch": 2, "max_lr": 1.0, "min_lr": 0.1, "decay_epoch": 6} | changes
    schedule = Schedule(mode, **settings)
    return [schedule.lr(step) for step in range(steps)]


def test_cosine_goes_from_highest_to_lowest_and_stays():
    found = rates("cosine_decay_lr", 20)
    assert found[0] == 1.0
    assert found[6] == pytest.approx(0.55)
    assert found[3] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    assert found[12:] == [pytest.approx(0.1)] * 8


def test_exponential_falls_by_a_constant_factor():
    found = rates("exponential", 14)
    assert all(b / a == pytest.approx(0.1 ** (1 / 12)) for a, b in itertools.pairwise(found[:13]))
    assert found[13] == pytest.approx(0.1)


def test_step_takes_a_tenth_at_each_third():
    assert rates("step", 13, min_lr=0.0) == pytest.approx([1.0] * 4 + [0.1] * 4 + [0.01] * 5)


def test_step_does_not_fall_below_the_lowest():
    assert min(rates("step", 30, min_lr=0.05)) == 0.05


def test_milestones_end_their_learning_rates():
    found = rates("milestone", 12, milestone=[1, 3], learning_rates=[0.5, 0.2])
    assert found == [0.5] * 2 + [0.2] * 10


@pytest.mark.parametrize("mode", ["cosine_decay_lr", "exponential", "step"])
def test_warm_up_rises_linearly_to_the_highest(mode):
    found = rates(mode, warmup_epochs=2)
    assert found[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert max(found) == pytest.approx(1.0)


def test_warm_up_may_be_part_of_an_epoch():
    found = rates("cosine_decay_lr", steps_per_epoch=10, warmup_epochs=0.3)
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="linear"):
        rates("linear")
