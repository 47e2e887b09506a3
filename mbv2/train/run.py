"""`mbv2 train`: a whole run, from the options to the last checkpoint."""

import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mbv2 import distributed, weights
from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.evaluate import Metrics, evaluate_model
from mbv2.files import write_atomic
from mbv2.model import MobileNetV2, as_channels_last, share_batch_statistics
from mbv2.plots import draw_curves
from mbv2.train import checkpoint, environment, setup
from mbv2.train.agreement import AgreedError, Control, on_main, together
from mbv2.train.batch_augment import BatchAugment
from mbv2.train.ema import Ema
from mbv2.train.log import RunLog
from mbv2.train.loop import AMP_DTYPES, Training, preserved_rng, share_buffers, train_epoch
from mbv2.train.optimizer import make_optimizer
from mbv2.train.options import TrainOptions, as_yaml, parse
from mbv2.train.schedule import Schedule
from mbv2.train.signals import EXIT_PREEMPTED, StopRequest

if TYPE_CHECKING:
    from mbv2.data import Batch, Loader


def main(argv: Sequence[str]) -> int:
    """`mbv2 train`: 0 when trained, 2 for what the user can put right, 75 when stopped by a signal and resumable.

    Raises:
        UserError: bad options, or something only this rank met.
    """
    options = parse(argv)
    try:
        world = distributed.init(options.device_target, options.run_distribute)
        try:
            return train(options, world)
        except AgreedError as error:
            if world.is_main:
                print(f"mbv2: error: {error}", file=sys.stderr, flush=True)
            # The launcher ends all ranks when the first one leaves; rank 0 must have said why by then.
            world.barrier()
            return 2
    finally:
        distributed.shutdown()


def train(options: TrainOptions, world: World) -> int:
    """Train as `options` say; every rank must call it. Returns the exit code, 0 or 75.

    Raises:
        AgreedError: on every rank, for anything a user can put right.
    """
    with _determinism(options.deterministic, world), StopRequest() as stop:
        start = on_main(world, lambda: setup.choose_start(options))
        data = together(world, lambda: setup.open_data(options))
        pretrained = None if start.state else on_main(world, lambda: setup.read_pretrained(options))
        model, meta, sentences = together(world, lambda: _make_model(options, data, start.state, pretrained))
        options = replace(options, num_classes=model.num_classes, class_offset=model.class_offset)
        loader, val_loader = together(world, lambda: setup.make_loaders(options, data, model, meta, world))
        log = None
        try:
            training = _prepare(options, model, loader, world)
            if start.state:
                together(world, lambda: _resume(training, start, options, world))
            log = together(world, lambda: RunLog(start.directory, world, options.tensorboard, resume=start.continues))
            at = training.progress
            on_main(world, lambda: _open_run(log, start, options, world, at.epoch, at.step, sentences))
            run = _Run(options, world, start.directory, training, meta, loader, val_loader, log, start.source)
            return run.train(stop)
        finally:
            if log is not None:
                log.close()
            loader.close()
            if val_loader is not None:
                val_loader.close()


class _Run:
    """A run under way: epochs, and what is written after each."""

    def __init__(
        self,
        options: TrainOptions,
        world: World,
        directory: Path,
        training: Training,
        meta: dict[str, Any],
        loader: "Loader",
        val_loader: "Loader | None",
        log: RunLog,
        last_good: str,
    ) -> None:
        self.options, self.world, self.directory = options, world, directory
        self.training, self.meta, self.loader, self.val_loader = training, meta, loader, val_loader
        self.log, self.last_good = log, last_good or "none yet"

    def train(self, stop: StopRequest) -> int:
        options, progress = self.options, self.training.progress
        if progress.epoch >= options.epoch_size:
            self.log.text(f"Nothing to do: {self.directory} has all {options.epoch_size} epochs (see --epoch_size)")
            return 0
        augment = BatchAugment(
            self.training.model.num_classes,
            options.augment.mixup,
            options.augment.cutmix,
            options.seed,
            self.world.rank,
        )
        control = Control(self.world)
        while progress.epoch < options.epoch_size:
            finished = train_epoch(
                self.training,
                options,
                self.loader,
                augment,
                self.world,
                control,
                stop,
                self.log,
                self.last_good,
            )
            if not finished:
                self._preempted()
                return EXIT_PREEMPTED
            self._end_epoch()
        best = f", best in epoch {progress.best_epoch}" if progress.best_epoch >= 0 else ""
        self.log.text(f"Trained {options.epoch_size} epochs{best}; results in {self.directory}")
        return 0

    def _end_epoch(self) -> None:
        training, progress, options = self.training, self.training.progress, self.options
        epoch, steps, loss_avg, seconds = progress.epoch, progress.step, progress.loss_avg, progress.seconds
        evaluated = training.ema.model if training.ema else training.model
        for network in {id(training.model): training.model, id(evaluated): evaluated}.values():
            share_buffers(network, self.world)
        started = time.perf_counter()
        metrics, skipped = self._evaluate(evaluated)
        logged = {
            "lr": training.optimizer.param_groups[0]["lr"],
            "images_per_s": steps * options.grad_accumulation * options.batch_size * self.world.world_size / seconds,
            "skipped": skipped,
        }
        score = -loss_avg if self.val_loader is None else -math.inf
        if metrics is not None:
            score = metrics.top1
            logged |= {
                "val_loss": metrics.loss,
                "top1": metrics.top1,
                "top5": metrics.top5,
                "eval_seconds": time.perf_counter() - started,
            }
        is_best = score > progress.best_score
        if is_best:
            progress.best_score, progress.best_epoch = score, epoch
        progress.next_epoch()
        # The log comes first: resuming forgets what was logged beyond the checkpoint, but cannot make up what was not.
        on_main(self.world, lambda: self.log.epoch(epoch, seconds, steps, loss_avg, logged))
        self._save(epoch, 0, is_best)
        on_main(self.world, lambda: self._save_results(evaluated, is_best))

    def _evaluate(self, model: MobileNetV2) -> tuple[Metrics | None, int]:
        """The metrics (None in an epoch without evaluation), and the broken pictures of this epoch on all ranks."""
        skipped = self.loader.skipped
        metrics = None
        due = (self.training.progress.epoch + 1) % self.options.eval_interval == 0
        if self.val_loader is not None and (due or self.training.progress.epoch + 1 == self.options.epoch_size):
            guarded = _GuardedLoader(self.val_loader)
            dtype = AMP_DTYPES[self.options.amp.dtype]

            def evaluate() -> Metrics | None:
                try:
                    found = evaluate_model(model, guarded, self.world, progress=True, dtype=dtype)
                except UserError as error:
                    raise UserError(guarded.error or str(error)) from error
                if guarded.error:
                    raise UserError(guarded.error)
                return found

            with preserved_rng():
                metrics = together(self.world, evaluate)
            skipped += self.val_loader.skipped
        total = self.world.all_reduce_sum(torch.tensor([skipped]))
        return metrics, int(total.item())

    def _save(self, epoch: int, step: int, is_best: bool) -> None:
        options = self.options
        # The loss comes before the step: the last step may have ruined the weights of a checkpoint called good.
        if not all(bool(parameter.isfinite().all()) for parameter in self.training.model.parameters()):
            raise AgreedError(
                f"weights are not finite at the end of epoch {epoch}, at learning rate "
                f"{self.training.optimizer.param_groups[0]['lr']:.6g}; last good checkpoint: {self.last_good}; "
                "try a lower --max_lr, --warmup_epochs or --clip_grad_norm"
            )
        state = self.training.snapshot(self.world) | {
            "meta": self.meta,
            "options": asdict(options),
            "layout": _layout(options, self.world),
        }
        folder = self.directory / "checkpoints"
        self.last_good = on_main(
            self.world,
            lambda: str(checkpoint.save(folder, state, epoch, step, options.keep_checkpoint_max, is_best)),
        )

    def _save_results(self, model: MobileNetV2, is_best: bool) -> None:
        try:
            weights.save_weights(self.directory / "last.safetensors", model.state_dict(), self.meta)
            if is_best:
                weights.save_weights(self.directory / "best.safetensors", model.state_dict(), self.meta)
            draw_curves(self.directory / "metrics.csv", self.directory / "curves.png")
        except OSError as error:
            raise UserError(
                f"could not write the weights into {self.directory}: {error.strerror or error}; "
                f"last good checkpoint: {self.last_good}; put that right and continue with --resume auto"
            ) from error

    def _preempted(self) -> None:
        progress = self.training.progress
        if progress.step > 0:
            for network in (self.training.model, self.training.ema.model if self.training.ema else None):
                if network is not None:
                    share_buffers(network, self.world)
            self._save(progress.epoch, progress.step, False)
        self.log.text(
            f"Stopped by a signal in epoch {progress.epoch} after step {progress.step}; checkpoint: {self.last_good}; "
            f"continue with --ckpt_save_dir {self.directory} --resume auto"
        )


class _GuardedLoader:
    """A loader whose failure on one rank ends its pictures early, so that the ranks still meet in evaluation's sums."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader
        self.num_samples = loader.num_samples
        self.error: str | None = None

    @property
    def skipped(self) -> int:
        return self._loader.skipped

    def __iter__(self) -> Iterator["Batch"]:
        try:
            yield from self._loader
        except UserError as error:
            self.error = str(error)

    def __len__(self) -> int:
        return len(self._loader)

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        self._loader.set_epoch(epoch, start_batch)

    def close(self) -> None:
        self._loader.close()


def _make_model(
    options: TrainOptions, data: setup.Data, state: dict[str, Any] | None, pretrained: weights.Weights | None
) -> tuple[MobileNetV2, dict[str, Any], list[str]]:
    """(network on the CPU, its meta, what there is to say of it)."""
    torch.manual_seed(options.seed)
    if state is not None:
        meta = state["meta"]
        if meta["alpha"] != options.alpha or (data.train and list(data.train.class_names) != _named(meta, data)):
            raise UserError("--resume: the checkpoint has another --alpha or other classes; give that run's options")
        conventions = weights.conventions(meta)
        model = MobileNetV2(meta["num_classes"], meta["alpha"], options.dropout, meta["class_offset"], **conventions)
        return model, meta, []
    logits = pretrained.state_dict["classifier.1.weight"].shape[0] if pretrained else None
    known = pretrained.meta if pretrained else {}
    count, offset = setup.choose_classes(options, data, known, logits)
    model = MobileNetV2(count, options.alpha, options.dropout, offset, **weights.conventions(known))
    said = [weights.load_into(model, pretrained, fine_tune=True)] if pretrained else []
    return model, setup.describe(options, data, model, known), said


def _named(meta: dict[str, Any], data: setup.Data) -> list[str]:
    return list(meta["class_names"])[: data.num_classes]


def _prepare(options: TrainOptions, model: MobileNetV2, loader: "Loader", world: World) -> Training:
    """Move the network to the device and put what trains it around it; every rank must call it."""
    # Each rank its own dropout, after the same initialisation on all.
    torch.manual_seed(options.seed * 1_000_003 + world.rank + 1)
    if options.sync_bn:
        share_batch_statistics(model)
    model.to(world.device)
    if options.channels_last:
        as_channels_last(model)
    if options.freeze_backbone:
        model.features.requires_grad_(False)
    optimizer = make_optimizer(model, options.max_lr, options.momentum, options.weight_decay)
    ema = Ema(model, options.ema.decay) if options.ema.decay > 0 else None
    if options.compile:
        model.compile()
    module: nn.Module = model
    if world.is_distributed:
        module = nn.parallel.DistributedDataParallel(
            model,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
    schedule = Schedule(
        options.lr_decay_mode,
        math.ceil(len(loader) / options.grad_accumulation),
        options.max_lr,
        options.min_lr,
        options.decay_epoch,
        options.warmup_epochs,
        options.milestone,
        options.learning_rates,
    )
    scaler = torch.amp.GradScaler(world.device.type, enabled=options.amp.dtype == "fp16")
    return Training(model, module, optimizer, scaler, schedule, ema)


def _layout(options: TrainOptions, world: World) -> dict[str, int]:
    """What the place of a step within an epoch depends on."""
    return {
        "world_size": world.world_size,
        "batch_size": options.batch_size,
        "grad_accumulation": options.grad_accumulation,
        "repeat_num": options.repeat_num,
        "seed": options.seed,
    }


def _resume(training: Training, start: setup.Start, options: TrainOptions, world: World) -> None:
    assert start.state is not None
    training.restore(start.state, world)
    was, now = start.state["layout"], _layout(options, world)
    changed = [f"{name} {was[name]} -> {now[name]}" for name in now if was.get(name) != now[name]]
    if changed and training.progress.step > 0:
        raise UserError(
            f"{start.source} stands within an epoch and can only be continued as it was: {', '.join(changed)}; "
            "resume with the old values, or from the checkpoint of a finished epoch"
        )


def _open_run(
    log: RunLog,
    start: setup.Start,
    options: TrainOptions,
    world: World,
    epoch: int,
    step: int,
    sentences: list[str],
) -> None:
    if start.continues:
        log.rewind(epoch, step)
    write_atomic(start.directory / "config.yaml", as_yaml(options).encode())
    environment.write(start.directory / "environment.json", world)
    if start.directory != Path(options.ckpt_save_dir):
        log.text(f"{options.ckpt_save_dir} is not empty; this run writes into {start.directory}")
    if start.source:
        log.text(f"Continuing from {start.source}: epoch {epoch}, step {step}")
    for sentence in sentences:
        log.text(sentence[0].upper() + sentence[1:])


@contextmanager
def _determinism(deterministic: bool, world: World) -> Iterator[None]:
    """Only operations that give the same bits each time, or else whatever is fastest; the old state comes back."""
    before = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic and world.device.type == "cuda"
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.backends.cudnn.benchmark = benchmark
