"""One epoch of training, and everything about a run in progress that a checkpoint must hold."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.train import checkpoint
from mbv2.train.agreement import AgreedError, Control
from mbv2.train.batch_augment import BatchAugment
from mbv2.train.ema import Ema
from mbv2.train.log import RunLog
from mbv2.train.optimizer import set_lr
from mbv2.train.schedule import Schedule
from mbv2.train.signals import StopRequest

if TYPE_CHECKING:
    from mbv2.data import Batch, Loader
    from mbv2.model import MobileNetV2
    from mbv2.train.options import TrainOptions

AMP_DTYPES = {"none": None, "fp16": torch.float16, "bf16": torch.bfloat16}
# fp16's scaler starts at 2^16 and halves at each overflow: more in a row than this is no matter of scale.
_MOST_OVERFLOWS = 24
# Reading a loss waits for the GPU, so it is done for several steps at once.
_STEPS_UNREAD = 20


@dataclass
class Progress:
    """Where a run is: `step` optimizer steps of epoch `epoch` are done, with this sum of losses over this time."""

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    losses: int = 0
    seconds: float = 0.0
    overflows: int = 0
    best_score: float = -math.inf
    best_epoch: int = -1

    @property
    def loss_avg(self) -> float:
        """Mean loss of this epoch so far; NaN before the first step."""
        return self.loss_sum / self.losses if self.losses else math.nan

    def next_epoch(self) -> None:
        """Stand before the first step of the epoch after this one."""
        self.epoch, self.step = self.epoch + 1, 0
        self.loss_sum, self.losses, self.seconds = 0.0, 0, 0.0


@dataclass
class Training:
    """The parts of a run that change while it trains.

    Attributes:
        model: the network itself.
        module: what a batch goes through: the network, or DistributedDataParallel around it.
        optimizer, scaler, schedule, ema: scaler does nothing unless fp16; ema may be None.
        progress: where it is.
    """

    model: "MobileNetV2"
    module: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: Schedule
    ema: Ema | None
    progress: Progress = field(default_factory=Progress)

    def snapshot(self, world: World) -> dict[str, Any]:
        """All of it, fit for `checkpoint.save`; every rank must call it, as each has random generators of its own."""
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
            "ema_updates": self.ema.updates if self.ema else 0,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "progress": dict(vars(self.progress)),
            "rng": world.gather_objects(checkpoint.rng_state()),
        }

    def restore(self, state: dict[str, Any], world: World) -> None:
        """Stand where `snapshot` was taken.

        Raises:
            UserError: it is of another network or optimizer.
        """
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema and state["ema"]:
                self.ema.load(state["ema"], state["ema_updates"])
            elif self.ema:
                self.ema = Ema(self.model, self.ema.decay)
            if self.scaler.is_enabled() and state["scaler"]:
                self.scaler.load_state_dict(state["scaler"])
            self.progress = Progress(**state["progress"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--resume: the checkpoint does not fit these options ({reason}); resume with the options of that run"
            ) from error
        if len(state["rng"]) == world.world_size:
            checkpoint.set_rng_state(state["rng"][world.rank])


def set_train_mode(model: "MobileNetV2", freeze_backbone: bool) -> None:
    """Training mode; a frozen backbone keeps normalising with the statistics it came with."""
    model.train()
    if freeze_backbone:
        model.features.eval()


def share_buffers(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's BatchNorm statistics, so that all evaluate and save the same network."""
    if world.is_distributed:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


@contextmanager
def preserved_rng() -> Iterator[None]:
    """Put the CPU's generator back: a loader draws a worker seed from it, but not when a run is resumed."""
    before = torch.get_rng_state()
    try:
        yield
    finally:
        torch.set_rng_state(before)


def train_epoch(
    training: Training,
    options: "TrainOptions",
    loader: "Loader",
    augment: BatchAugment,
    world: World,
    control: Control,
    stop: StopRequest,
    log: RunLog,
    last_good: str,
) -> bool:
    """Train from where `training.progress` stands to the end of that epoch.

    Returns:
        False when a signal asked to stop before that; progress then stands at the step to continue with.

    Raises:
        AgreedError: on every rank: data that cannot be read, or a loss that is not finite.
    """
    progress, accumulated = training.progress, options.grad_accumulation
    batches = len(loader)
    steps = math.ceil(batches / accumulated)
    log_interval = options.log_interval or max(1, steps // 20)
    read_interval = 1 if world.device.type == "cpu" else min(log_interval, _STEPS_UNREAD)
    criterion = nn.CrossEntropyLoss(label_smoothing=options.smooth_factor)
    set_train_mode(training.model, options.freeze_backbone)
    loader.set_epoch(progress.epoch, progress.step * accumulated)
    iterator = iter(loader)
    unread: list[tuple[int, float, Tensor]] = []
    before, started = progress.seconds, time.perf_counter()
    images, since = 0, started
    while progress.step < steps:
        done = progress.step * accumulated
        group, error = _fetch(iterator, min(accumulated, batches - done))
        if control.stop(stop.requested, error):
            _read_losses(training, unread, world, last_good)
            progress.seconds = before + time.perf_counter() - started
            return False
        lr = training.schedule.lr(progress.epoch * steps + progress.step)
        set_lr(training.optimizer, lr)
        loss = _optimizer_step(training, options, criterion, augment, group, done, world)
        progress.step += 1
        unread.append((progress.step, lr, loss))
        images += sum(len(batch.labels) for batch in group) * world.world_size
        logged = progress.step % log_interval == 0 or progress.step == steps
        if logged or progress.step % read_interval == 0:
            latest = _read_losses(training, unread, world, last_good)
        if logged:
            now = time.perf_counter()
            progress.seconds = before + now - started
            speed = images / max(now - since, 1e-9)
            log.step(
                progress.epoch,
                options.epoch_size,
                progress.step,
                steps,
                latest,
                progress.loss_avg,
                progress.seconds,
                lr,
                speed,
            )
            images, since = 0, now
    return True


def _fetch(iterator: Iterator["Batch"], count: int) -> tuple[list["Batch"], str | None]:
    """The next `count` batches, or why they cannot be had."""
    try:
        with preserved_rng():
            group = list(islice(iterator, count))
    except UserError as error:
        return [], str(error)
    if len(group) != count:
        return [], f"the loader ended {count - len(group)} batches too soon"
    return group, None


def _optimizer_step(
    training: Training,
    options: "TrainOptions",
    criterion: nn.Module,
    augment: BatchAugment,
    group: list["Batch"],
    first_batch: int,
    world: World,
) -> Tensor:
    """Forward and backward of each batch of the group, one step of the optimizer; returns this rank's mean loss."""
    dtype = AMP_DTYPES[options.amp.dtype]
    total = torch.zeros((), device=world.device)
    for index, batch in enumerate(group):
        targets = training.model.targets(batch.labels)
        images, targets = augment(batch.images, targets, training.progress.epoch, first_batch + index)
        is_last = index == len(group) - 1
        # Gradients go over the network once per step, with the last batch.
        quiet = nullcontext() if is_last or training.module is training.model else training.module.no_sync()
        with quiet:
            with nullcontext() if dtype is None else torch.autocast(world.device.type, dtype):
                logits = training.module(images)
            # The last group of an epoch may be short: its own size keeps its loss a mean.
            loss = criterion(logits if dtype is None else logits.float(), targets) / len(group)
            training.scaler.scale(loss).backward()
        total += loss.detach()
    if options.clip_grad_norm > 0:
        training.scaler.unscale_(training.optimizer)
        nn.utils.clip_grad_norm_(training.model.parameters(), options.clip_grad_norm)
    training.scaler.step(training.optimizer)
    training.scaler.update()
    training.optimizer.zero_grad(set_to_none=True)
    if training.ema:
        training.ema.update(training.model)
    return total


def _read_losses(training: Training, unread: list[tuple[int, float, Tensor]], world: World, last_good: str) -> float:
    """Add the losses, meaned over the ranks, to the progress; returns the latest.

    Raises:
        AgreedError: one is not finite, and with fp16 so were many before it.
    """
    if not unread:
        return math.nan
    progress = training.progress
    means = world.all_reduce_sum(torch.stack([loss for _, _, loss in unread])) / world.world_size
    values = means.tolist()
    for (step, lr, _), value in zip(unread, values, strict=True):
        if math.isfinite(value):
            progress.loss_sum += value
            progress.losses += 1
            progress.overflows = 0
            continue
        progress.overflows += 1
        if not training.scaler.is_enabled() or progress.overflows > _MOST_OVERFLOWS:
            raise AgreedError(
                f"the loss became {value} in epoch {progress.epoch}, step {step}, at learning rate {lr:.6g}; "
                f"last good checkpoint: {last_good}; try a lower --max_lr, --warmup_epochs or --clip_grad_norm"
            )
    unread.clear()
    return values[-1]
