import errno
import os
import random
import signal
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mbv2.errors import UserError
from mbv2.model import MobileNetV2
from mbv2.train import checkpoint
from mbv2.weights import read_weights


def _state(value: float = 1.0) -> dict:
    return {
        "model": OrderedDict(weight=torch.full((4, 3), value), steps=torch.tensor(7)),
        "optimizer": {"state": {0: {"momentum_buffer": torch.arange(5.0)}}, "param_groups": [{"lr": 0.1}]},
        "epoch": 3,
        "names": ["a", "ü"],
        "none": None,
    }


def _save(directory: Path, epoch: int, step: int = 0, keep: int = 10, is_best: bool = False) -> Path:
    return checkpoint.save(directory, _state(float(epoch)), epoch, step, keep, is_best)


def _names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_loaded(tmp_path):
    path = checkpoint.save(tmp_path / "new" / "folder", _state(), 3, 0, 2, False)
    loaded = checkpoint.load(path)
    assert path.name == "epoch-0003.ckpt"
    assert torch.equal(loaded["model"]["weight"], torch.full((4, 3), 1.0))
    assert torch.equal(loaded["optimizer"]["state"][0]["momentum_buffer"], torch.arange(5.0))
    assert {key: loaded[key] for key in ("epoch", "names", "none")} == {"epoch": 3, "names": ["a", "ü"], "none": None}


def test_a_state_within_an_epoch_is_named_by_its_step(tmp_path):
    assert _save(tmp_path, 3, 120).name == "epoch-0003-step-000120.ckpt"


def test_a_checkpoint_is_an_ordinary_torch_file(tmp_path):
    model = MobileNetV2(num_classes=3, width_mult=0.35)
    path = checkpoint.save(tmp_path, {"model": model.state_dict(), "meta": {"alpha": 0.35}}, 0, 0, 1, False)
    assert torch.load(path, weights_only=True)["meta"] == {"alpha": 0.35}
    weights = read_weights(path)
    assert weights.meta == {"alpha": 0.35}
    assert all(torch.equal(value, weights.state_dict[key]) for key, value in model.state_dict().items())


def test_the_newest_k_are_kept_and_nothing_of_others_is_deleted(tmp_path):
    foreign = ["epoch-0000-mine.ckpt", "epoch-1.ckpt", "model.ckpt", "notes.txt"]
    for foreign_name in foreign:
        (tmp_path / foreign_name).write_text("mine")
    _save(tmp_path, 0, is_best=True)
    for epoch in range(1, 4):
        _save(tmp_path, epoch, 5, keep=3)
        _save(tmp_path, epoch, keep=3)
    ours = ["best.ckpt", "epoch-0002.ckpt", "epoch-0003-step-000005.ckpt", "epoch-0003.ckpt"]
    assert _names(tmp_path) == sorted(foreign + ours)
    assert all((tmp_path / foreign_name).read_text() == "mine" for foreign_name in foreign)


def test_epochs_beyond_four_digits_are_still_in_order(tmp_path):
    for epoch in (9999, 10000):
        _save(tmp_path, epoch)
    assert checkpoint.load_newest(tmp_path)[1].name == "epoch-10000.ckpt"


def test_the_one_just_written_stays_even_when_later_ones_exist(tmp_path):
    for epoch in (8, 9):
        _save(tmp_path, epoch)
    assert _save(tmp_path, 4, keep=1).exists()


def test_best_stays_what_it_was_until_a_better_one_comes(tmp_path):
    _save(tmp_path, 0, is_best=True)
    _save(tmp_path, 1, keep=1)
    assert checkpoint.load(tmp_path / "best.ckpt")["model"]["weight"][0, 0] == 0
    _save(tmp_path, 2, keep=1, is_best=True)
    assert checkpoint.load(tmp_path / "best.ckpt")["model"]["weight"][0, 0] == 2
    assert _names(tmp_path) == ["best.ckpt", "epoch-0002.ckpt"]


def test_best_is_a_copy_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = _save(tmp_path, 1, is_best=True)
    assert (tmp_path / "best.ckpt").read_bytes() == path.read_bytes()
    assert _names(tmp_path) == ["best.ckpt", "epoch-0001.ckpt"]


def test_no_checkpoint_to_keep_is_refused(tmp_path):
    with pytest.raises(UserError, match="keep_checkpoint_max 0"):
        _save(tmp_path, 0, keep=0)


@pytest.mark.parametrize("value", [np.float64(1.0), np.zeros(2), {1, 2}, Path("x"), lambda: None])
def test_what_could_not_be_read_back_is_refused_when_saving(tmp_path, value):
    with pytest.raises(TypeError, match=r"state\['deep'\]\[0\]"):
        checkpoint.save(tmp_path, {"deep": [value]}, 0, 0, 1, False)
    assert _names(tmp_path) == []


def test_an_empty_or_missing_folder_has_no_newest(tmp_path):
    assert checkpoint.load_newest(tmp_path) is None
    assert checkpoint.load_newest(tmp_path / "missing") is None


@pytest.mark.parametrize("content", [b"", b"x", b"PK\x03\x04", os.urandom(5000)])
def test_a_file_that_is_no_checkpoint_is_one_clear_error(tmp_path, content):
    (tmp_path / "epoch-0000.ckpt").write_bytes(content)
    with pytest.raises(UserError, match=r"epoch-0000\.ckpt is damaged"):
        checkpoint.load(tmp_path / "epoch-0000.ckpt")


def test_a_missing_file_and_a_folder_are_clear_errors(tmp_path):
    with pytest.raises(UserError, match=r"no checkpoint at .*nowhere"):
        checkpoint.load(tmp_path / "nowhere.ckpt")
    with pytest.raises(UserError, match="could not read checkpoint"):
        checkpoint.load(tmp_path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_or_missing_tail_falls_back_to_the_one_before(tmp_path, data):
    before, newest = _save(tmp_path, 1), _save(tmp_path, 2)
    content = bytearray(newest.read_bytes())
    if data.draw(st.booleans(), label="cut"):
        content = content[: data.draw(st.integers(0, len(content) - 1), label="length")]
    else:
        content[data.draw(st.integers(0, len(content) - 1), label="byte")] ^= 1 << data.draw(st.integers(0, 7))
    newest.write_bytes(content)
    state, path = checkpoint.load_newest(tmp_path)
    assert path == before
    assert state["model"]["weight"][0, 0] == 1


def test_falling_back_is_said_on_stderr(tmp_path, capsys):
    _save(tmp_path, 1)
    _save(tmp_path, 2).write_bytes(b"")
    checkpoint.load_newest(tmp_path)
    told = capsys.readouterr()
    assert "epoch-0002.ckpt is damaged" in told.err
    assert told.out == ""


def test_best_is_the_last_resort(tmp_path):
    _save(tmp_path, 1, is_best=True)
    _save(tmp_path, 2).write_bytes(b"")
    (tmp_path / "epoch-0001.ckpt").unlink()
    assert checkpoint.load_newest(tmp_path)[1].name == "best.ckpt"


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path):
    _save(tmp_path, 1).write_bytes(b"")
    with pytest.raises(UserError, match="every checkpoint"):
        checkpoint.load_newest(tmp_path)


@pytest.mark.parametrize(("number", "told"), [(errno.ENOSPC, "the disk is full"), (errno.EIO, "Input/output error")])
def test_a_disk_that_refuses_leaves_the_last_checkpoint_intact(tmp_path, monkeypatch, number, told):
    good = _save(tmp_path, 1, is_best=True)
    content = good.read_bytes()

    def refuse(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match=rf"epoch-0002\.ckpt: {told}; the last good checkpoint, .*epoch-0001\.ckpt"):
        _save(tmp_path, 2, keep=1, is_best=True)
    assert _names(tmp_path) == ["best.ckpt", "epoch-0001.ckpt"]
    assert good.read_bytes() == (tmp_path / "best.ckpt").read_bytes() == content


def test_a_disk_full_at_the_very_first_checkpoint_says_so(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(UserError, match="the disk is full; there is no earlier checkpoint"):
        _save(tmp_path, 0)
    assert _names(tmp_path) == []


_KILLED_WHILE_WRITING = """
import os, sys, time, torch
from pathlib import Path
from mbv2.train import checkpoint

def hang(_):
    print("writing", flush=True)
    time.sleep(60)

os.fsync = hang
checkpoint.save(Path(sys.argv[1]), {"model": {"weight": torch.zeros(1000)}}, 1, 0, 1, True)
"""


def test_a_process_killed_while_writing_leaves_the_old_file_and_its_rubbish_is_cleared(tmp_path):
    old = _save(tmp_path, 1).read_bytes()
    with subprocess.Popen(
        [sys.executable, "-c", _KILLED_WHILE_WRITING, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
    assert (tmp_path / "epoch-0001.ckpt").read_bytes() == old
    assert len(_names(tmp_path)) == 2
    assert checkpoint.load_newest(tmp_path)[1].name == "epoch-0001.ckpt"
    _save(tmp_path, 2)
    assert _names(tmp_path) == ["epoch-0001.ckpt", "epoch-0002.ckpt"]


def test_the_generators_continue_where_they_were_after_a_round_trip(tmp_path):
    np.random.standard_normal()  # noqa: NPY002  (leaves a cached second normal, part of the state)
    path = checkpoint.save(tmp_path, {"rng": checkpoint.rng_state()}, 0, 0, 1, False)

    def draw():
        return random.random(), np.random.standard_normal(3).tolist(), torch.rand(3).tolist()  # noqa: NPY002

    expected = draw()
    draw()
    checkpoint.set_rng_state(checkpoint.load(path)["rng"])
    assert draw() == expected


def test_a_gpu_generator_continues_where_it_was(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.rand(1, device="cuda")
    path = checkpoint.save(tmp_path, {"rng": checkpoint.rng_state()}, 0, 0, 1, False)
    expected = torch.rand(3, device="cuda")
    checkpoint.set_rng_state(checkpoint.load(path)["rng"])
    assert torch.equal(torch.rand(3, device="cuda"), expected)
