"""The DALI loader: JPEG decode, crop, resize, flip and normalisation by NVIDIA DALI, on the GPU or the CPU.

Python decides everything that depends on the sample (order, crop window, flip, replacement of broken pictures)
with the same functions as the torch loader, and feeds encoded bytes; DALI does the pixel work. Pictures DALI does
not take as they are (anything but a whole 8-bit RGB or gray JPEG) are decoded here and handed over losslessly.
"""

import importlib.util
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mbv2.data.batch import Batch
from mbv2.data.decode import CorruptImage, decode
from mbv2.data.recipe import Recipe, eval_geometry, sample_generator, train_window
from mbv2.data.sampler import train_batches, val_batches
from mbv2.data.sources import Sample, Source
from mbv2.distributed import World
from mbv2.errors import UserError

# Start-of-frame markers of baseline, extended and progressive Huffman JPEG; the others go through `decode`.
_PLAIN_FRAMES = (0xC0, 0xC1, 0xC2)
_MAX_PLAIN_PIXELS = 178_956_970


def dali_available() -> bool:
    """Whether the DALI package is installed; cheap, imports nothing of it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) when `data` is a whole 8-bit gray or YCbCr JPEG that every decoder reads alike, else None.

    None is no verdict: `mbv2.data.decode.decode` then says whether the picture is good.
    """
    if data[:2] != b"\xff\xd8" or b"\xff\xd9" not in data[-65536:]:
        return None
    at, end, is_jfif, adobe_transform = 2, len(data) - 9, False, None
    while at < end:
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        length = (data[at + 2] << 8) | data[at + 3]
        if marker == 0xE0 and data[at + 4 : at + 8] == b"JFIF":
            is_jfif = True
        elif marker == 0xEE and data[at + 4 : at + 9] == b"Adobe" and at + 15 < end:
            adobe_transform = data[at + 15]
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if marker not in _PLAIN_FRAMES or at + 19 > end:
                return None
            precision, height, width, components = struct.unpack_from(">BHHB", data, at + 4)
            if precision != 8 or height == 0 or width == 0 or height * width > _MAX_PLAIN_PIXELS:
                return None
            ids = data[at + 10], data[at + 13], data[at + 16]
            # Without a JFIF header the component names or Adobe's flag may say that the three are RGB already.
            is_ycc = is_jfif or adobe_transform == 1 or (adobe_transform is None and ids == (1, 2, 3))
            if components == 1 or (components == 3 and is_ycc):
                return height, width
            return None
        elif length < 2 or marker in (0xD8, 0xD9, 0xDA):
            return None
        at += 2 + length
    return None


@dataclass
class _Picture:
    """One picture ready for DALI: encoded bytes, and what to cut out of it."""

    encoded: np.ndarray  # uint8 [bytes]: a JPEG, or a PPM when it was decoded here
    origin: tuple[int, int]  # training: top and left of the window; evaluation: of the centre crop
    size: tuple[int, int]  # training: height and width of the window; evaluation: of the resized picture
    mirror: int
    sample: Sample
    index: int  # whose place in the order it takes
    replaced: int  # broken pictures passed over to come here


@dataclass
class _HostBatch:
    pictures: list[_Picture]
    skipped: int
    indices: list[int]
    decoded_here: bool


class DaliLoader:
    """Batches through DALI, in the torch loader's order, with its crops, its flips and its treatment of broken files.

    Args:
        source: pictures and labels.
        recipe: geometry and normalisation.
        train: random crop and flip in the epoch's order, ragged tail dropped; else resize and centre crop, every
            picture exactly once over all ranks, the last batch as small as it comes.
        batch_size: pictures per batch of this rank.
        world: rank and device; on a GPU decoding and the rest run there.
        workers: threads for reading and for DALI's CPU part.
        seed: of the run.
        dtype: of the images: float32, float16 or bfloat16.
        on_corrupt: "fail" or "skip".
        prefetch: batches prepared ahead.
        repeat: passes over the data in an epoch of training.

    Raises:
        UserError: DALI is not installed, or cannot do what the recipe asks.
    """

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
        if not dali_available():
            raise UserError("--loader dali needs NVIDIA DALI: pip install mbv2[dali], or use --loader torch")
        if train and recipe.trivial_augment:
            raise UserError("--loader dali does not do trivial_augment: use --loader torch")
        if train and recipe.random_erasing:
            raise UserError("--loader dali does not do random_erasing: use --loader torch")
        self._source, self._recipe, self._train, self._world = source, recipe, train, world
        self._batch_size, self._seed, self._dtype, self._repeat = batch_size, seed, dtype, repeat
        self._skip, self._prefetch = on_corrupt == "skip", max(1, prefetch)
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self._threads = max(1, min(workers, usable))
        self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="mbv2-dali")
        self._pipe: Any = None
        self._feeder = _Feeder()
        self._epoch, self._start, self._skipped = 0, 0, 0
        self._batches = self._plan()

    @property
    def num_samples(self) -> int:
        """Pictures in the whole source, over all ranks."""
        return len(self._source.samples)

    @property
    def skipped(self) -> int:
        """Broken pictures passed over in this epoch on this rank."""
        return self._skipped

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return len(self._batches)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch to iterate over next, from its batch `start_batch` on."""
        self._epoch, self._start, self._skipped = epoch, start_batch, 0
        if self._train:
            self._batches = self._plan()

    def close(self) -> None:
        """Release DALI's buffers and the reader threads."""
        self._pipe = None
        self._readers.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Batch]:
        """The epoch's batches: images [N, 3, H, W] channels_last, labels int64 [N], both on the device, and names."""
        finished = False
        ahead: deque[tuple[list[int], list[Future[list[_Picture | None]]]]] = deque()
        todo = iter(self._batches[self._start :])
        try:
            yield from self._run(todo, ahead)
            finished = True
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()
            if not finished:
                # Batches may still be under way in the pipeline: start the next epoch with a fresh one.
                self._pipe = None

    def _plan(self) -> list[list[int]]:
        n, world = len(self._source.samples), self._world
        if not self._train:
            return val_batches(n, self._batch_size, world.rank, world.world_size)
        return train_batches(
            n, self._batch_size, world.rank, world.world_size, self._epoch, self._seed, self._repeat
        )

    def _run(self, todo: Iterator[list[int]], ahead: deque[Any]) -> Iterator[Batch]:
        under_way: deque[_HostBatch] = deque()  # fed to DALI, not yet delivered
        failure: UserError | None = None

        def host_batches() -> Iterator[_HostBatch]:
            nonlocal failure
            while True:
                while len(ahead) < self._prefetch and (indices := next(todo, None)) is not None:
                    ahead.append((indices, self._submit(indices)))
                if not ahead:
                    return
                indices, futures = ahead.popleft()
                try:
                    batch = _join(indices, futures)
                except UserError as error:
                    failure = error  # raised once the batches before it are delivered
                    return
                if batch.pictures:
                    yield batch
                else:
                    self._skipped += batch.skipped

        coming = host_batches()
        self._start_pipeline(coming, under_way)
        while True:
            try:
                images = self._next_images()
            except StopIteration:
                break
            except RuntimeError as error:
                # DALI refused a picture that its header let through: give it decoded pictures instead.
                if not under_way or under_way[0].decoded_here:
                    raise
                again = [self._decode_here(batch, error) for batch in under_way]
                under_way.clear()
                self._pipe = None
                self._start_pipeline(_chain([b for b in again if b.pictures], coming), under_way)
                self._skipped += sum(b.skipped for b in again if not b.pictures)
                continue
            batch = under_way.popleft()
            self._skipped += batch.skipped
            labels = torch.tensor([p.sample.label for p in batch.pictures], dtype=torch.int64)
            names = [p.sample.name for p in batch.pictures]
            yield Batch(images, labels.to(self._world.device, non_blocking=True), names)
        if failure is not None:
            raise failure
