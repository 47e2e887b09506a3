"""An exponential moving average of a network's weights, which usually evaluates better than the weights themselves."""

import copy

import torch
from torch import Tensor, nn


class Ema:
    """The average of `model`'s parameters and BatchNorm statistics over the optimizer steps.

    Early on the average follows faster (decay at most (1 + n) / (10 + n) after n updates), or the random
    initialisation would stay in it for long.

    Attributes:
        model: a network of its own that holds the average; not trained.
        updates: how many there were.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards `model`, once per optimizer step; counters are copied."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        source = model.state_dict()
        averages, values = [], []
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(source[name])
            else:
                average.copy_(source[name])
        torch._foreach_lerp_(averages, values, 1 - decay)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged weights under the network's own names."""
        return self.model.state_dict()

    def load(self, weights: dict[str, Tensor], updates: int) -> None:
        """Continue from saved averages."""
        self.model.load_state_dict(weights)
        self.updates = updates
