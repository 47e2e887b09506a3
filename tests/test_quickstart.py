import json
import subprocess
import sys

import pytest

from mbv2 import quickstart as module
from mbv2.quickstart import QuickstartOptions, Result, main, process_plan, summary, train_command
from mbv2.shapes import CLASS_NAMES, ShapesSpec, draw_shapes


def test_one_process_per_gpu_with_half_the_cores_shared_out():
    assert process_plan(gpus=8, cores=64) == (8, 4)


def test_without_a_gpu_there_is_one_process_and_a_core_left_for_the_loader():
    assert process_plan(gpus=0, cores=2) == (1, 1)


def test_every_process_has_at_least_one_thread():
    assert process_plan(gpus=4, cores=2) == (4, 1)


def test_the_joint_batch_is_the_same_for_any_number_of_processes(tmp_path):
    one = train_command(QuickstartOptions(batch_size=16), tmp_path, tmp_path, 1)
    four = train_command(QuickstartOptions(batch_size=16), tmp_path, tmp_path, 4)
    assert "--batch_size=16" in one
    assert "--batch_size=4" in four
    assert "--nproc_per_node=4" in four


def test_the_training_command_uses_options_training_knows(tmp_path):
    from mbv2.train.options import TrainOptions

    command = train_command(QuickstartOptions(), tmp_path, tmp_path, 1)
    for option in command[command.index("mbv2.train") + 1 :]:
        target = TrainOptions()
        for part in option.removeprefix("--").split("=")[0].split("."):
            target = getattr(target, part)


def test_the_summary_names_accuracy_time_and_every_file(tmp_path):
    text = summary(Result(tmp_path, top1=0.975, top5=1.0, seconds=61.2))
    assert "97.50 %" in text
    assert "61 s" in text
    for name in ("metrics.csv", "curves.png", "annotated", "best.safetensors", "checkpoints", "evaluation.json"):
        assert str(tmp_path) in text
        assert name in text


def test_pictures_to_run_on_come_from_every_class(tmp_path):
    data = draw_shapes(tmp_path / "data", ShapesSpec(1, 3, 48, 48))
    assert module._pick_pictures(data, tmp_path / "pictures") == 12
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert [name.split("-")[1] for name in names] == list(CLASS_NAMES)


def test_a_missing_folder_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert main([f"--data_url={tmp_path / 'none'}", f"--output={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("mbv2: error: ")
    assert "none is no folder" in error
    assert not (tmp_path / "run").exists()


def test_a_failing_step_is_reported_with_its_exit_code(tmp_path, capsys, monkeypatch):
    failing = [sys.executable, "-c", "raise SystemExit(3)"]
    monkeypatch.setattr(module, "train_command", lambda *_: failing)
    data = draw_shapes(tmp_path / "data", ShapesSpec(1, 1, 48, 48))
    assert main([f"--data_url={data}", f"--output={tmp_path / 'run'}"]) == 2
    assert "exit code 3" in capsys.readouterr().err


@pytest.mark.slow
def test_all_steps_run_on_a_users_folder_and_leave_every_file(tmp_path):
    data = draw_shapes(tmp_path / "data", ShapesSpec(train_per_class=4, val_per_class=2, min_side=48, max_side=64))
    before = sorted(path.relative_to(data) for path in data.rglob("*"))
    command = [sys.executable, "-m", "mbv2.quickstart", f"--data_url={data}", f"--output={tmp_path / 'run'}"]
    done = subprocess.run(
        [*command, "--epochs=2", "--resize=32"], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    result = Result(tmp_path / "run", scores["Top_1_Accuracy"], scores["Top_5_Accuracy"], seconds=0.0)
    for name, path in result.files.items():
        assert path.exists(), name
        assert str(path) in done.stdout
    assert len(list(result.files["annotated pictures"].iterdir())) >= 12
    assert sorted(path.relative_to(data) for path in data.rglob("*")) == before
