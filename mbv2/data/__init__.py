"""Pictures in, normalised channels_last batches out: one interface, three loaders, one recipe."""

import torch

from mbv2.data.batch import Batch, Loader
from mbv2.data.recipe import Recipe
from mbv2.data.sources import Source, has_split, open_source
from mbv2.distributed import World
from mbv2.errors import UserError

__all__ = ["Batch", "Loader", "Recipe", "Source", "choose_loader", "has_split", "make_loader", "open_source"]

KINDS = ("auto", "dali", "torch", "synthetic")


def choose_loader(kind: str, device: torch.device) -> tuple[str, str]:
    """(loader, why): `auto` is DALI where it is installed and can decode on the GPU, else torch.

    Raises:
        UserError: unknown kind, or DALI asked for and not installed.
    """
    from mbv2.data.dali_loader import dali_available

    if kind not in KINDS:
        raise UserError(f"--loader {kind}: choose {', '.join(KINDS)}")
    if kind == "dali" and not dali_available():
        raise UserError("--loader dali: DALI is not installed; pip install 'mbv2[dali]', or use --loader torch")
    if kind != "auto":
        return kind, "asked for"
    if device.type != "cuda":
        return "torch", "no GPU to decode on; libjpeg-turbo in worker processes is the faster there"
    if not dali_available():
        return "torch", "DALI is not installed (pip install 'mbv2[dali]')"
    return "dali", "decodes and augments on the GPU"


def make_loader(
    kind: str,
    source: Source | None,
    recipe: Recipe,
    train: bool,
    batch_size: int,
    world: World,
    workers: int = 8,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    on_corrupt: str = "fail",
    prefetch: int = 2,
    repeat: int = 1,
    num_classes: int = 1000,
    length: int = 1280,
) -> Loader:
    """Make a loader for this rank.

    Training goes through a seeded random order, the ragged tail dropped on all ranks alike; validation sees every
    picture exactly once over all ranks, with a smaller last batch and no padding.

    Args:
        kind: "auto", "dali", "torch" or "synthetic".
        source: the pictures (None for synthetic only).
        recipe: crop, augmentation and normalisation.
        train: training order and augmentation, or evaluation.
        batch_size: per rank.
        world: global rank, world size and device.
        workers: processes (torch) or threads (dali), at most the cores there are.
        seed: of order and augmentation; both depend on (seed, epoch, sample) alone.
        dtype: of the images.
        on_corrupt: "fail" raises UserError naming the file; "skip" counts it in `skipped` and trains on the next
            good picture with that one's own label instead (validation leaves it out).
        prefetch: batches prepared ahead per worker.
        repeat: times an epoch goes through the training data.
        num_classes, length: of synthetic data.

    Raises:
        UserError: bad options, or fewer training pictures than one step of all ranks takes.
    """
    if batch_size < 1:
        raise UserError(f"--batch_size {batch_size}: must be at least 1")
    if workers < 0:
        raise UserError(f"--num_parallel_workers {workers}: must be 0 or more")
    if on_corrupt not in ("fail", "skip"):
        raise UserError(f"--on_corrupt {on_corrupt}: choose fail or skip")
    if repeat < 1:
        raise UserError(f"--repeat_num {repeat}: must be at least 1")
    chosen, _ = choose_loader(kind, world.device)
    count = length if chosen == "synthetic" or source is None else len(source.samples)
    if train and count * repeat < batch_size * world.world_size:
        raise UserError(
            f"{count} training pictures do not fill one step of {world.world_size} x {batch_size}; "
            "use a smaller --batch_size"
        )
    if chosen == "synthetic":
        from mbv2.data.synthetic import SyntheticLoader

        return SyntheticLoader(recipe, batch_size, world, num_classes, length, seed, dtype)
    if source is None:
        raise UserError("--data_url is needed: the folder that holds the pictures (or --loader synthetic)")
    arguments = (source, recipe, train, batch_size, world, workers, seed, dtype, on_corrupt, prefetch, repeat)
    if chosen == "dali":
        from mbv2.data.dali_loader import DaliLoader

        return DaliLoader(*arguments)
    from mbv2.data.torch_loader import TorchLoader

    return TorchLoader(*arguments)
