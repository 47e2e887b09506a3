"""The GPU bench, rehearsed on the CPU: its whole path, what it writes, and what it says where there is no GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import gpu_kernels, gpu_model, gpu_timing, workload
from mbv2.kernels import aten

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def _bench(
    *arguments: str, folder: Path = ROOT, python: str = sys.executable, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": python, "CUDA_VISIBLE_DEVICES": "", **more}
    script = str(ROOT / "bench" / "gpu.sh")
    return subprocess.run(
        ["bash", script, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=1200
    )


def test_no_gpu_is_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    done = _bench("--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "torch sees no GPU here" in done.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_step_is_one_sentence_and_exit_status_2() -> None:
    done = _bench("--dry-run", "--steps", "kernels,modle")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "unknown step modle" in done.stderr


def test_unknown_option_is_one_sentence_and_exit_status_2() -> None:
    done = _bench("--fast")
    assert done.returncode == 2 and "unknown option --fast" in done.stderr


@pytest.mark.parametrize("arguments", [("--batch", "0"), ("--batch", "many"), ("--dtypes", "float16 half"), ("--out",)])
def test_a_value_that_no_step_could_use_is_one_sentence_and_exit_status_2(arguments: tuple[str, ...]) -> None:
    done = _bench("--dry-run", *arguments)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "half" in done.stderr if "--dtypes" in arguments else arguments[0] in done.stderr


def test_packages_that_are_missing_are_one_sentence_and_exit_status_2(tmp_path: Path) -> None:
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    bare.chmod(0o755)
    done = _bench("--dry-run", python=str(bare))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make setup" in done.stderr


def test_a_failed_step_stops_no_other_and_a_relative_folder_is_the_callers(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || { echo "$2" >>"$LOG"; exit 1; }\n')
    python.chmod(0o755)
    done = _bench("--dry-run", "--out", "here", folder=tmp_path, python=str(python), LOG=str(tmp_path / "log"))
    assert done.returncode == 1 and "failed: kernels model predictions" in done.stderr
    assert (tmp_path / "log").read_text().split() == ["bench.gpu_kernels", "bench.gpu_model", "bench.roofline"]
    assert (tmp_path / "here" / "roofline.txt").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_rehearsal_goes_through_every_step_and_writes_every_file(tmp_path: Path) -> None:
    done = _bench("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        "kernels.json", "kernels.md", "kernels.png", "model.json", "model.md", "roofline.json", "roofline.png",
        "roofline.txt",
    }  # fmt: skip
    kernels, model = (json.loads((tmp_path / name).read_text()) for name in ("kernels.json", "model.json"))
    assert kernels["dry_run"] and model["dry_run"]
    assert not kernels["left_out"]
    ran = {(row["stage"].split()[0], row["backend"]) for row in kernels["rows"]}
    assert {stage for stage, backend in ran if backend == "triton"} == set(aten_stages())
    assert {stage for stage, backend in ran if backend == "cuda"} == {
        "depthwise", "depthwise_backward", "inverted_residual_folded",
    }  # fmt: skip
    inference, training = model["parts"]
    assert [row["way"] for row in inference["rows"]] == [
        "torchvision", "torchvision, BatchNorm folded", "mbv2 operators", "mbv2 optimized",
    ]  # fmt: skip
    assert [row["way"] for row in training["rows"]] == ["torchvision", "mbv2"]
    assert "REHEARSAL" in (tmp_path / "kernels.md").read_text() and "REHEARSAL" in (tmp_path / "model.md").read_text()


def aten_stages() -> Iterator[str]:
    """Stages of which there is a call in training or inference."""
    return (call.stage for call in workload.calls(0.35, 32, 1, torch.bfloat16))


@pytest.fixture
def call() -> workload.Call:
    calls = workload.calls(0.35, 32, 1, torch.bfloat16, (workload.TRAINING,))
    return next(call for call in calls if call.stage == "depthwise")


def test_a_wrong_result_is_listed_and_not_timed(call: workload.Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args: object) -> tuple[Tensor, Tensor]:
        y, moments = aten.depthwise(*args)
        return y + 1, moments

    monkeypatch.setattr(gpu_timing, "seconds", lambda *_: pytest.fail("timed"))
    rows, left_out = gpu_kernels.measure([(call, call)], {"broken": lambda stage: wrong}, CPU, 2)
    assert not rows
    assert [reason.split(":")[0] for reason in left_out.values()] == ["wrong"]


def test_a_failing_backend_is_listed_with_its_message_and_the_others_are_timed(call: workload.Call) -> None:
    def failing(*args: object) -> None:
        raise RuntimeError("no kernel image\nmore")

    backends = {
        "failing": lambda stage: failing,
        "aten": lambda stage: getattr(aten, stage),
        "none": lambda stage: None,
    }
    rows, left_out = gpu_kernels.measure([(call, call)], backends, CPU, 2)
    assert [row["backend"] for row in rows] == ["aten"]
    assert list(left_out.values()) == ["failed: no kernel image"]
    y, moments = aten.depthwise(*gpu_kernels.filled(call.args, CPU))
    size = sum(t.numel() * t.element_size() for t in (*call.args[:3], y, moments) if isinstance(t, Tensor))
    assert rows[0]["bytes"] == size
    assert rows[0]["gb_per_s"] == pytest.approx(size / rows[0]["median_s"] / 1e9)


def test_a_gpu_that_answers_nothing_any_more_leaves_a_document(
    call: workload.Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dead(*args: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(aten, "depthwise", dead)
    rows, left_out = gpu_kernels.measure([(call, call)], {"aten": lambda stage: dead}, CPU, 2)
    assert not rows and list(left_out.values()) == ["failed: an illegal memory access was encountered"]


@pytest.mark.parametrize(
    ("left_out", "status"),
    [
        ({"triton: stem": "failed: out of resource"}, 1),
        ({"cuda: depthwise": "wrong: error 1.00e+00"}, 1),
        ({"cuda, pair: block": "no plan: the hidden tensor is too large", "aten: stem": "failed: no memory"}, 0),
    ],
    ids=("failed", "wrong", "none of ours"),
)
def test_kernels_exit_status_tells_of_our_faults_alone(
    left_out: dict[str, str], status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_kernels, "measure", lambda *args: ([], left_out))
    monkeypatch.setattr(gpu_kernels, "backends", lambda dry_run: ({}, {}))
    monkeypatch.setattr(gpu_kernels, "draw", lambda *args: None)
    assert gpu_kernels.main(["--dry-run", "--out", str(tmp_path)]) == status
    assert json.loads((tmp_path / "kernels.json").read_text())["left_out"] == left_out


@pytest.mark.parametrize(("way", "status"), [("mbv2 optimized, CUDA graph", 1), ("TensorRT", 0)])
def test_networks_exit_status_tells_of_our_faults_alone(
    way: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_model, "measure", lambda *args: ([], {way: "failed"}))
    monkeypatch.setattr(gpu_model, "inference", lambda *args: ({}, {}))
    monkeypatch.setattr(gpu_model, "training", lambda *args: ({}, {"torch.compile": "dry run"}))
    assert gpu_model.main(["--dry-run", "--out", str(tmp_path)]) == status
    parts = json.loads((tmp_path / "model.json").read_text())["parts"]
    assert [part["left_out"][way] for part in parts] == ["failed"] * 2


def test_a_network_that_predicts_something_else_is_not_timed() -> None:
    exact = torch.ones(2, 3)
    ways = {
        "right": lambda: exact,
        "wrong": lambda: 2 * exact,
        "nan": lambda: exact * torch.nan,
        "fails": lambda: 1 / 0,
    }
    rows, left_out = gpu_model.measure(ways, exact, 2, torch.float32, CPU, 2)
    assert [row["way"] for row in rows] == ["right"]
    assert {name: reason.split(":")[0] for name, reason in left_out.items()} == {
        "wrong": "wrong", "nan": "wrong", "fails": "failed",
    }  # fmt: skip


def test_networks_timed_on_a_gpu_keep_their_activations_within_float16() -> None:
    peer, ours = gpu_model.networks(CPU)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        logits = peer.eval()(x)
        assert 0.01 < float(logits.std()) < 100
        torch.testing.assert_close(ours.eval()(x), logits, rtol=1e-3, atol=1e-4)


def test_folding_torchvisions_network_leaves_no_batch_norm_and_the_same_logits() -> None:
    peer, _ = gpu_model.networks(CPU)
    whole = gpu_model.folded(peer)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), peer.eval()(x), rtol=1e-3, atol=1e-4)
    assert not [module for module in whole.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert whole.features[1].conv[0][0].bias is not None


def test_script_is_valid_bash() -> None:
    subprocess.run(["bash", "-n", str(ROOT / "bench" / "gpu.sh")], check=True)
