"""`python -m bench loader`: images/s of our two loaders and of torchvision's ImageFolder on a folder of JPEG files.

The evaluation's pictures are compared first: the same files in the same order with the same labels, and pixels that
differ from ImageFolder's no more than decoders and rounding do. Then whole training epochs (random crop, flip,
normalisation) are timed in interleaved rounds, every loader from a fresh start: images/s from the first batch on, and
the time on the cores of the process and of its workers, which is what to compare on a machine that others use too.
"""

import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import report, schema, timing
from bench.schema import Row
from bench.tables import Column
from mbv2.data import Source, choose_loader, make_loader, open_source
from mbv2.data.recipe import Recipe
from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.progress import Progress

BASELINE = "ImageFolder (PIL)"
OURS = {"mbv2 torch": "torch", "mbv2 dali": "dali"}
# Mean difference of normalised pixels from PIL's that decoders and antialiasing explain; 0.06 is 3.5 of 255.
MOST_DIFFERENCE = 0.06
COLUMNS = (
    Column("loader", "loader"),
    Column("device", "device"),
    Column("workers", "workers"),
    Column("images_per_s", "images/s", ".0f"),
    Column("p25_images_per_s", "p25", ".0f"),
    Column("p75_images_per_s", "p75", ".0f"),
    Column("cpu_ms_per_image", "CPU ms/image", ".2f"),
    Column("less_cpu", "x less CPU", ".2f"),
    Column("less_cpu_low", "p25", ".2f"),
    Column("less_cpu_high", "p75", ".2f"),
    Column("difference", "pixel difference", ".4f"),
)


class Epoch(NamedTuple):
    """One pass: pictures, seconds from the first batch on and the pictures in them, seconds on all cores."""

    images: int
    seconds: float
    steady_images: int
    cpu: float


Batches = Callable[[bool], Iterator[tuple[Tensor, Tensor]]]


def ours(kind: str, folder: str, recipe: Recipe, batch: int, workers: int, device: torch.device) -> Batches:
    """One of our loaders as a function of `train` that yields (images, labels) of one epoch."""
    choose_loader(kind, device)

    def batches(train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        source: Source = open_source(folder, "train")
        loader = make_loader(kind, source, recipe, train, batch, World(device=device), workers)
        try:
            for found in loader:
                yield found.images, found.labels
        finally:
            loader.close()

    return batches


def image_folder(folder: str, recipe: Recipe, batch: int, workers: int, device: torch.device) -> Batches:
    """What people write with torchvision: ImageFolder, PIL, transforms in DataLoader workers, copied to the device."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    last = [transforms.ToTensor(), transforms.Normalize(recipe.mean, recipe.std)]
    training = [transforms.RandomResizedCrop(recipe.resolution), transforms.RandomHorizontalFlip(), *last]
    evaluation = [transforms.Resize(recipe.eval_resize), transforms.CenterCrop(recipe.resolution), *last]

    def batches(train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        steps = transforms.Compose(training if train else evaluation)
        pictures = datasets.ImageFolder(str(Path(folder) / "train"), steps)
        loader = DataLoader(pictures, batch, shuffle=train, num_workers=workers, drop_last=train)
        for images, labels in loader:
            yield images.to(device), labels.to(device)

    return batches


def difference(batches: Batches, expected: Batches, device: torch.device) -> float:
    """Mean absolute difference of the evaluation's normalised pixels.

    Raises:
        UserError: other labels, another number of pictures, or pixels that no decoder explains.
    """
    total, count = 0.0, 0
    pairs = zip(_pictures(batches), _pictures(expected), strict=True)
    try:
        for (image, label), (other, other_label) in pairs:
            if label != other_label or image.shape != other.shape:
                raise UserError(f"picture {count}: label {label}, not {other_label}")
            total += (image - other).abs().mean().item()
            count += 1
    except ValueError:
        raise UserError(f"another number of pictures than {BASELINE} has") from None
    if not total / count <= MOST_DIFFERENCE:
        raise UserError(f"pixels differ by {total / count:.3f} on average, at most {MOST_DIFFERENCE}")
    return total / count


def _pictures(batches: Batches) -> Iterator[tuple[Tensor, int]]:
    for images, labels in batches(False):
        yield from zip(images.cpu().float(), labels.tolist(), strict=True)


def epoch(batches: Batches, device: torch.device) -> Epoch:
    """Go through the training pictures once, from starting workers to ending them."""
    start_cpu, images, steady, first = _cpu_seconds(), 0, 0, None
    for x, _ in batches(True):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if first is None:
            first = time.perf_counter()
        else:
            steady += len(x)
        images += len(x)
    if first is None or not steady:
        raise UserError("fewer training pictures than two batches; use a smaller --batch")
    return Epoch(images, time.perf_counter() - first, steady, _cpu_seconds() - start_cpu)


def _cpu_seconds() -> float:
    """Of this process and of its ended children."""
    own, ended = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime + ended.ru_utime + ended.ru_stime


def rows(epochs: dict[str, list[Epoch]], differences: dict[str, float], device: str, workers: int) -> list[Row]:
    """Medians and quartiles; `less_cpu` is ImageFolder's time on the cores over the loader's, round by round."""
    found = []
    baseline = [e.cpu / e.images for e in epochs[BASELINE]]
    for name, runs in epochs.items():
        cpu = [e.cpu / e.images for e in runs]
        low, median, high = timing.quartiles([e.steady_images / e.seconds for e in runs])
        less_low, less, less_high = timing.quartiles([b / a for a, b in zip(cpu, baseline, strict=True)])
        found.append(
            {
                "loader": name,
                "device": device,
                "workers": workers,
                "images_per_s": median,
                "p25_images_per_s": low,
                "p75_images_per_s": high,
                "cpu_ms_per_image": 1e3 * statistics.median(cpu),
                "less_cpu": less,
                "less_cpu_low": less_low,
                "less_cpu_high": less_high,
                "difference": differences[name],
            }
        )
    return found


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("loader", __doc__.split("\n")[0])
    parser.add_argument("--data_url", default="", help="folder with train/<class>/*.jpg (default: pictures are drawn)")
    parser.add_argument("--resize", type=int, default=224, help="side of the crops [%(default)s]")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--workers", type=int, default=2, help="processes, or threads of DALI [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="epochs of each loader, 2 at least [%(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    if options.rounds < 2:
        raise UserError(f"--rounds {options.rounds}: at least 2, as the spread is told")
    device = report.device_of(options.device)
    recipe = Recipe(options.resize)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.data_url or str(_draw(Path(scratch) / "drawn"))
        count = len(open_source(folder, "train").samples)
        settings: dict[str, Any] = {
            "data": Path(folder).name,
            "pictures": count,
            "resolution": options.resize,
            "batch": options.batch,
            "rounds": options.rounds,
        }
        result = schema.new("loader", argv, settings)
        loaders = {BASELINE: image_folder(folder, recipe, options.batch, options.workers, device)}
        for name, kind in OURS.items():
            try:
                loaders[name] = ours(kind, folder, recipe, options.batch, options.workers, device)
            except UserError as error:
                result.left_out[name] = str(error)
        differences = _checked(loaders, device, result.left_out)
        epochs: dict[str, list[Epoch]] = {name: [] for name in differences}
        with Progress(options.rounds * len(epochs), "loader", "epochs") as progress:
            for _ in range(options.rounds):
                for name, done in epochs.items():
                    done.append(epoch(loaders[name], device))
                    progress.advance()
    result.rows.extend(rows(epochs, differences, device.type, options.workers))
    return report.finish(result, COLUMNS, options.out)


def _checked(loaders: dict[str, Batches], device: torch.device, left_out: dict[str, str]) -> dict[str, float]:
    found = {BASELINE: 0.0}
    for name, batches in loaders.items():
        if name == BASELINE:
            continue
        try:
            found[name] = difference(batches, loaders[BASELINE], device)
        except UserError as error:
            left_out[name] = f"wrong pictures: {error}"
    return found


def _draw(folder: Path) -> Path:
    """400 pictures of a usual photograph's size."""
    from mbv2.shapes import CLASS_NAMES, ShapesSpec, draw_shapes

    return draw_shapes(folder, ShapesSpec(400 // len(CLASS_NAMES), 1, 375, 500))
