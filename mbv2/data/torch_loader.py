"""The loader for every machine: torchvision decodes, worker processes crop, the batch is normalised on the device."""

import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torchvision.transforms.v2.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from mbv2.data.batch import Batch, normalise
from mbv2.data.decode import CorruptImage, decode
from mbv2.data.recipe import Recipe, eval_geometry, sample_generator, train_window
from mbv2.data.sampler import batches_per_epoch, train_batches, val_batches
from mbv2.data.sources import Source
from mbv2.distributed import World
from mbv2.errors import UserError

# After this many broken pictures in a row something else is wrong, and looking on would only take long.
MAX_REPLACEMENTS = 100
_LONGEST = 32


class _Item(NamedTuple):
    image: Tensor | None
    label: int
    name: str
    skipped: int


class _Failure(NamedTuple):
    """An error as a value: an exception would reach the main process buried in a worker's traceback."""

    message: str


class _Pack(NamedTuple):
    """A batch as a worker hands it over; every tensor costs the hand-over a file of shared memory, so it is one."""

    images: Tensor | None  # uint8 [N, 3, R, R], channels_last; None without a good picture
    labels: list[int]
    names: list[str]
    skipped: int


class TorchLoader:
    """See `mbv2.data.make_loader`; `batches` are recomputed each epoch from the seed, so any batch can be the first."""

    def __init__(
        self,
        source: Source,
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
    ) -> None:
        self.source = source
        self.recipe = recipe
        self.num_samples = len(source.samples)
        self.skipped = 0
        self._train, self._batch_size, self._world = train, batch_size, world
        self._seed, self._dtype, self._repeat = seed, dtype, repeat
        self._batches = _Batches()
        workers = min(workers, usable_cores())
        self._loader = DataLoader(
            _Pictures(source, recipe, train, seed, on_corrupt),
            batch_sampler=self._batches,
            num_workers=workers,
            collate_fn=_pack,
            persistent_workers=workers > 0,
            prefetch_factor=prefetch if workers > 0 else None,
            worker_init_fn=_start_worker,
            # Without its own generator each pass would draw from the global one, and a run resumed in mid-epoch
            # would go on with other random numbers than the one that was not interrupted.
            generator=torch.Generator(),
        )
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Go to batch `start_batch` of epoch `epoch`; iteration starts there."""
        n, world = self.num_samples, self._world
        if self._train:
            batches = train_batches(n, self._batch_size, world.rank, world.world_size, epoch, self._seed, self._repeat)
        else:
            batches = val_batches(n, self._batch_size, world.rank, world.world_size)
        self._batches.items = [[(epoch, index) for index in batch] for batch in batches[start_batch:]]

    def __len__(self) -> int:
        if self._train:
            return batches_per_epoch(self.num_samples, self._batch_size, self._world.world_size, self._repeat)
        return len(val_batches(self.num_samples, self._batch_size, self._world.rank, self._world.world_size))

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        for pack in self._packs():
            if isinstance(pack, _Failure):
                raise UserError(pack.message)
            self.skipped += pack.skipped
            if pack.images is not None:
                yield self._on_device(pack.images, pack)

    def _packs(self) -> Iterator[_Pack | _Failure]:
        try:
            yield from self._loader
        except RuntimeError as error:
            if not re.search(r"DataLoader worker.*(killed by signal|exited unexpectedly)", str(error)):
                raise
            raise UserError(
                f"a loader process died ({str(error).splitlines()[0]}); when memory or /dev/shm ran out, lower "
                "--num_parallel_workers or --batch_size"
            ) from error

    def close(self) -> None:
        """End the worker processes."""
        iterator = self._loader._iterator
        if iterator is not None:
            iterator._shutdown_workers()
            self._loader._iterator = None

    def _on_device(self, images: Tensor, pack: _Pack) -> Batch:
        labels = torch.tensor(pack.labels, dtype=torch.int64)
        device = self._world.device
        if device.type == "cuda":
            images, labels = images.pin_memory(), labels.pin_memory()
        images = normalise(images.to(device, non_blocking=True), self.recipe, self._dtype)
        return Batch(images, labels.to(device, non_blocking=True), pack.names)


class _Batches:
    """The epoch's lists of items; DataLoader asks for them anew at each epoch, with its workers kept."""

    def __init__(self) -> None:
        self.items: list[list[tuple[int, int]]] = []

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)


class _Pictures(Dataset):
    def __init__(self, source: Source, recipe: Recipe, train: bool, seed: int, on_corrupt: str) -> None:
        self.source, self.recipe, self.train, self.seed = source, recipe, train, seed
        self.skip = on_corrupt == "skip"

    def __getitem__(self, item: tuple[int, int]) -> _Item | _Failure:
        epoch, index = item
        samples = self.source.samples
        tries = min(len(samples), MAX_REPLACEMENTS) if self.train and self.skip else 1
        for skipped in range(tries):
            sample = samples[(index + skipped) % len(samples)]
            try:
                image = decode(self.source.read(sample), sample.name)
            except UserError as error:
                return _Failure(str(error))
            except CorruptImage as error:
                if not self.skip:
                    return _Failure(f"{error}; repair or remove it, or use --on_corrupt skip")
                continue
            image = self._crop(image, epoch, index)
            return _Item(image, sample.label, sample.name, skipped)
        if self.train:
            return _Failure(f"{tries} pictures in a row cannot be decoded, the last {sample.name}; check the data")
        return _Item(None, sample.label, sample.name, 1)

    def _crop(self, image: Tensor, epoch: int, index: int) -> Tensor:
        if self.train:
            return train_picture(image, self.recipe, sample_generator(self.seed, epoch, index))
        return eval_picture(image, self.recipe)


def _pack(items: list[_Item | _Failure]) -> _Pack | _Failure:
    failures = [item for item in items if isinstance(item, _Failure)]
    if failures:
        return failures[0]
    skipped = sum(item.skipped for item in items)
    kept = [item for item in items if item.image is not None]
    if not kept:
        return _Pack(None, [], [], skipped)
    images = torch.stack([item.image for item in kept]).contiguous(memory_format=torch.channels_last)
    return _Pack(images, [item.label for item in kept], [item.name for item in kept], skipped)


def eval_picture(image: Tensor, recipe: Recipe) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, R, R]: shorter side to `eval_resize`, centre crop; or the whole squeezed."""
    height, width = image.shape[1:]
    if not recipe.squeeze and max(height, width) > _LONGEST * min(height, width):
        # A line of pixels would become gigabytes when its shorter side is resized; the ends are cropped off anyway.
        image = F.center_crop(image, [min(height, _LONGEST * width), min(width, _LONGEST * height)])
    size, (top, left) = eval_geometry(image.shape[1], image.shape[2], recipe)
    image = F.resize(image, list(size), interpolation=v2.InterpolationMode(recipe.interpolation), antialias=True)
    return image[:, top : top + recipe.resolution, left : left + recipe.resolution]


def train_picture(image: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """uint8 [3, H, W] -> uint8 [3, R, R]: random resized crop, flip, TrivialAugment, random erasing."""
    top, left, height, width = train_window(image.shape[1], image.shape[2], recipe, generator)
    flip = torch.rand((), generator=generator).item() < recipe.flip
    side = [recipe.resolution, recipe.resolution]
    image = F.resized_crop(image, top, left, height, width, side, v2.InterpolationMode.BILINEAR, antialias=True)
    if flip:
        image = image.flip(2)
    if not (recipe.trivial_augment or recipe.random_erasing):
        return image
    return augment(image, recipe, int(torch.randint(2**62, (), generator=generator)))


def augment(image: Tensor, recipe: Recipe, seed: int) -> Tensor:
    """TrivialAugment and random erasing of uint8 [3, R, R], as the recipe has them, drawn from `seed` alone."""
    # torchvision's random transforms draw from the CPU's global generator only. torch.manual_seed would seed the
    # GPU's as well, which is training's.
    before = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        if recipe.trivial_augment:
            image = v2.TrivialAugmentWide(interpolation=v2.InterpolationMode.BILINEAR)(image)
        if recipe.random_erasing:
            # The mean is what becomes zero once normalised.
            mean = [round(255 * value) for value in recipe.mean]
            image = v2.RandomErasing(p=recipe.random_erasing, value=mean)(image)
    finally:
        torch.set_rng_state(before)
    return image


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start_worker(worker: int) -> None:
    # Worker processes are the parallelism; threads inside each would only fight over the cores.
    torch.set_num_threads(1)
    # Ctrl+C and torchrun signal the whole process group. The main process saves and ends the workers itself; without
    # them it could not finish its step.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
