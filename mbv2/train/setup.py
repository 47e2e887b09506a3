"""What a run starts from: its folder, its data, its network, and the checkpoint it continues."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbv2.data import Loader, Recipe, Source, has_split, make_loader, open_source
from mbv2.data.recipe import eval_options
from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.files import fresh_dir
from mbv2.train import checkpoint

if TYPE_CHECKING:
    from mbv2.model import MobileNetV2
    from mbv2.train.options import TrainOptions
    from mbv2.weights import Weights

_SYNTHETIC_CLASSES = 1000


@dataclass(frozen=True)
class Start:
    """Where a run writes, and the state it goes on from (None: from the beginning)."""

    directory: Path
    continues: bool
    state: dict[str, Any] | None = None
    source: str = ""


@dataclass(frozen=True)
class Data:
    """The training pictures and, where there are any, the validation pictures; both None for synthetic ones."""

    train: Source | None
    val: Source | None

    @property
    def num_classes(self) -> int:
        """Real classes."""
        return self.train.num_classes if self.train else _SYNTHETIC_CLASSES


def choose_start(options: "TrainOptions") -> Start:
    """Claim the run's folder and read the checkpoint to go on from. Call it on rank 0 only.

    A folder that holds anything is never written into, unless `--resume auto` asks for it or torchrun has restarted
    the processes of the very run it holds.

    Raises:
        UserError: no readable checkpoint where one was asked for.
    """
    base = Path(options.ckpt_save_dir)
    if options.resume == "auto" and (_holds_run(base) or (base / "checkpoints").is_dir()):
        return _continued(base)
    if options.resume != "auto" and int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0:
        mine = _folder_of_this_launch(base)
        if mine is not None:
            start = _continued(mine)
            if start.state is not None or not options.resume:
                return start
            return Start(mine, True, checkpoint.load(options.resume), options.resume)
    if options.resume and options.resume != "auto":
        state = checkpoint.load(options.resume)
        return Start(fresh_dir(base), False, state, options.resume)
    return Start(fresh_dir(base), False)


def open_data(options: "TrainOptions") -> Data:
    """The training and validation split under `--data_url`.

    Raises:
        UserError: there is no training data in a known layout.
    """
    if options.loader == "synthetic":
        return Data(None, None)
    train = open_source(options.data_url, "train")
    val = None
    if has_split(options.data_url, "val"):
        val = open_source(options.data_url, "val", class_names=train.class_names)
    return Data(train, val)


def read_pretrained(options: "TrainOptions") -> "Weights | None":
    """The weights that `--pretrained` names.

    Raises:
        UserError: unreadable, or none are published for this variant.
    """
    from mbv2 import weights
    from mbv2.zoo import variant_name

    if options.pretrained is False:
        return None
    if options.pretrained is True:
        return weights.published(variant_name(options.alpha, options.resize))
    return weights.read_weights(str(options.pretrained))


def choose_classes(options: "TrainOptions", data: Data, meta: dict[str, Any], logits: int | None) -> tuple[int, int]:
    """(num_classes, class_offset) of the network: as asked for, else as the data and the weights have them.

    Args:
        options: num_classes None leaves it to the data.
        data: the classes there are.
        meta: of the pretrained weights.
        logits: of the pretrained weights, None without any.

    Raises:
        UserError: the data has more classes than asked for, or the weights number the same logits otherwise.
    """
    offset, theirs = options.class_offset, int(meta.get("class_offset", options.class_offset))
    count = options.num_classes
    if count is None:
        is_imagenet = data.train is None or data.train.is_imagenet
        if is_imagenet and logits in (1000, 1001):
            return logits, theirs
        # The seed's 1001 for ImageNet: TF's background class, or MindSpore's unused last logit.
        count = 1001 if is_imagenet else data.num_classes + offset
    real = 1000 if (count, offset) == (1001, 0) else count - offset
    if data.num_classes > real:
        raise UserError(
            f"--num_classes {count} leaves {real} classes, but {options.data_url} has {data.num_classes}; "
            f"give --num_classes {data.num_classes + offset} or more, or leave it out"
        )
    if logits == count and theirs != offset:
        raise UserError(
            f"--class_offset {offset}, but {options.pretrained} was trained with {theirs}; give --class_offset {theirs}"
        )
    return count, offset


def describe(options: "TrainOptions", data: Data, model: "MobileNetV2", pretrained: dict[str, Any]) -> dict[str, Any]:
    """The `meta` that travels with the weights: what evaluation and inference need to use them.

    How pictures are normalised, squeezed, cropped and resized is taken over from the `pretrained` weights' meta.
    """
    names = list(data.train.class_names) if data.train else []
    names += [f"class {index}" for index in range(len(names), model.num_real_classes)]
    defaults = Recipe()
    meta: dict[str, Any] = {
        "alpha": options.alpha,
        "resolution": options.resize,
        "num_classes": model.num_classes,
        "class_offset": model.class_offset,
        "class_names": names,
        "mean": [float(value) for value in pretrained.get("mean") or defaults.mean],
        "std": [float(value) for value in pretrained.get("std") or defaults.std],
        "squeeze": bool(pretrained.get("squeeze", False)),
        "padding": model.padding,
        "bn_eps": model.bn_eps,
    }
    meta |= {key: pretrained[key] for key in ("crop_pct", "interpolation") if key in pretrained}
    if data.train and data.train.synsets:
        meta["class_synsets"] = list(data.train.synsets)
    return meta


def make_loaders(
    options: "TrainOptions", data: Data, model: "MobileNetV2", meta: dict[str, Any], world: World
) -> tuple[Loader, Loader | None]:
    """(training loader, validation loader or None).

    Raises:
        UserError: fewer training pictures than one step of all ranks takes, or DALI asked for and not there.
    """
    import torch

    recipe = Recipe(
        resolution=options.resize,
        mean=tuple(meta["mean"]),
        std=tuple(meta["std"]),
        **eval_options(meta, options.resize),
        area=(options.augment.area_min, 1.0),
        flip=options.augment.flip,
        trivial_augment=options.augment.trivial_augment,
        random_erasing=options.augment.random_erasing,
    )
    half = options.amp.dtype == "fp16" and world.device.type == "cuda"
    common = {
        "workers": options.num_parallel_workers,
        "seed": options.seed,
        "on_corrupt": options.on_corrupt,
        "prefetch": 2 if options.dataset_sink_mode else 1,
    }
    train = make_loader(
        options.loader,
        data.train,
        recipe,
        True,
        options.batch_size,
        world,
        dtype=torch.float16 if half else torch.float32,
        repeat=options.repeat_num,
        num_classes=model.num_real_classes,
        **common,
    )
    if data.val is None:
        return train, None
    return train, make_loader(options.loader, data.val, recipe, False, options.batch_size, world, **common)


def _continued(directory: Path) -> Start:
    found = checkpoint.load_newest(directory / "checkpoints")
    if found is None:
        return Start(directory, True)
    return Start(directory, True, found[0], str(found[1]))


def _holds_run(directory: Path) -> bool:
    return (directory / "config.yaml").is_file() or (directory / "metrics.csv").is_file()


def _folder_of_this_launch(base: Path) -> Path | None:
    """The folder that this torchrun's earlier processes claimed: `base` or a numbered sibling, the newest first."""
    launch = os.environ.get("TORCHELASTIC_RUN_ID")
    siblings = [base, *base.parent.glob(f"{base.name}-*")]
    numbered = {path: _number(path, base) for path in siblings}
    for path in sorted((path for path in siblings if numbered[path] >= 0), key=lambda path: -numbered[path]):
        try:
            described = json.loads((path / "environment.json").read_text())
        except (OSError, ValueError):
            continue
        if described.get("variables", {}).get("TORCHELASTIC_RUN_ID") == launch:
            return path
    return None


def _number(path: Path, base: Path) -> int:
    if path == base:
        return 0
    end = path.name.removeprefix(f"{base.name}-")
    return int(end) if end.isascii() and end.isdigit() else -1
