"""The options of training: the seed's parameters under their names, and what goes beyond; parsed and checked."""

import argparse
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mbv2.errors import UserError

DECAY_MODES = ("cosine_decay_lr", "step", "exponential", "milestone")
AMP_DTYPES = ("none", "fp16", "bf16")
_ABOUT = "Train or fine-tune MobileNetV2."


@dataclass
class AmpOptions:
    """Mixed precision.

    Args:
        dtype: none, fp16 (with loss scaling) or bf16.
    """

    dtype: str = "none"


@dataclass
class EmaOptions:
    """Moving average of the weights.

    Args:
        decay: Share of the old average kept at each step, e.g. 0.9999; 0 keeps no average.
    """

    decay: float = 0.0


@dataclass
class AugmentOptions:
    """Augmentation of the training pictures.

    Args:
        mixup: Alpha of mixup's Beta distribution; 0 is off.
        cutmix: Alpha of cutmix's Beta distribution; 0 is off. With both, each batch gets one of them.
        trivial_augment: TrivialAugmentWide.
        random_erasing: Probability of erasing a rectangle.
        area_min: Smallest share of a picture's area that a random crop may take.
        flip: Probability of a horizontal flip.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    trivial_augment: bool = False
    random_erasing: float = 0.0
    area_min: float = 0.08
    flip: float = 0.5


@dataclass
class TrainOptions:
    """Train or fine-tune MobileNetV2.

    Args:
        device_target: GPU, CPU or auto.
        data_url: Folder with the pictures: train/ and val/ with a folder per class, labels.csv, or tar shards.
        pretrained: False, True (torchvision's published weights) or the path of a weights file to start from.
        run_distribute: Train with all processes that torchrun, mpirun or srun started.
        num_parallel_workers: Loading processes or threads per process, at most the cores there are.
        dataset_sink_mode: Prepare batches ahead of the step that needs them.
        num_classes: All logits (default: the data's classes; 1001 for ImageNet).
        batch_size: Pictures per step, process and accumulated batch.
        repeat_num: Times an epoch goes through the training data.
        momentum: Momentum of SGD.
        epoch_size: Number of epochs.
        keep_checkpoint_max: Checkpoints kept, the best one apart.
        ckpt_save_dir: Folder of the run; a fresh sibling is used when it holds a run and resume is not asked for.
        lr_decay_mode: cosine_decay_lr, step (a tenth at each third), exponential (to min_lr) or milestone.
        decay_epoch: Epochs over which the learning rate decays.
        smooth_factor: Label smoothing.
        max_lr: Highest learning rate.
        min_lr: Lowest learning rate.
        milestone: With milestone: the epochs at which each of learning_rates ends.
        learning_rates: With milestone: the learning rates.
        alpha: Width multiplier.
        resize: Side of the network's input in pixels.
        loader: auto, dali, torch or synthetic.
        on_corrupt: fail names the first broken picture and stops; skip takes another one and counts.
        seed: Of initialisation, order, augmentation and dropout.
        deterministic: Only operations whose result does not vary from run to run.
        compile: Run through torch.compile.
        channels_last: Memory layout of the convolutions' weights.
        warmup_epochs: Epochs of linear warm-up, which may be a fraction.
        weight_decay: Of convolution and classifier weights; BatchNorm and biases have none.
        resume: auto continues the run in ckpt_save_dir; a path starts a new folder from that checkpoint.
        grad_accumulation: Batches per optimizer step.
        clip_grad_norm: Largest norm of the gradients; 0 does not clip.
        sync_bn: BatchNorm statistics over all processes.
        freeze_backbone: Train the classifier only.
        dropout: Before the classifier.
        class_offset: 1 puts a background class at logit 0.
        log_interval: Optimizer steps between log lines; 0 is about 20 lines an epoch.
        tensorboard: Also write TensorBoard events.
        eval_interval: Epochs between evaluations on the validation split.
        amp: Mixed precision.
        ema: Moving average of the weights.
        augment: Augmentation.
    """

    device_target: str = "auto"
    data_url: str = ""
    pretrained: bool | str = False
    run_distribute: bool = True
    num_parallel_workers: int = 8
    dataset_sink_mode: bool = True
    num_classes: int | None = None
    batch_size: int = 64
    repeat_num: int = 1
    momentum: float = 0.9
    epoch_size: int = 200
    keep_checkpoint_max: int = 10
    ckpt_save_dir: str = "./mobilenet_v2"
    lr_decay_mode: str = "cosine_decay_lr"
    decay_epoch: int = 200
    smooth_factor: float = 0.1
    max_lr: float = 0.1
    min_lr: float = 0.0
    milestone: list[int] = field(default_factory=list)
    learning_rates: list[float] = field(default_factory=list)
    alpha: float = 1.0
    resize: int = 224
    loader: str = "auto"
    on_corrupt: str = "fail"
    seed: int = 0
    deterministic: bool = False
    compile: bool = False
    channels_last: bool = True
    warmup_epochs: float = 0
    weight_decay: float = 4e-5
    resume: str = ""
    grad_accumulation: int = 1
    clip_grad_norm: float = 0.0
    sync_bn: bool = False
    freeze_backbone: bool = False
    dropout: float = 0.2
    class_offset: int = 0
    log_interval: int = 0
    tensorboard: bool = False
    eval_interval: int = 1
    amp: AmpOptions = field(default_factory=AmpOptions)
    ema: EmaOptions = field(default_factory=EmaOptions)
    augment: AugmentOptions = field(default_factory=AugmentOptions)


def parse(argv: Sequence[str], prog: str = "mbv2 train") -> TrainOptions:
    """Options from a command line; `-c FILE.yaml` gives values that what follows it overrides.

    `--milestone 30,60` and `--milestone [30,60]` are the same. `--help` prints and raises SystemExit(0).

    Raises:
        UserError: an unknown option, a value of the wrong kind or out of range, or an unreadable YAML file.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(prog=prog, description=_ABOUT, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="YAML file with option values")
    parser.add_class_arguments(TrainOptions)
    try:
        namespace = parser.parse_args(_bracket_lists(argv))
    except (argparse.ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{_one_line(error)} (see {prog} --help)") from error
    values = namespace.as_dict()
    values.pop("config", None)
    groups = {"amp": AmpOptions, "ema": EmaOptions, "augment": AugmentOptions}
    options = TrainOptions(**(values | {name: kind(**values[name]) for name, kind in groups.items()}))
    if isinstance(options.pretrained, str) and options.pretrained.lower() in ("", "none", "false", "true"):
        options.pretrained = options.pretrained.lower() == "true"
    check(options)
    return options


def check(options: TrainOptions) -> None:
    """Refuse what no training could do, before anything is read or written.

    Raises:
        UserError: naming the option, its value and what it may be.
    """
    for name, least in (
        ("batch_size", 1),
        ("repeat_num", 1),
        ("epoch_size", 1),
        ("keep_checkpoint_max", 1),
        ("decay_epoch", 1),
        ("grad_accumulation", 1),
        ("eval_interval", 1),
        ("resize", 32),
        ("num_parallel_workers", 0),
        ("log_interval", 0),
        ("seed", 0),
    ):
        _require(getattr(options, name) >= least, name, getattr(options, name), f"must be {least} or more")
    for name in ("warmup_epochs", "weight_decay", "clip_grad_norm", "min_lr"):
        _require(_finite(getattr(options, name)), name, getattr(options, name), "must be 0 or more")
    for name in ("mixup", "cutmix"):
        value = getattr(options.augment, name)
        _require(_finite(value), f"augment.{name}", value, "must be 0 or more")
    _require(_finite(options.alpha) and options.alpha > 0, "alpha", options.alpha, "must be above 0")
    _require(_finite(options.max_lr) and options.max_lr > 0, "max_lr", options.max_lr, "must be above 0")
    _require(options.min_lr <= options.max_lr, "min_lr", options.min_lr, f"must not be above --max_lr {options.max_lr}")
    for name in ("momentum", "smooth_factor", "dropout"):
        _require(0 <= getattr(options, name) < 1, name, getattr(options, name), "must be in [0, 1)")
    _require(0 <= options.ema.decay < 1, "ema.decay", options.ema.decay, "must be in [0, 1)")
    for name in ("random_erasing", "flip"):
        value = getattr(options.augment, name)
        _require(0 <= value <= 1, f"augment.{name}", value, "must be a probability in [0, 1]")
    _require(0 < options.augment.area_min <= 1, "augment.area_min", options.augment.area_min, "must be in (0, 1]")
    _require(options.class_offset in (0, 1), "class_offset", options.class_offset, "choose 0 or 1")
    _one_of("device_target", options.device_target.lower(), ("gpu", "cuda", "cpu", "auto"))
    _one_of("loader", options.loader, ("auto", "dali", "torch", "synthetic"))
    _one_of("on_corrupt", options.on_corrupt, ("fail", "skip"))
    _one_of("lr_decay_mode", options.lr_decay_mode, DECAY_MODES)
    _one_of("amp.dtype", options.amp.dtype, AMP_DTYPES)
    if options.num_classes is not None:
        least = 1 + options.class_offset
        _require(options.num_classes >= least, "num_classes", options.num_classes, f"must be {least} or more")
    _check_schedule(options)
    _require(bool(options.ckpt_save_dir), "ckpt_save_dir", options.ckpt_save_dir, "give the folder of the run")
    if not options.data_url and options.loader != "synthetic":
        raise UserError("--data_url is needed: the folder that holds the pictures (or --loader synthetic)")
    if options.resume and options.resume != "auto" and not Path(options.resume).is_file():
        raise UserError(f"--resume {options.resume}: no such file; give auto or the path of a checkpoint")


def as_yaml(options: TrainOptions) -> str:
    """The options as YAML text that `-c` reads back."""
    import yaml

    return yaml.safe_dump(asdict(options), sort_keys=False)


def _check_schedule(options: TrainOptions) -> None:
    if options.lr_decay_mode == "exponential" and options.min_lr == 0:
        raise UserError("--lr_decay_mode exponential decays to --min_lr, which must then be above 0")
    given = bool(options.milestone or options.learning_rates)
    if options.lr_decay_mode != "milestone":
        if given:
            raise UserError("--milestone and --learning_rates need --lr_decay_mode milestone")
        _require(
            options.warmup_epochs < options.decay_epoch,
            "warmup_epochs",
            options.warmup_epochs,
            f"must be less than --decay_epoch {options.decay_epoch}",
        )
        return
    if not given or len(options.milestone) != len(options.learning_rates):
        raise UserError(
            f"--milestone {options.milestone} and --learning_rates {options.learning_rates} must be of one length, "
            "at least 1"
        )
    rising = all(a < b for a, b in zip([0, *options.milestone], options.milestone, strict=False))
    _require(rising, "milestone", options.milestone, "must be rising epochs above 0")
    positive = all(_finite(rate) for rate in options.learning_rates)
    _require(positive, "learning_rates", options.learning_rates, "must be 0 or more")


def _finite(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _require(holds: bool, name: str, value: Any, rule: str) -> None:
    if not holds:
        raise UserError(f"--{name} {value}: {rule}")


def _one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    _require(value in choices, name, value, f"choose {', '.join(choices)}")


def _bracket_lists(argv: Sequence[str]) -> list[str]:
    """`--milestone 30,60` as `--milestone=[30,60]`, the form jsonargparse takes."""
    out: list[str] = []
    rest = iter(argv)
    for token in rest:
        name, equals, value = token.partition("=")
        if name in ("--milestone", "--learning_rates"):
            value = value if equals else next(rest, "")
            value = value if value.startswith("[") else f"[{value}]"
            out.append(f"{name}={value}")
        else:
            out.append(token)
    return out


def _one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("Given value type", "Subclass types"))]
    return re.sub(r'Parser key "([^"]+)"', r"--\1", " ".join(kept[:3])).rstrip(":.")
