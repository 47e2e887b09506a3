"""The DALI loader: JPEG decode, crop, resize, flip and normalisation by NVIDIA DALI, on the GPU or the CPU.

Python decides everything that depends on the sample (order, crop window, flip, replacement of broken pictures)
with the same functions as the torch loader, and feeds encoded bytes; DALI does the pixel work. Pictures DALI does
not take as they are (anything but a whole 8-bit RGB or gray JPEG) are decoded here and handed over losslessly.
"""

import importlib.util
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mbv2.data.batch import Batch, normalise
from mbv2.data.decode import CorruptImage, decode
from mbv2.data.jpeg_header import plain_jpeg_size
from mbv2.data.recipe import Recipe, eval_geometry, sample_generator, train_window
from mbv2.data.sampler import batches_per_epoch, train_batches, val_batches
from mbv2.data.sources import Source
from mbv2.data.torch_loader import MAX_REPLACEMENTS, augment, usable_cores
from mbv2.distributed import World
from mbv2.errors import UserError


def dali_available() -> bool:
    """Whether the DALI package is installed; cheap, imports nothing of it."""
    try:
        return importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:
        return False


class _Picture(NamedTuple):
    """One picture ready for DALI: encoded bytes, and what to cut out of it."""

    encoded: np.ndarray  # uint8 [bytes]: a JPEG, or a PPM when it was decoded here
    origin: tuple[int, int]  # top, left: of the training window in the picture, of the centre crop in the resized
    size: tuple[int, int]  # height, width: of the training window, of the resized picture
    mirror: bool
    augment_seed: int  # of what torch still does to the picture after DALI
    label: int
    name: str


class _HostBatch(NamedTuple):
    indices: list[int]  # as the order has them, broken ones included
    pictures: list[_Picture]
    skipped: int
    decoded_here: bool


class DaliLoader:
    """Batches through DALI in the torch loader's order, with its crops, flips and treatment of broken files.

    Iterating yields images [N, 3, R, R] (channels_last, no copy of DALI's output) and labels [N], both on the
    world's device, and names. TrivialAugment and random erasing are done by torch on DALI's uint8 output, with the
    torch loader's random numbers.

    Args:
        source: pictures and labels.
        recipe: geometry and normalisation.
        train: random crop and flip in the epoch's order, ragged tail dropped; else resize and centre crop, every
            picture exactly once over all ranks, the last batch as small as it comes.
        batch_size: pictures per batch of this rank.
        world: rank and device; on a GPU decoding and all the rest run there.
        workers: threads that read, and threads of DALI; at most the cores there are.
        seed: of order and augmentation.
        dtype: of the images: float32, float16 or bfloat16.
        on_corrupt: "fail" or "skip".
        prefetch: batches prepared ahead, both before DALI and in it.
        repeat: passes over the data in an epoch of training.

    Raises:
        UserError: DALI is not installed; while iterating, a picture cannot be read or (with "fail") decoded.
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
            raise UserError("--loader dali: DALI is not installed; pip install 'mbv2[dali]', or use --loader torch")
        self.num_samples = len(source.samples)
        self.skipped = 0
        self._source, self._recipe, self._train, self._world = source, recipe, train, world
        self._batch_size, self._seed, self._dtype, self._repeat = batch_size, seed, dtype, repeat
        self._skip, self._prefetch = on_corrupt == "skip", max(1, prefetch)
        self._threads = max(1, min(workers, usable_cores()))
        self._readers: ThreadPoolExecutor | None = None
        self._in_torch = train and (recipe.trivial_augment or recipe.random_erasing > 0)
        self._pipe: Any = None
        self._feed: Iterator[_HostBatch] = iter(())
        self._under_way: deque[_HostBatch] = deque()  # fed to DALI, not yet delivered
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Go to batch `start_batch` of epoch `epoch`; iteration starts there."""
        n, world = self.num_samples, self._world
        if self._train:
            batches = train_batches(n, self._batch_size, world.rank, world.world_size, epoch, self._seed, self._repeat)
        else:
            batches = val_batches(n, self._batch_size, world.rank, world.world_size)
        self._epoch, self._batches = epoch, batches[start_batch:]

    def __len__(self) -> int:
        if self._train:
            return batches_per_epoch(self.num_samples, self._batch_size, self._world.world_size, self._repeat)
        return len(val_batches(self.num_samples, self._batch_size, self._world.rank, self._world.world_size))

    def __iter__(self) -> Iterator[Batch]:
        self.skipped = 0
        failures: list[UserError] = []
        finished = False
        self._under_way.clear()
        if self._readers is None:
            self._readers = ThreadPoolExecutor(self._threads, thread_name_prefix="mbv2-dali")
        self._feed = self._host_batches(self._readers, failures)
        try:
            self._begin()
            while True:
                try:
                    images = self._next_images()
                except StopIteration:
                    break
                except RuntimeError:
                    # DALI refused a picture whose header was fine, and its pipeline is of no use any more: start a
                    # new one, and hand these pictures over decoded. That decoder has the say on what is broken.
                    if not self._under_way or self._under_way[0].decoded_here:
                        raise
                    self._feed = self._decoded_batches(self._readers, list(self._under_way), self._feed, failures)
                    self._under_way.clear()
                    self._pipe = None
                    self._begin()
                    continue
                batch = self._under_way.popleft()
                self._pipe.schedule_run()
                self.skipped += batch.skipped
                yield self._assemble(images, batch.pictures)
            if failures:
                raise failures[0]
            finished = True
        finally:
            if not finished:
                # Batches of this epoch may still be in the pipeline: the next epoch gets a fresh one.
                self._pipe, self._feed = None, iter(())

    def close(self) -> None:
        """Release DALI's buffers and end the reader threads; iterating starts them anew."""
        self._pipe, self._feed = None, iter(())
        self._under_way.clear()
        if self._readers is not None:
            self._readers.shutdown(wait=True, cancel_futures=True)
            self._readers = None

    def _begin(self) -> None:
        if self._pipe is None:
            try:
                self._pipe = _build_pipeline(
                    self._recipe,
                    self._train,
                    self._batch_size,
                    _device_index(self._world),
                    self._threads,
                    self._prefetch,
                    torch.uint8 if self._in_torch else self._dtype,
                    self._next_inputs,
                )
            except (ImportError, RuntimeError) as error:
                reason = str(error).strip().splitlines()[0]
                raise UserError(f"DALI cannot start on {self._world.device} ({reason}); use --loader torch") from error
        else:
            self._pipe.reset()
        self._pipe.schedule_run()

    def _next_inputs(self) -> tuple[list[np.ndarray], ...]:
        """What DALI asks for to start one more batch; StopIteration ends the epoch."""
        batch = next(self._feed)
        self._under_way.append(batch)
        return (
            [picture.encoded for picture in batch.pictures],
            [np.array(picture.origin, dtype=np.int32) for picture in batch.pictures],
            [np.array(picture.size, dtype=np.int32) for picture in batch.pictures],
            [np.array(picture.mirror, dtype=np.int32) for picture in batch.pictures],
        )

    def _next_images(self) -> Tensor:
        """DALI's oldest batch as [N, 3, R, R] channels_last, its memory shared with DALI's buffer."""
        on_gpu = self._world.device.type == "cuda"
        # Bound to torch's stream, the buffer is given back only after torch's kernels have read it.
        stream = torch.cuda.current_stream(self._world.device) if on_gpu else None
        (output,) = self._pipe.outputs(cuda_stream=stream)
        return torch.from_dlpack(output.as_tensor()).permute(0, 3, 1, 2)

    def _assemble(self, images: Tensor, pictures: list[_Picture]) -> Batch:
        if self._in_torch:
            seeds = [picture.augment_seed for picture in pictures]
            images = torch.stack(
                [augment(image, self._recipe, seed) for image, seed in zip(images, seeds, strict=True)]
            )
            images = normalise(images, self._recipe, self._dtype)
        labels = torch.tensor([picture.label for picture in pictures], dtype=torch.int64)
        if self._world.device.type == "cuda":
            labels = labels.pin_memory().to(self._world.device, non_blocking=True)
        return Batch(images.to(self._dtype), labels, [picture.name for picture in pictures])

    def _host_batches(self, readers: ThreadPoolExecutor, failures: list[UserError]) -> Iterator[_HostBatch]:
        """The epoch's batches ready for DALI; an error ends them and waits in `failures`.

        So the batches before the error are still delivered, as by the torch loader.
        """
        todo = iter(self._batches)
        ahead: deque[tuple[list[int], list[Future]]] = deque()
        try:
            while True:
                while len(ahead) < self._prefetch and (indices := next(todo, None)) is not None:
                    ahead.append((indices, self._submit(readers, indices, decode_all=False)))
                if not ahead:
                    return
                yield from self._collect(*ahead.popleft(), decoded_here=False)
        except UserError as error:
            failures.append(error)
        finally:
            for _, futures in ahead:
                for future in futures:
                    future.cancel()

    def _decoded_batches(
        self,
        readers: ThreadPoolExecutor,
        batches: list[_HostBatch],
        rest: Iterator[_HostBatch],
        failures: list[UserError],
    ) -> Iterator[_HostBatch]:
        """`batches` again, every picture decoded here, then `rest`."""
        try:
            for batch in batches:
                yield from self._collect(
                    batch.indices, self._submit(readers, batch.indices, decode_all=True), decoded_here=True
                )
        except UserError as error:
            failures.insert(0, error)
            return
        yield from rest

    def _collect(self, indices: list[int], futures: list[Future], decoded_here: bool) -> Iterator[_HostBatch]:
        """The one batch of `futures`, or none when all its pictures are broken."""
        found = [each for future in futures for each in future.result()]
        pictures = [picture for picture, _ in found if picture is not None]
        skipped = sum(skipped for _, skipped in found)
        if pictures:
            yield _HostBatch(indices, pictures, skipped, decoded_here)
        else:
            self.skipped += skipped

    def _submit(self, readers: ThreadPoolExecutor, indices: list[int], decode_all: bool) -> list[Future]:
        share = -(-len(indices) // self._threads)
        epoch = self._epoch
        return [
            readers.submit(
                lambda part: [self._prepare(epoch, index, decode_all) for index in part], indices[at : at + share]
            )
            for at in range(0, len(indices), share)
        ]

    def _prepare(self, epoch: int, index: int, decode_all: bool) -> tuple[_Picture | None, int]:
        """(picture, broken pictures passed over): the sample of `index`, or in its place the next good one."""
        samples = self._source.samples
        tries = min(len(samples), MAX_REPLACEMENTS) if self._train and self._skip else 1
        for skipped in range(tries):
            sample = samples[(index + skipped) % len(samples)]
            data = self._source.read(sample)
            try:
                shape = None if decode_all else plain_jpeg_size(data)
                pixels = decode(data, sample.name) if shape is None else None
            except CorruptImage as error:
                if not self._skip:
                    raise UserError(f"{error}; repair or remove it, or use --on_corrupt skip") from error
                continue
            height, width = shape if pixels is None else pixels.shape[1:]
            mirror, augment_seed = False, 0
            if self._train:
                generator = sample_generator(self._seed, epoch, index)
                top, left, *size = train_window(height, width, self._recipe, generator)
                mirror = torch.rand((), generator=generator).item() < self._recipe.flip
                if self._in_torch:
                    augment_seed = int(torch.randint(2**62, (), generator=generator))
                if pixels is not None:
                    pixels = pixels[:, top : top + size[0], left : left + size[1]]
                    top = left = 0
            else:
                size, (top, left) = eval_geometry(height, width, self._recipe)
            encoded = np.frombuffer(data if pixels is None else _ppm(pixels), dtype=np.uint8)
            picture = _Picture(encoded, (top, left), tuple(size), mirror, augment_seed, sample.label, sample.name)
            return picture, skipped
        if self._train:
            raise UserError(f"{tries} pictures in a row cannot be decoded, the last {sample.name}; check the data")
        return None, 1


def _ppm(pixels: Tensor) -> bytes:
    """uint8 [3, H, W] as a PPM file: lossless, and nothing to compute."""
    _, height, width = pixels.shape
    return b"P6\n%d %d\n255\n" % (width, height) + pixels.permute(1, 2, 0).contiguous().numpy().tobytes()


def _device_index(world: World) -> int | None:
    if world.device.type != "cuda":
        return None
    return world.local_rank if world.device.index is None else world.device.index


def _build_pipeline(
    recipe: Recipe,
    train: bool,
    batch_size: int,
    device_index: int | None,
    threads: int,
    prefetch: int,
    dtype: torch.dtype,
    source: Callable[[], tuple[list[np.ndarray], ...]],
) -> Any:
    """Encoded bytes, origin, size and mirror to [N, R, R, 3], on GPU `device_index`, or without any GPU for None.

    `dtype` uint8 leaves the values as they are; the others are normalised (bfloat16, which DALI does not write, as
    float32).
    """
    from nvidia.dali import Pipeline, fn, math, types

    on_gpu = device_index is not None
    decoder: dict[str, Any] = {
        "device": "mixed" if on_gpu else "cpu",
        "output_type": types.RGB,
        "adjust_orientation": False,
        # As libjpeg-turbo does it, so that the loaders agree.
        "jpeg_fancy_upsampling": True,
    }
    if on_gpu:
        decoder |= {"hw_decoder_load": 0.75, "preallocate_width_hint": 1024, "preallocate_height_hint": 1024}
    side = recipe.resolution
    if dtype == torch.uint8:
        mean, std, written = [0.0] * 3, [1.0] * 3, types.UINT8
    else:
        mean, std = [255 * value for value in recipe.mean], [255 * value for value in recipe.std]
        written = types.FLOAT16 if dtype == torch.float16 else types.FLOAT
    pipe = Pipeline(
        batch_size=batch_size,
        num_threads=threads,
        device_id=device_index,
        prefetch_queue_depth=prefetch,
        exec_dynamic=True,
    )
    with pipe:
        encoded, origin, size, mirror = fn.external_source(
            source=source,
            num_outputs=4,
            batch=True,
            dtype=[types.UINT8, types.INT32, types.INT32, types.INT32],
            ndim=[1, 1, 1, 0],
        )

        def across_then_down(images: Any, height: Any, width: Any) -> Any:
            # In two steps, each rounded to 8 bits: torchvision's order and rounding, so that the figures agree.
            cubic = not train and recipe.interpolation == "bicubic"
            kind = types.INTERP_CUBIC if cubic else types.INTERP_LINEAR
            how = {"interp_type": kind, "antialias": True, "mode": "stretch"}
            return fn.resize(fn.resize(images, resize_x=width, **how), resize_y=height, **how)

        if train:
            # Only the window is decoded, so that no pixel outside it can leak into the resize either.
            images = fn.decoders.image_slice(encoded, origin, size, axes=[0, 1], **decoder)
            images = across_then_down(images, side, side)
            crop: dict[str, Any] = {}
        else:
            images = fn.decoders.image(encoded, **decoder)
            target = fn.cast(size, dtype=types.FLOAT)
            images = across_then_down(images, target[0], target[1])
            # DALI wants the origin as a share of what the crop leaves over.
            left_over = fn.cast(size - side, dtype=types.FLOAT)
            share = fn.cast(origin, dtype=types.FLOAT) / math.max(left_over, 1.0)
            crop = {"crop": [side, side], "crop_pos_y": share[0], "crop_pos_x": share[1]}
        images = fn.crop_mirror_normalize(
            images, mirror=mirror, mean=mean, std=std, dtype=written, output_layout="HWC", **crop
        )
        pipe.set_outputs(images)
    pipe.build()
    return pipe
