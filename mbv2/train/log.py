"""What a run says: the seed's log lines, a progress bar on a terminal, and the metrics as CSV, JSON and TensorBoard."""

import csv
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.files import write_atomic

COLUMNS = ("epoch", "train_loss", "val_loss", "top1", "top5", "lr", "images_per_s", "seconds", "skipped")
"""The columns of metrics.csv. Accuracies are fractions of 1, epochs count from 0, an unknown value is empty."""


class RunLog:
    """The log of one run in `directory`: `train.log`, `metrics.jsonl`, `metrics.csv` and `tensorboard/`.

    Rank 0 prints and writes; on every other rank all methods do nothing.

    Args:
        directory: the run's folder; made when missing.
        world: who this process is.
        tensorboard: also write TensorBoard event files.
        resume: continue the logs that are there; call `rewind` next.

    Raises:
        UserError: TensorBoard is asked for and not installed, or `directory` holds a run and `resume` is False.
    """

    def __init__(self, directory: Path, world: World, tensorboard: bool = False, resume: bool = False) -> None:
        self.directory = Path(directory)
        self._enabled = world.is_main
        self._tensorboard = tensorboard and self._enabled
        self._writer: Any = None
        self._purge_step: int | None = None
        self._bar: Any = None
        self._task: Any = None
        if not self._enabled:
            return
        self._csv, self._jsonl = self.directory / "metrics.csv", self.directory / "metrics.jsonl"
        self._text = self.directory / "train.log"
        if self._tensorboard:
            _summary_writer()
        if not resume and self._csv.exists():
            raise UserError(f"{self.directory} already holds a run; use --resume auto or another --ckpt_save_dir")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            if not self._csv.exists():
                write_atomic(self._csv, _csv_line(COLUMNS).encode())
        except OSError as error:
            raise _write_error(self._csv, error) from error

    def rewind(self, epoch: int, step: int = 0) -> None:
        """Forget what was logged after `step` steps of `epoch`, so that a resumed run has everything once.

        `train.log` keeps it all: it is the story, not the result. A line cut short by a crash is forgotten too.
        """
        if not self._enabled:
            return
        try:
            self._rewind_csv(epoch)
            self._rewind_jsonl(epoch, step)
        except OSError as error:
            raise _write_error(self.directory, error) from error

    def step(
        self,
        epoch: int,
        epochs: int,
        step: int,
        steps: int,
        loss: float,
        loss_avg: float,
        seconds: float,
        lr: float,
        images_per_s: float,
    ) -> None:
        """Log a step.

        Args:
            epoch: this epoch, from 0.
            epochs: how many there are.
            step: how many steps of this epoch are done.
            steps: how many it has.
            loss: of this step.
            loss_avg: mean over this epoch so far.
            seconds: since the start of this epoch.
            lr: learning rate of this step.
            images_per_s: over all ranks.
        """
        if not self._enabled:
            return
        line = (
            f"Epoch:[{epoch:3d}/{epochs:3d}], step:[{step:5d}/{steps:5d}], loss:[{loss:5.3f}/{loss_avg:5.3f}], "
            f"time:{seconds * 1000:5.3f} ms, lr:{lr:5.5f}, images/s:{images_per_s:.1f}"
        )
        self._append(self._text, line + "\n")
        values = {"loss": loss, "loss_avg": loss_avg, "seconds": seconds, "lr": lr, "images_per_s": images_per_s}
        self._record("step", epoch, epoch * steps + step, {"step": step, "steps": steps} | values)
        self._scalars(epoch * steps + step, {"train/loss": loss, "train/lr": lr, "train/images_per_s": images_per_s})
        if not _on_terminal():
            print(line, flush=True)
            return
        self._show_bar(epoch, epochs, step, steps, f"loss {loss_avg:.3f}  lr {lr:.5f}  {images_per_s:.0f} img/s")
        if step >= steps:
            # Gone before validation shows a bar of its own.
            self._hide_bar()
            print(line, flush=True)

    def epoch(self, epoch: int, seconds: float, steps: int, loss_avg: float, metrics: dict[str, Any]) -> None:
        """Log a finished epoch.

        Args:
            epoch: this epoch, from 0.
            seconds: it took.
            steps: it had.
            loss_avg: its mean training loss.
            metrics: any of val_loss, top1, top5 (fractions of 1), lr, images_per_s, skipped (corrupt images);
                other names go to metrics.jsonl and TensorBoard only.
        """
        if not self._enabled:
            return
        per_step = seconds * 1000 / max(steps, 1)
        self.text(f"Epoch time:{seconds * 1000:5.3f} ms, per step time:{per_step:5.3f} ms, avg loss:{loss_avg:5.3f}")
        known = [
            f"{label}:{metrics[key]:{form}}"
            for key, label, form in (("top1", "top-1", ".2%"), ("top5", "top-5", ".2%"), ("val_loss", "loss", ".3f"))
            if metrics.get(key) is not None
        ]
        if known:
            self.text("Validation " + ", ".join(known))
        if metrics.get("skipped"):
            self.text(f"Skipped {metrics['skipped']} corrupt images in this epoch")
        row = {"epoch": epoch, "train_loss": loss_avg, "seconds": seconds} | metrics
        self._append(self._csv, _csv_line([_cell(row.get(column)) for column in COLUMNS]))
        done = (epoch + 1) * steps
        self._record("epoch", epoch, done, {"train_loss": loss_avg, "seconds": seconds, "steps": steps} | metrics)
        numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
        self._scalars(done, {"epoch/train_loss": loss_avg} | {f"epoch/{key}": numbers[key] for key in numbers})

    def text(self, line: str) -> None:
        """Print a line and keep it in train.log."""
        if self._enabled:
            self._hide_bar()
            print(line, flush=True)
            self._append(self._text, line + "\n")

    def close(self) -> None:
        """Take the progress bar away and finish the event files; may be called twice."""
        self._hide_bar()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _record(self, kind: str, epoch: int, global_step: int, values: dict[str, Any]) -> None:
        row = {"kind": kind, "epoch": epoch, "global_step": global_step} | values
        # JSON knows no NaN or Infinity; a diverged loss is null there and spelled out in train.log.
        row = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._append(self._jsonl, json.dumps(row, allow_nan=False) + "\n")

    def _append(self, path: Path, text: str) -> None:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise _write_error(path, error) from error

    def _rewind_csv(self, epoch: int) -> None:
        if not self._csv.exists():
            return
        rows = csv.reader(io.StringIO(self._csv.read_text(encoding="utf-8", errors="replace")))
        kept = [_csv_line(COLUMNS)]
        kept += [_csv_line(row) for row in rows if len(row) == len(COLUMNS) and _before(row[0], epoch)]
        write_atomic(self._csv, "".join(kept).encode())

    def _rewind_jsonl(self, epoch: int, step: int) -> None:
        if not self._jsonl.exists():
            return
        kept, dropped = [], []
        for line in self._jsonl.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                before = row["epoch"] < epoch or (
                    row["epoch"] == epoch and row["kind"] == "step" and row["step"] <= step
                )
            except (ValueError, KeyError, TypeError):
                continue
            if before:
                kept.append(line + "\n")
            else:
                dropped.append(row["global_step"])
        write_atomic(self._jsonl, "".join(kept).encode())
        self._purge_step = min(dropped, default=None)

    def _scalars(self, global_step: int, values: dict[str, float]) -> None:
        if not self._tensorboard:
            return
        if self._writer is None:
            self._writer = _summary_writer()(str(self.directory / "tensorboard"), purge_step=self._purge_step)
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, global_step)

    def _show_bar(self, epoch: int, epochs: int, step: int, steps: int, numbers: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            # No square brackets: rich would read them as markup.
            self._task = self._bar.add_task(f"Epoch {epoch}/{epochs}", total=steps, numbers=numbers)
        self._bar.update(self._task, completed=step, numbers=numbers)

    def _hide_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _on_terminal() -> bool:
    return sys.stdout.isatty() and sys.stderr.isatty()


def _before(cell: str, epoch: int) -> bool:
    return cell.isascii() and cell.isdigit() and int(cell) < epoch


def _csv_line(cells: Any) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _write_error(path: Path, error: OSError) -> UserError:
    return UserError(
        f"could not write {path}: {error.strerror or error}; put that right and continue with --resume auto"
    )


def _summary_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("--tensorboard needs TensorBoard: pip install mbv2[tensorboard]") from error
    return SummaryWriter
