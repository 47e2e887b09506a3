"""Whole training runs in this process, on a few tiny pictures."""

import csv
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.train import checkpoint, loop, setup
from mbv2.train.log import RunLog
from mbv2.train.options import AmpOptions, AugmentOptions, EmaOptions, TrainOptions
from mbv2.train.run import train
from mbv2.weights import fingerprint, load_into, model_from_weights, read_weights

WORLD = World()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost time on pictures this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """train/ with 4 and val/ with 2 pictures of each of three colours."""
    root = tmp_path_factory.mktemp("pictures")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 4), ("val", 2)):
        for channel, name in enumerate(("red", "green", "blue")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                picture = torch.randint(0, 80, (3, 40, 40), generator=generator, dtype=torch.uint8)
                picture[channel] += 150
                Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / f"{number}.jpg")
    return root


@pytest.fixture
def options(pictures, tmp_path) -> TrainOptions:
    return TrainOptions(
        data_url=str(pictures),
        device_target="CPU",
        alpha=0.35,
        resize=32,
        batch_size=4,
        epoch_size=2,
        decay_epoch=2,
        # Few values per channel at 32 pixels: larger steps would end in infinity.
        max_lr=1e-4,
        num_parallel_workers=0,
        ckpt_save_dir=str(tmp_path / "run"),
        dropout=0.2,
        log_interval=1,
    )


def stop_after(monkeypatch, epoch: int, step: int) -> None:
    """Have this process sent SIGTERM when that step is logged."""
    original = RunLog.step

    def logging(self, *values):
        original(self, *values)
        if (values[0], values[2]) == (epoch, step):
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(RunLog, "step", logging)


def newest(options: TrainOptions) -> dict:
    return checkpoint.load_newest(Path(options.ckpt_save_dir) / "checkpoints")[0]


def same(a, b) -> bool:
    """Whether nested states are bit-identical."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def test_a_run_leaves_its_results(options, capsys):
    assert train(options, WORLD) == 0
    folder = Path(options.ckpt_save_dir)
    for name in ("config.yaml", "environment.json", "metrics.csv", "metrics.jsonl", "train.log", "curves.png"):
        assert (folder / name).stat().st_size > 0
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["best.ckpt", "epoch-0000.ckpt", "epoch-0001.ckpt"]
    with (folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert all(row["top1"] and row["val_loss"] for row in rows)
    assert "Epoch:[  0/  2], step:[    3/    3]" in capsys.readouterr().out


def test_the_weights_carry_what_inference_needs(options):
    train(replace(options, epoch_size=1, class_offset=1), WORLD)
    for name in ("last.safetensors", "best.safetensors", "checkpoints/best.ckpt"):
        model, meta = model_from_weights(Path(options.ckpt_save_dir) / name)
        assert (model.num_classes, model.class_offset, model.width_mult) == (4, 1, 0.35)
        assert meta["class_names"] == ["blue", "green", "red"]
        assert meta["resolution"] == 32
        assert meta["mean"] == [0.485, 0.456, 0.406]


@pytest.mark.parametrize(("epoch", "step"), [(0, 2), (1, 1), (0, 3)])
def test_an_interrupted_and_resumed_run_ends_bit_identical(options, tmp_path, monkeypatch, epoch, step):
    options = replace(options, ema=EmaOptions(0.9), augment=AugmentOptions(mixup=0.2, cutmix=1.0, random_erasing=0.5))
    whole = replace(options, ckpt_save_dir=str(tmp_path / "whole"))
    assert train(whole, WORLD) == 0
    with monkeypatch.context() as patch:
        stop_after(patch, epoch, step)
        assert train(options, WORLD) == 75
    assert train(replace(options, resume="auto"), WORLD) == 0
    a, b = newest(whole), newest(options)
    for key in ("model", "ema", "ema_updates", "optimizer", "scaler", "rng"):
        assert same(a[key], b[key]), key
    assert fingerprint(a["model"]) == fingerprint(b["model"])
    losses = []
    for folder in (whole.ckpt_save_dir, options.ckpt_save_dir):
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
        losses.append([row.get("loss", row.get("train_loss")) for row in map(json.loads, lines)])
    assert losses[0] == losses[1]


def test_resuming_within_an_epoch_needs_the_same_batches(options, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(patch, 0, 2)
        assert train(options, WORLD) == 75
    with pytest.raises(UserError, match="batch_size 4 -> 3"):
        train(replace(options, batch_size=3, resume="auto"), WORLD)


def test_a_second_run_takes_a_fresh_folder(options, capsys):
    options = replace(options, epoch_size=1)
    train(options, WORLD)
    before = (Path(options.ckpt_save_dir) / "last.safetensors").read_bytes()
    train(replace(options, seed=1), WORLD)
    assert Path(options.ckpt_save_dir + "-1", "last.safetensors").is_file()
    assert (Path(options.ckpt_save_dir) / "last.safetensors").read_bytes() == before
    assert "this run writes into" in capsys.readouterr().out


def test_resuming_a_finished_run_changes_nothing(options, capsys):
    options = replace(options, epoch_size=1)
    train(options, WORLD)
    before = newest(options)
    assert train(replace(options, resume="auto"), WORLD) == 0
    assert same(before, newest(options))
    assert "Nothing to do" in capsys.readouterr().out


def test_a_restarted_worker_resumes_its_own_run(options, monkeypatch):
    Path(options.ckpt_save_dir).mkdir()
    (Path(options.ckpt_save_dir) / "other").write_text("not ours")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-7")
    with monkeypatch.context() as patch:
        stop_after(patch, 1, 2)
        assert train(options, WORLD) == 75
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert train(options, WORLD) == 0
    assert "Continuing from" in Path(options.ckpt_save_dir + "-1", "train.log").read_text()
    assert not Path(options.ckpt_save_dir + "-2").exists()


def test_a_damaged_newest_checkpoint_falls_back(options, capsys):
    train(options, WORLD)
    path = Path(options.ckpt_save_dir) / "checkpoints" / "epoch-0001.ckpt"
    whole = newest(options)
    path.write_bytes(path.read_bytes()[:-1000])
    assert train(replace(options, resume="auto"), WORLD) == 0
    assert "epoch-0001.ckpt is damaged" in capsys.readouterr().err
    assert same(whole["model"], newest(options)["model"])


def test_a_loss_that_is_not_finite_stops_naming_step_rate_and_checkpoint(options, monkeypatch):
    original = loop._optimizer_step

    def poisoned(training, *arguments):
        loss = original(training, *arguments)
        return loss * float("nan") if (training.progress.epoch, training.progress.step) == (1, 1) else loss

    monkeypatch.setattr(loop, "_optimizer_step", poisoned)
    with pytest.raises(UserError, match=r"nan in epoch 1, step 2, at learning rate \d.*epoch-0000\.ckpt"):
        train(options, WORLD)


def test_a_few_overflows_of_fp16_are_left_to_the_scaler(options, monkeypatch):
    original = loop._optimizer_step

    def overflowing(training, *arguments):
        loss = original(training, *arguments)
        return loss * float("inf") if training.progress.step == 1 else loss

    monkeypatch.setattr(loop, "_optimizer_step", overflowing)
    assert train(replace(options, epoch_size=1, amp=AmpOptions("fp16")), WORLD) == 0


def test_bf16_trains(options):
    assert train(replace(options, epoch_size=1, amp=AmpOptions("bf16")), WORLD) == 0


def test_accumulated_batches_step_like_one_when_batch_norm_is_frozen(options, tmp_path):
    train(replace(options, epoch_size=1, ckpt_save_dir=str(tmp_path / "start")), WORLD)
    options = replace(
        options,
        pretrained=str(tmp_path / "start" / "last.safetensors"),
        freeze_backbone=True,
        dropout=0.0,
        epoch_size=1,
    )
    together = replace(options, batch_size=4, ckpt_save_dir=str(tmp_path / "together"))
    parts = replace(options, batch_size=2, grad_accumulation=2, ckpt_save_dir=str(tmp_path / "parts"))
    train(together, WORLD)
    train(parts, WORLD)
    torch.testing.assert_close(newest(parts)["model"], newest(together)["model"])


def test_a_short_last_group_is_a_step_of_its_own(options, capsys):
    train(replace(options, epoch_size=1, grad_accumulation=2), WORLD)
    assert "step:[    2/    2]" in capsys.readouterr().out


def test_a_frozen_backbone_stays_and_the_classifier_moves(options, tmp_path):
    train(replace(options, epoch_size=1, ckpt_save_dir=str(tmp_path / "start")), WORLD)
    start = tmp_path / "start" / "last.safetensors"
    train(replace(options, pretrained=str(start), freeze_backbone=True), WORLD)
    before, after = read_weights(start).state_dict, newest(options)["model"]
    for key, value in after.items():
        assert torch.equal(value, before[key]) == key.startswith("features."), key


def test_fine_tuning_takes_another_class_count(options, tmp_path, capsys):
    train(replace(options, epoch_size=1, num_classes=7, ckpt_save_dir=str(tmp_path / "start")), WORLD)
    start = tmp_path / "start" / "last.safetensors"
    train(replace(options, pretrained=str(start), epoch_size=1), WORLD)
    assert newest(options)["model"]["classifier.1.weight"].shape[0] == 3
    assert "classifier for 7 classes was replaced by a fresh one for 3" in capsys.readouterr().out


def test_without_validation_pictures_it_trains_all_the_same(options, pictures):
    assert train(replace(options, data_url=str(pictures / "train"), epoch_size=1), WORLD) == 0
    assert (Path(options.ckpt_save_dir) / "best.safetensors").is_file()


def test_synthetic_pictures_need_no_folder(options, monkeypatch):
    original = setup.make_loader
    monkeypatch.setattr(setup, "make_loader", lambda *given, **named: original(*given, **named, length=16))
    options = replace(options, data_url="", loader="synthetic", batch_size=8, epoch_size=1, num_classes=1000)
    assert train(options, WORLD) == 0


def test_too_few_pictures_for_a_step_are_refused(options):
    with pytest.raises(UserError, match="12 training pictures do not fill one step of 1 x 13"):
        train(replace(options, batch_size=13), WORLD)


def test_more_classes_than_logits_are_refused(options):
    with pytest.raises(UserError, match="--num_classes 2"):
        train(replace(options, num_classes=2), WORLD)


def test_a_broken_picture_is_named_and_skipping_counts_it(options, pictures, tmp_path):
    import shutil

    copy = tmp_path / "broken"
    shutil.copytree(pictures, copy)
    (copy / "train" / "red" / "0.jpg").write_bytes(b"")
    (copy / "val" / "red" / "0.jpg").write_bytes(b"")
    options = replace(options, data_url=str(copy), epoch_size=1)
    with pytest.raises(UserError, match=r"red/0\.jpg"):
        train(options, WORLD)
    skipping = replace(options, on_corrupt="skip", ckpt_save_dir=str(tmp_path / "skipping"))
    assert train(skipping, WORLD) == 0
    assert "Skipped 2 corrupt images" in (tmp_path / "skipping" / "train.log").read_text()


def test_a_full_disk_leaves_the_last_checkpoint_and_says_so(options, monkeypatch):
    train(replace(options, epoch_size=1), WORLD)
    good = newest(options)

    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_atomic", full)
    with pytest.raises(UserError, match=r"disk is full.*epoch-0000\.ckpt, is intact"):
        train(replace(options, resume="auto"), WORLD)
    assert same(good, newest(options))


def test_the_command_line_exits_with_2_in_one_line(options, capfd):
    from mbv2.cli import main

    argv = ["train", f"--data_url={options.data_url}", "--device_target=CPU", "--resize=32", "--alpha=0.35"]
    assert main([*argv, f"--ckpt_save_dir={options.ckpt_save_dir}", "--batch_size=64"]) == 2
    error = capfd.readouterr().err
    assert error.startswith("mbv2: error: 12 training pictures")
    assert error.count("\n") == 1


def test_an_averaged_run_saves_the_average(options):
    train(replace(options, epoch_size=1, ema=EmaOptions(0.9)), WORLD)
    state = newest(options)
    assert not same(state["model"], state["ema"])
    model, _ = model_from_weights(Path(options.ckpt_save_dir) / "last.safetensors")
    assert same(dict(model.state_dict()), dict(state["ema"]))
    assert load_into(model, read_weights(Path(options.ckpt_save_dir) / "checkpoints" / "epoch-0000.ckpt"))
