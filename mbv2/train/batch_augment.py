"""Mixup and cutmix of whole batches, drawn from (seed, epoch, batch, rank) so that a resumed run draws the same."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class BatchAugment:
    """Mixes each batch with itself rolled by one: mixup (arXiv 1710.09412), cutmix (arXiv 1905.04899), or one of both.

    Args:
        num_classes: all logits; mixed targets are [N, num_classes].
        mixup, cutmix: alpha of the Beta distribution of the shares; 0 is off.
        seed: of the run.
        rank: global, so that ranks draw apart.
    """

    def __init__(self, num_classes: int, mixup: float, cutmix: float, seed: int, rank: int) -> None:
        from torchvision.transforms import v2

        self._transforms = []
        if mixup > 0:
            self._transforms.append(v2.MixUp(alpha=mixup, num_classes=num_classes))
        if cutmix > 0:
            self._transforms.append(v2.CutMix(alpha=cutmix, num_classes=num_classes))
        self._seed, self._rank = seed, rank

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, batch: int) -> tuple[Tensor, Tensor]:
        """Mix [N, 3, H, W] images and their [N] int64 targets; returns float32 [N, num_classes] targets then."""
        if not self._transforms:
            return images, targets
        generator = torch.Generator().manual_seed(hash((self._seed, epoch, batch, self._rank)) & (2**63 - 1))
        draw, choice = torch.randint(2**62, (2,), generator=generator).tolist()
        with _seeded(draw):
            mixed, shares = self._transforms[choice % len(self._transforms)](images, targets)
        return mixed.contiguous(memory_format=torch.channels_last), shares.float()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let torchvision draw from the global CPU generator at a seed of ours, and put that generator back."""
    before = torch.get_rng_state()
    # Not torch.manual_seed, which would reseed the GPUs' generators too.
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(before)
