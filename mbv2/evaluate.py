"""`mbv2 eval`: top-1 and top-5 accuracy over a validation set, in one process or many, exactly."""

import csv
import io
import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mbv2 import distributed, options_cli
from mbv2.errors import UserError
from mbv2.progress import Progress
from mbv2.trained import Trained, load_trained

if TYPE_CHECKING:
    from mbv2.data import Loader, Source
    from mbv2.distributed import World
    from mbv2.model import MobileNetV2
    from mbv2.optimized import OptimizedMobileNetV2

AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found, over all processes.

    Attributes:
        top1, top5: shares of the pictures, 0..1; top-5 is top-n where there are fewer than 5 classes.
        count: pictures evaluated.
        loss: mean cross-entropy over all logits.
        right1, right5: the pictures right, the counts behind top1 and top5.
        confusion: int64 [n, n] on the CPU, rows true classes, columns predictions; None unless asked for.
        top5_by_class: int64 [n] on the CPU, pictures of each class right in the top 5; None unless asked for.
    """

    top1: float
    top5: float
    count: int
    loss: float
    right1: int
    right5: int
    confusion: Tensor | None = None
    top5_by_class: Tensor | None = None


@dataclass
class EvalOptions:
    """Evaluate trained weights on a folder of labelled pictures.

    Args:
        pretrained: Weights: a .pth, .safetensors or .ckpt file, or True for torchvision's published ones.
        data_url: Folder with the pictures: val/ with a folder per class, labels.csv, or tar shards.
        alpha: Width multiplier (default: from the weights).
        resize: Side of the network's input in pixels (default: from the weights, else 224).
        num_classes: All logits (default: from the weights).
        class_offset: 1 when logit 0 is a background class (default: from the weights, else 0).
        batch_size: Pictures per batch and process.
        num_parallel_workers: Loading processes or threads per process, at most the cores there are.
        loader: Which loader reads the pictures.
        device_target: GPU, CPU or auto.
        on_corrupt: fail names the first broken picture and stops; skip leaves broken ones out and counts them.
        dtype: Mixed precision: none, fp16 or bf16; or int8, on CPUs.
        calibrate: With int8, a folder of pictures to measure ranges on, best not those evaluated; 200 are used
            (default: what the weights file has of `mbv2 export --format int8`).
        mean: Per channel, on values 0..1 (default: from the weights, else ImageNet's).
        std: Per channel, on values 0..1 (default: from the weights, else ImageNet's).
        json: File for the figures and how they came about.
        per_class_csv: File for the accuracy of each class.
        confusion_png: File for a picture of the confusion matrix, for few classes.
    """

    pretrained: str = ""
    data_url: str = ""
    alpha: float | None = None
    resize: int | None = None
    num_classes: int | None = None
    class_offset: int | None = None
    batch_size: int = 64
    num_parallel_workers: int = 8
    loader: Literal["auto", "torch", "dali"] = "auto"
    device_target: str = "auto"
    on_corrupt: Literal["fail", "skip"] = "fail"
    dtype: Literal["none", "fp16", "bf16", "int8"] = "none"
    calibrate: str = ""
    mean: list[float] | None = None
    std: list[float] | None = None
    json: str = ""
    per_class_csv: str = ""
    confusion_png: str = ""


def evaluate_model(
    model: "MobileNetV2 | OptimizedMobileNetV2",
    loader: "Loader",
    world: "World",
    progress: bool = False,
    per_class: bool = False,
    dtype: torch.dtype | None = None,
) -> Metrics:
    """Run `model` over every batch of `loader` and count, summed over all ranks; every rank must call it.

    Counts are integers, so the accuracies do not depend on how many ranks share the work. The extra class takes
    no part in top-k, and a picture whose logits are not finite is wrong. The model is put into evaluation mode
    and then back into the one it was in.

    Args:
        model: on the loader's device.
        loader: labels are 0-based real classes.
        world: the ranks to sum over.
        progress: show it on rank 0's stderr.
        per_class: also fill `confusion` and `top5_by_class`.
        dtype: autocast to this type; None computes in the model's own.

    Raises:
        UserError: a label outside the model's classes, or no picture at all. Raised on all ranks together.
    """
    classes, device = model.num_real_classes, world.device
    counts = torch.zeros(4, dtype=torch.int64, device=device)  # right in top-1, in top-5, pictures, labels outside
    loss = torch.zeros((), dtype=torch.float64, device=device)
    size = classes if per_class else 0
    confusion = torch.zeros(size * size, dtype=torch.int64, device=device)
    by_class = torch.zeros(size, dtype=torch.int64, device=device)
    was_training = model.training
    model.eval()
    try:
        shown = Progress(loader.num_samples, "eval", enabled=progress and world.is_main)
        with torch.no_grad(), shown:
            for images, labels, _ in loader:
                with nullcontext() if dtype is None else torch.autocast(device.type, dtype):
                    logits = model(images)
                outside = (labels < 0) | (labels >= classes)
                labels = labels.masked_fill(outside, 0)
                loss += F.cross_entropy(logits.float(), model.targets(labels), reduction="sum").double()
                real = model.real_logits(logits).float()
                best = real.topk(min(5, classes), dim=1).indices
                hits = (best == labels[:, None]) & real.isfinite().all(dim=1, keepdim=True)
                top1, top5 = hits[:, 0], hits.any(dim=1)
                ones = torch.ones_like(labels)
                counts += torch.stack([top1.sum(), top5.sum(), ones.sum(), outside.sum()])
                if per_class:
                    confusion.index_add_(0, labels * classes + best[:, 0], ones)
                    by_class.index_add_(0, labels, top5.long())
                shown.advance(min(len(labels) * world.world_size, loader.num_samples - shown.done))
    finally:
        model.train(was_training)
    for tensor in (counts, loss, confusion, by_class):
        world.all_reduce_sum(tensor)
    right1, right5, count, outside_count = counts.tolist()
    if outside_count:
        raise UserError(
            f"{outside_count} pictures have labels outside the model's {classes} classes (0..{classes - 1}); "
            "evaluate on data of the classes the weights were trained on"
        )
    if count == 0:
        raise UserError("no picture could be evaluated: the validation data is empty, or every picture is broken")
    return Metrics(
        right1 / count,
        right5 / count,
        count,
        loss.item() / count,
        right1,
        right5,
        confusion.view(classes, classes).cpu() if per_class else None,
        by_class.cpu() if per_class else None,
    )


def main(argv: Sequence[str]) -> int:
    """`mbv2 eval`: the figures alone on stdout, everything else on stderr.

    Raises:
        UserError: bad options, weights or data.
    """
    from mbv2.calibration import check_options

    options, described = options_cli.parse(EvalOptions, argv, "mbv2 eval", EvalOptions.__doc__.splitlines()[0])
    check_options(options.dtype, options.calibrate)
    for option in ("json", "per_class_csv", "confusion_png"):
        options_cli.check_writable(getattr(options, option), f"--{option}")
    world = distributed.init(options.device_target)
    try:
        _run(options, described, world)
    finally:
        distributed.shutdown()
    return 0


def _run(options: EvalOptions, described: dict[str, Any], world: "World") -> None:
    from mbv2.calibration import int8_network
    from mbv2.data import choose_loader, make_loader, open_source
    from mbv2.optimized import fastest

    trained = _load(options, described, world)
    source = open_source(options.data_url, "val", trained.class_names if trained.names_are_own else None)
    _check_classes(source, trained, options, world)
    kind, why = choose_loader(options.loader, world.device)
    dtype = AMP_DTYPES.get(options.dtype)  # int8 is no mixed precision
    if options.dtype == "int8":
        model, runs = int8_network(trained, world.device, options.calibrate, world.is_main)
    else:
        model, runs = fastest(trained.model, world.device, dtype)
    _say(
        world,
        f"eval: {trained.source}, alpha {trained.model.width_mult:g}, {trained.recipe.resolution} px, "
        f"{len(source.samples)} pictures, {kind} loader ({why}), {world.world_size} x {world.device.type}, {runs}",
    )
    loader = make_loader(
        kind,
        source,
        trained.recipe,
        False,
        options.batch_size,
        world,
        workers=options.num_parallel_workers,
        on_corrupt=options.on_corrupt,
    )
    per_class = bool(options.per_class_csv or options.confusion_png)
    started = time.perf_counter()
    try:
        metrics = evaluate_model(model, loader, world, True, per_class, dtype)
        skipped = int(world.all_reduce_sum(torch.tensor(loader.skipped)))
    finally:
        loader.close()
    seconds = time.perf_counter() - started
    if not world.is_main:
        return
    _say(
        world,
        f"eval: {metrics.right1} right of {metrics.count} (top-5: {metrics.right5}), loss {metrics.loss:.4f}, "
        f"{metrics.count / seconds:.1f} img/s" + (f"; skipped {skipped} broken pictures" if skipped else ""),
    )
    _write_results(options, trained, source, metrics, kind, runs, world, seconds, skipped)
    print({"Top_1_Accuracy": metrics.top1, "Top_5_Accuracy": metrics.top5}, flush=True)


def _load(options: EvalOptions, described: dict[str, Any], world: "World") -> Trained:
    arguments = (
        options.pretrained,
        options.alpha,
        options.resize,
        options.num_classes,
        options.class_offset,
        options.mean,
        options.std,
        described,
    )
    if options.pretrained.lower() == "true" and world.world_size > 1:
        # One process per machine downloads into the cache; the others then find it there.
        if world.local_rank == 0:
            trained = load_trained(*arguments)
        world.barrier()
        return trained if world.local_rank == 0 else load_trained(*arguments)
    return load_trained(*arguments)


def _check_classes(source: "Source", trained: Trained, options: EvalOptions, world: "World") -> None:
    classes = trained.model.num_real_classes
    worst = max(source.samples, key=lambda sample: sample.label)
    if worst.label >= classes:
        raise UserError(
            f"--data_url {options.data_url}: {worst.name} has label {worst.label}, but the weights know {classes} "
            f"classes (0..{classes - 1}); evaluate on data of the classes they were trained on"
        )
    named = not all(name.startswith("class ") for name in source.class_names)
    if named and source.num_classes != classes:
        _say(
            world,
            f"eval: note: {options.data_url} has {source.num_classes} classes, the weights {classes}; "
            "the data's classes are numbered by their folders' sorted names",
        )
    if options.confusion_png:
        from mbv2.plots import MAX_CONFUSION_CLASSES

        if classes > MAX_CONFUSION_CLASSES:
            raise UserError(
                f"--confusion_png: {classes} classes are unreadable in a picture (at most {MAX_CONFUSION_CLASSES}); "
                "use --per_class_csv"
            )


def _write_results(
    options: EvalOptions,
    trained: Trained,
    source: "Source",
    metrics: Metrics,
    kind: str,
    runs: str,
    world: "World",
    seconds: float,
    skipped: int,
) -> None:
    if options.json:
        content = {
            "Top_1_Accuracy": metrics.top1,
            "Top_5_Accuracy": metrics.top5,
            "top1_right": metrics.right1,
            "top5_right": metrics.right5,
            "count": metrics.count,
            "skipped": skipped,
            "loss": metrics.loss,
            "pretrained": trained.source,
            "data_url": options.data_url,
            "alpha": trained.model.width_mult,
            "resize": trained.recipe.resolution,
            "num_classes": trained.model.num_classes,
            "class_offset": trained.model.class_offset,
            "mean": trained.recipe.mean,
            "std": trained.recipe.std,
            "loader": kind,
            "device": world.device.type,
            "processes": world.world_size,
            "dtype": options.dtype,
            "runs": runs,
            "torch": torch.__version__,
            "seconds": round(seconds, 3),
        }
        options_cli.write_text(options.json, json.dumps(content, indent=2) + "\n", "--json")
    names = trained.class_names if trained.names_are_own else source.class_names
    names = names if len(names) == trained.model.num_real_classes else trained.class_names
    if options.per_class_csv:
        options_cli.write_text(options.per_class_csv, _per_class(metrics, names), "--per_class_csv")
    if options.confusion_png:
        from mbv2.plots import draw_confusion

        draw_confusion(metrics.confusion, names, options.confusion_png)


def _per_class(metrics: Metrics, names: list[str]) -> str:
    """CSV text, one line per class that has a picture; accuracies are shares of its pictures, 0..1."""
    assert metrics.confusion is not None and metrics.top5_by_class is not None
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["class", "name", "count", "top1_right", "top5_right", "top1", "top5"])
    totals = metrics.confusion.sum(dim=1).tolist()
    right1, right5 = metrics.confusion.diagonal().tolist(), metrics.top5_by_class.tolist()
    for label, (name, total, one, five) in enumerate(zip(names, totals, right1, right5, strict=True)):
        if total:
            writer.writerow([label, name, total, one, five, f"{one / total:.6f}", f"{five / total:.6f}"])
    return table.getvalue()


def _say(world: "World", line: str) -> None:
    if world.is_main:
        print(line, file=sys.stderr, flush=True)
