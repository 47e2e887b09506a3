"""`mbv2 infer`: what is on a picture, or on every picture of a folder."""

import csv
import io
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from PIL import Image

from mbv2 import distributed, options_cli
from mbv2.annotate import annotate, save_fresh
from mbv2.errors import UserError
from mbv2.progress import Progress
from mbv2.trained import Trained, load_trained

if TYPE_CHECKING:
    from mbv2.data import Loader, Source
    from mbv2.model import MobileNetV2
    from mbv2.optimized import OptimizedMobileNetV2


@dataclass(frozen=True)
class Prediction:
    """One class of a picture: its real label, its name, its probability 0..1 among the real classes."""

    label: int
    name: str
    probability: float


@dataclass
class InferOptions:
    """Say what is on a picture, or on every picture of a folder.

    Args:
        data_url: A picture file, or a folder: all pictures under it, in sorted order.
        pretrained: Weights: a .pth, .safetensors or .ckpt file, or True for torchvision's published ones.
        alpha: Width multiplier (default: from the weights).
        resize: Side of the network's input in pixels (default: from the weights, else 224).
        num_classes: All logits (default: from the weights).
        class_offset: 1 when logit 0 is a background class (default: from the weights, else 0).
        topk: How many classes to name for each picture.
        output: Folder for annotated copies; existing files there are kept.
        json: File for the results.
        csv: File for the results.
        batch_size: Pictures per batch.
        num_parallel_workers: Loading processes, at most the cores there are.
        device_target: GPU, CPU or auto.
        on_corrupt: fail names the first broken picture and stops; skip names broken ones and goes on.
        dtype: int8 computes in 8 bits, on CPUs.
        calibrate: With int8, a folder of pictures to measure ranges on; 200 are used (default: what the weights
            file has of `mbv2 export --format int8`).
        mean: Per channel, on values 0..1 (default: from the weights, else ImageNet's).
        std: Per channel, on values 0..1 (default: from the weights, else ImageNet's).
    """

    data_url: str = ""
    pretrained: str = ""
    alpha: float | None = None
    resize: int | None = None
    num_classes: int | None = None
    class_offset: int | None = None
    topk: int = 1
    output: str = ""
    json: str = ""
    csv: str = ""
    batch_size: int = 64
    num_parallel_workers: int = 8
    device_target: str = "auto"
    on_corrupt: Literal["fail", "skip"] = "fail"
    dtype: Literal["none", "int8"] = "none"
    calibrate: str = ""
    mean: list[float] | None = None
    std: list[float] | None = None


def find_pictures(data_url: str, option: str = "--data_url") -> "Source":
    """The picture file, or the pictures under the folder in sorted order, as an unlabelled source (label 0).

    Raises:
        UserError: no such file or folder, or no picture in it.
    """
    from mbv2.data.sources import IMAGE_SUFFIXES, Sample, Source, image_files

    path = Path(data_url)
    if not data_url or not path.exists():
        raise UserError(f"no picture or folder at {data_url!r}; give {option} a picture file or a folder of them")
    if path.is_dir():
        samples = [Sample(str(file.relative_to(path)), 0, str(file)) for file in image_files(path)]
        if not samples:
            raise UserError(f"{option} {data_url}: holds no picture ({', '.join(sorted(IMAGE_SUFFIXES))})")
    else:
        samples = [Sample(path.name, 0, str(path))]
    return Source(samples, ["unknown"])


def predict(
    model: "MobileNetV2 | OptimizedMobileNetV2", loader: "Loader", class_names: Sequence[str], topk: int = 1
) -> Iterator[tuple[str, list[Prediction]]]:
    """Yield (picture's name, its `topk` classes best first) in the loader's order.

    `model` must be in evaluation mode on the loader's device; `topk` beyond the number of classes gives them all.
    """
    k = min(topk, model.num_real_classes)
    for images, _, names in loader:
        with torch.no_grad():
            # Ties are broken by the lower label everywhere, which torch.topk does not promise.
            chances = model.real_logits(model(images)).float().softmax(dim=1).cpu()
        values, labels = chances.sort(dim=1, descending=True, stable=True)
        for name, row, row_labels in zip(names, values[:, :k].tolist(), labels[:, :k].tolist(), strict=True):
            yield name, [Prediction(x, class_names[x], p) for x, p in zip(row_labels, row, strict=True)]


def main(argv: Sequence[str]) -> int:
    """`mbv2 infer`: one `{283: 'Persian cat'}` line per picture on stdout, the rest on stderr or in files.

    Raises:
        UserError: bad options, weights or pictures.
    """
    from mbv2.calibration import check_options

    options, described = options_cli.parse(InferOptions, argv, "mbv2 infer", InferOptions.__doc__.splitlines()[0])
    check_options(options.dtype, options.calibrate)
    if options.topk < 1:
        raise UserError(f"--topk {options.topk}: must be at least 1")
    for option in ("json", "csv"):
        options_cli.check_writable(getattr(options, option), f"--{option}")
    pictures = find_pictures(options.data_url)
    output = _output_folder(options)
    world = distributed.init(options.device_target, run_distribute=False)
    trained = load_trained(
        options.pretrained,
        options.alpha,
        options.resize,
        options.num_classes,
        options.class_offset,
        options.mean,
        options.std,
        described,
    )
    if output is not None:
        _make(output)
    results = _run(options, trained, pictures, world, output)
    if options.json:
        options_cli.write_text(options.json, _as_json(results), "--json")
    if options.csv:
        options_cli.write_text(options.csv, _as_csv(results), "--csv")
    missing = [sample.name for sample in pictures.samples if sample.name not in results]
    if missing:
        print(f"infer: skipped {len(missing)} broken pictures: {', '.join(missing)}", file=sys.stderr)
    return 0


def _run(
    options: InferOptions,
    trained: Trained,
    pictures: "Source",
    world: distributed.World,
    output: Path | None,
) -> dict[str, list[Prediction]]:
    from mbv2.calibration import int8_network
    from mbv2.data import make_loader
    from mbv2.data.decode import decode
    from mbv2.optimized import fastest

    if options.dtype == "int8":
        model, runs = int8_network(trained, world.device, options.calibrate, progress=True)
    else:
        model, runs = fastest(trained.model, world.device)
    print(f"infer: {trained.source}, {world.device.type}, {runs}", file=sys.stderr)
    count = len(pictures.samples)
    loader = make_loader(
        "torch",
        pictures,
        trained.recipe,
        False,
        options.batch_size,
        world,
        # Starting processes takes longer than reading a batch or two here.
        workers=options.num_parallel_workers if count > 2 * options.batch_size else 0,
        on_corrupt=options.on_corrupt,
    )
    by_name = {sample.name: sample for sample in pictures.samples}
    # Lines and a bar would garble each other on one terminal.
    has_bar = sys.stderr.isatty() and not sys.stdout.isatty()
    results: dict[str, list[Prediction]] = {}
    try:
        with Progress(count, "infer", enabled=has_bar or not sys.stderr.isatty()) as progress:
            for name, predictions in predict(model, loader, trained.class_names, options.topk):
                results[name] = predictions
                if not has_bar:
                    print(f"{name}:", file=sys.stderr, flush=True)
                print({prediction.label: prediction.name for prediction in predictions}, flush=True)
                if output is not None:
                    image = decode(pictures.read(by_name[name]), name)
                    shown = [(prediction.name, prediction.probability) for prediction in predictions]
                    save_fresh(annotate(_as_pil(image), shown), output, name)
                progress.advance()
    finally:
        loader.close()
    if output is not None:
        print(f"infer: annotated pictures in {output}", file=sys.stderr)
    return results


def _output_folder(options: InferOptions) -> Path | None:
    """Where annotated copies go; never where the input is.

    Raises:
        UserError: the folder is the input's, or inside the input folder, or a file.
    """
    if not options.output:
        return None
    output, given = Path(options.output).resolve(), Path(options.data_url).resolve()
    folder = given if given.is_dir() else given.parent
    if output == folder or (given.is_dir() and folder in output.parents):
        raise UserError(f"--output {options.output}: lies in the input folder, which is never written to; give another")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {options.output}: is a file; give a folder")
    return Path(options.output)


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {folder}: cannot be made ({error.strerror})") from error


def _as_pil(image: torch.Tensor) -> Image.Image:

    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())


def _as_json(results: dict[str, list[Prediction]]) -> str:
    content = [
        {
            "file": name,
            "predictions": [{"class": p.label, "name": p.name, "probability": p.probability} for p in predictions],
        }
        for name, predictions in results.items()
    ]
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _as_csv(results: dict[str, list[Prediction]]) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["file", "rank", "class", "name", "probability"])
    for name, predictions in results.items():
        for rank, p in enumerate(predictions, start=1):
            writer.writerow([name, rank, p.label, p.name, f"{p.probability:.6f}"])
    return table.getvalue()
