import builtins
import csv
import errno
import io
import json
import os
import sys
from pathlib import Path

import pytest

from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.train.log import COLUMNS, RunLog

METRICS = {"val_loss": 1.5, "top1": 0.5, "top5": 0.75, "lr": 0.1, "images_per_s": 100.0, "skipped": 0}


def _step(log: RunLog, epoch: int = 0, step: int = 2502, steps: int = 2502, loss: float = 4.676) -> None:
    log.step(epoch, 200, step, steps, loss, 4.676, 872.084093, 0.1, 1848.34)


def _run(log: RunLog, epochs: range, steps: int = 2) -> None:
    for epoch in epochs:
        for step in range(1, steps + 1):
            _step(log, epoch, step, steps)
        log.epoch(epoch, 10.0, steps, 3.0, METRICS)


def _csv(directory: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO((directory / "metrics.csv").read_text())))


def _jsonl(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_step_is_said_in_the_seeds_form_with_images_per_second(tmp_path, capsys):
    _step(RunLog(tmp_path, World()))
    line = "Epoch:[  0/200], step:[ 2502/ 2502], loss:[4.676/4.676], time:872084.093 ms, lr:0.10000, images/s:1848.3\n"
    assert capsys.readouterr().out == line
    assert (tmp_path / "train.log").read_text() == line


def test_an_epoch_is_said_in_the_seeds_form_with_its_validation(tmp_path, capsys):
    RunLog(tmp_path, World()).epoch(0, 883.614453, 2502, 4.676, METRICS | {"skipped": 3})
    assert capsys.readouterr().out.splitlines() == [
        "Epoch time:883614.453 ms, per step time:353.163 ms, avg loss:4.676",
        "Validation top-1:50.00%, top-5:75.00%, loss:1.500",
        "Skipped 3 corrupt images in this epoch",
    ]


def test_an_epoch_without_validation_has_empty_cells_and_no_validation_line(tmp_path, capsys):
    RunLog(tmp_path, World()).epoch(4, 1.0, 0, 2.0, {"lr": 0.1})
    assert "Validation" not in capsys.readouterr().out
    row = _csv(tmp_path)[0]
    assert (row["epoch"], row["train_loss"], row["lr"]) == ("4", "2", "0.1")
    assert row["val_loss"] == row["top1"] == row["skipped"] == ""


def test_csv_has_a_row_an_epoch_and_jsonl_all_steps_and_epochs(tmp_path):
    with RunLog(tmp_path, World()) as log:
        _run(log, range(2))
    assert tuple(_csv(tmp_path)[0]) == COLUMNS
    assert [row["epoch"] for row in _csv(tmp_path)] == ["0", "1"]
    assert [(row["kind"], row["global_step"]) for row in _jsonl(tmp_path)] == [
        ("step", 1),
        ("step", 2),
        ("epoch", 2),
        ("step", 3),
        ("step", 4),
        ("epoch", 4),
    ]


def test_metrics_beyond_the_columns_go_to_jsonl_alone(tmp_path):
    RunLog(tmp_path, World()).epoch(0, 1.0, 1, 2.0, METRICS | {"ema_top1": 0.6})
    assert _jsonl(tmp_path)[0]["ema_top1"] == 0.6
    assert len(_csv(tmp_path)[0]) == len(COLUMNS)


def test_a_diverged_loss_is_null_in_jsonl(tmp_path, capsys):
    _step(RunLog(tmp_path, World()), loss=float("nan"))
    assert _jsonl(tmp_path)[0]["loss"] is None
    assert "loss:[  nan/4.676]" in capsys.readouterr().out


def test_a_resumed_run_has_every_epoch_once(tmp_path):
    with RunLog(tmp_path, World()) as log:
        _run(log, range(4))
    with RunLog(tmp_path, World(), resume=True) as log:
        log.rewind(2)
        _run(log, range(2, 5))
    assert [row["epoch"] for row in _csv(tmp_path)] == ["0", "1", "2", "3", "4"]
    rows = [(row["kind"], row["epoch"], row.get("step")) for row in _jsonl(tmp_path)]
    assert len(rows) == len(set(rows)) == 15


def test_a_run_resumed_within_an_epoch_has_every_step_once(tmp_path):
    log = RunLog(tmp_path, World())
    _run(log, range(1), steps=4)
    for step in (1, 2, 3):
        _step(log, 1, step, 4)
    log = RunLog(tmp_path, World(), resume=True)
    log.rewind(1, 2)
    for step in (3, 4):
        _step(log, 1, step, 4)
    assert [row["step"] for row in _jsonl(tmp_path) if row["epoch"] == 1] == [1, 2, 3, 4]


def test_lines_cut_short_by_a_crash_are_forgotten_when_resuming(tmp_path):
    _run(RunLog(tmp_path, World()), range(2))
    for name, torn in (("metrics.csv", b"1,2.0,\xff"), ("metrics.jsonl", b'{"kind": "st\xff')):
        with (tmp_path / name).open("ab") as file:
            file.write(torn)
    log = RunLog(tmp_path, World(), resume=True)
    log.rewind(2)
    _run(log, range(2, 3))
    assert [row["epoch"] for row in _csv(tmp_path)] == ["0", "1", "2"]
    assert len(_jsonl(tmp_path)) == 9


def test_resuming_where_no_log_is_yet_starts_one(tmp_path):
    log = RunLog(tmp_path / "new", World(), resume=True)
    log.rewind(0)
    _run(log, range(1))
    assert len(_csv(tmp_path / "new")) == 1


def test_a_finished_run_is_not_written_into(tmp_path):
    _run(RunLog(tmp_path, World()), range(1))
    with pytest.raises(UserError, match="already holds a run"):
        RunLog(tmp_path, World())
    assert len(_csv(tmp_path)) == 1


def test_other_ranks_are_silent_and_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", World(rank=1, world_size=2), tensorboard=True)
    _run(log, range(1))
    log.rewind(0)
    log.text("hello")
    log.close()
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "run").exists()


def test_a_terminal_gets_a_bar_and_the_seeds_line_once_an_epoch(tmp_path, monkeypatch):
    out, err = _Terminal(), _Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    with RunLog(tmp_path, World()) as log:
        for step in (1, 2, 3):
            _step(log, 0, step, 3)
        log.epoch(0, 1.0, 3, 4.0, {})
    assert out.getvalue().splitlines() == (tmp_path / "train.log").read_text().splitlines()[2:]
    assert "Epoch 0/200" in err.getvalue()
    assert (tmp_path / "train.log").read_text().count("step:[") == 3


def test_a_full_disk_is_one_clear_error(tmp_path, monkeypatch):
    log = RunLog(tmp_path, World())

    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(UserError, match=r"could not write .*train\.log: No space left on device"):
        log.text("hello")


def test_tensorboard_missing_is_told_with_the_remedy(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *rest, **more):
        if name.startswith("torch.utils.tensorboard"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install mbv2\[tensorboard\]"):
        RunLog(tmp_path, World(), tensorboard=True)


def test_tensorboard_gets_steps_and_epochs_once_over_a_resume(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, World(), tensorboard=True) as log:
        _run(log, range(3))
    with RunLog(tmp_path, World(), tensorboard=True, resume=True) as log:
        log.rewind(1)
        _run(log, range(1, 4))
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/top1")] == [2, 4, 6, 8]
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 9))
