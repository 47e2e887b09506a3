"""The learning rate of every optimizer step, as a pure function of the step: nothing to save, nothing to drift."""

import math
from bisect import bisect_right
from collections.abc import Sequence


class Schedule:
    """Linear warm-up, then decay; beyond `decay_epoch` the learning rate stays where it ended.

    Args:
        mode: "cosine_decay_lr" (max_lr to min_lr), "exponential" (max_lr to min_lr by a constant factor, min_lr > 0),
            "step" (a tenth at each third of the decay, not below min_lr), or "milestone" (`learning_rates[i]`
            until epoch `milestone[i]`, the last one ever after).
        steps_per_epoch: optimizer steps.
        max_lr, min_lr: highest and lowest learning rate.
        decay_epoch: epochs from the start, warm-up included, to the end of the decay.
        warmup_epochs: epochs in which the learning rate rises to its first value; may be a fraction.
        milestone, learning_rates: for "milestone".

    Raises:
        ValueError: unknown mode.
    """

    def __init__(
        self,
        mode: str,
        steps_per_epoch: int,
        max_lr: float,
        min_lr: float,
        decay_epoch: int,
        warmup_epochs: float = 0,
        milestone: Sequence[int] = (),
        learning_rates: Sequence[float] = (),
    ) -> None:
        if mode not in ("cosine_decay_lr", "step", "exponential", "milestone"):
            raise ValueError(f"unknown decay mode {mode!r}")
        self.mode = mode
        self.max_lr, self.min_lr = max_lr, min_lr
        self.steps_per_epoch = steps_per_epoch
        self.warmup_steps = round(warmup_epochs * steps_per_epoch)
        self.decay_steps = decay_epoch * steps_per_epoch
        self.milestone, self.learning_rates = list(milestone), list(learning_rates)

    def lr(self, step: int) -> float:
        """The learning rate of optimizer step `step`, counted from 0 over the whole run."""
        if step < self.warmup_steps:
            return self._after_warmup(self.warmup_steps) * (step + 1) / self.warmup_steps
        return self._after_warmup(step)

    def _after_warmup(self, step: int) -> float:
        if self.mode == "milestone":
            index = bisect_right(self.milestone, step / self.steps_per_epoch)
            return self.learning_rates[min(index, len(self.learning_rates) - 1)]
        after, span = step - self.warmup_steps, max(1, self.decay_steps - self.warmup_steps)
        if self.mode == "step":
            return max(self.min_lr, self.max_lr * 0.1 ** min(2, 3 * after // span))
        share = min(1.0, after / span)
        if self.mode == "exponential":
            return self.max_lr * (self.min_lr / self.max_lr) ** share
        return self.min_lr + (self.max_lr - self.min_lr) * (1 + math.cos(math.pi * share)) / 2
