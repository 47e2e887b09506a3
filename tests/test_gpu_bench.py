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


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", "bench/gpu.sh", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200
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


@pytest.mark.slow
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
