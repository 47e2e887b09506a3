"""What every loader yields, and the one normalisation they share."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from mbv2.data.recipe import Recipe


class Batch(NamedTuple):
    """Images [N, 3, R, R] (normalised, channels_last) and labels [N] (int64) on the device, and the files' names."""

    images: Tensor
    labels: Tensor
    names: list[str]


class Loader(Protocol):
    """A source of batches for one rank."""

    num_samples: int
    """Pictures of the whole source, all ranks together."""
    skipped: int
    """Broken pictures met so far in this epoch on this rank (on_corrupt="skip")."""

    def __iter__(self) -> Iterator[Batch]:
        """Yield the batches of the present epoch."""

    def __len__(self) -> int:
        """Batches per whole epoch on this rank."""

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Go to a batch of an epoch; what follows is what an uninterrupted run would have seen."""

    def close(self) -> None:
        """Release worker processes and device memory."""


def normalise(images: Tensor, recipe: Recipe, dtype: torch.dtype) -> Tensor:
    """uint8 [N, 3, R, R] -> `dtype`, (x / 255 - mean) / std, channels_last."""
    # In place and over whole rows: passes that make new tensors, or have only three values to a pixel, take as long on
    # a CPU as decoding.
    width = images.shape[3]
    mean = (torch.tensor(recipe.mean, device=images.device) * 255).repeat(width)
    scale = (1 / (torch.tensor(recipe.std, device=images.device) * 255)).repeat(width)
    images = images.contiguous(memory_format=torch.channels_last).to(torch.float32, copy=True)
    images.permute(0, 2, 3, 1).flatten(2).sub_(mean).mul_(scale)
    return images.to(dtype)
