"""`python -m bench accelerate`: a network is timed only when its logits, or its loss and gradients, are right."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mbv2
from bench import __main__ as cli
from bench import accelerate, schema
from mbv2.kernels import cpu_network

RUNNERS = ["as it is, NCHW", "mbv2.accelerate, NCHW", "as it is, channels_last", "mbv2.accelerate, channels_last"]
FAST = ["--width", "0.35", "--resolution", "32", "--batches", "2", "--seconds", "0", "--device", "cpu"]

needs_compiled = pytest.mark.skipif(cpu_network.refusal() is not None, reason="no compiled CPU kernels in this build")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def measured(tmp_path: Path, *argv: str, code: int = 0) -> schema.Result:
    assert cli.main(["accelerate", *FAST, *argv, "--out", str(tmp_path / "a")]) == code
    return schema.read(tmp_path / "a.json")


@pytest.mark.parametrize("peer", accelerate.PEERS)
def test_every_peer_is_timed_as_it_is_and_accelerated(tmp_path: Path, peer: str) -> None:
    pytest.importorskip(accelerate.PEERS[peer][0])
    result = measured(tmp_path, "--peers", peer)
    cases = [f"{peer}, {mode}" for mode in (accelerate.INFERENCE, accelerate.TRAINING)]
    rows = [(row["model"], row["runner"]) for row in result.rows]
    assert rows == [(case, name) for case in cases for name in RUNNERS]
    assert not result.left_out
    assert all(row["images_per_s"] == pytest.approx(2e3 / row["median_ms"]) for row in result.rows)
    assert all(row["faster"] == 1 for row in result.rows if row["runner"] == accelerate.BASELINE)
    assert max(row["error"] for row in result.rows) < 2e-2
    assert (tmp_path / "a.png").stat().st_size > 0


@needs_compiled
def test_the_operators_run_in_what_is_called_accelerated(tmp_path: Path) -> None:
    from mbv2.kernels import dispatch

    before = dispatch.report()["calls"]
    measured(tmp_path, "--peers", "torchvision")
    after = dispatch.report()["calls"]
    for call in ("inverted_residual/cpu", "inverted_residual_train/cpu", "inverted_residual_train_backward/cpu"):
        assert after[call] > before.get(call, 0)


class _Off(torch.autograd.Function):
    """Identity whose gradient is wrong by a thousandth."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.001


@pytest.mark.parametrize("mode", [accelerate.INFERENCE, accelerate.TRAINING])
def test_wrong_results_get_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    right = mbv2.accelerate

    def wrong(model: nn.Module) -> object:
        report = right(model)
        change = (lambda out: out * 1.001) if mode == accelerate.INFERENCE else _Off.apply
        model.features[3].register_forward_hook(lambda module, given, out: change(out))
        return report

    monkeypatch.setattr(mbv2, "accelerate", wrong)
    result = measured(tmp_path, "--peers", "torchvision", "--modes", mode, code=1)
    assert [row["runner"] for row in result.rows] == [name for name in RUNNERS if "mbv2" not in name]
    reasons = {name.partition(f"torchvision, {mode}, ")[2]: why for name, why in result.left_out.items()}
    assert set(reasons) == {name for name in RUNNERS if "mbv2" in name}
    assert all(why.startswith("wrong result") for why in reasons.values())


def test_a_network_of_which_nothing_is_swapped_is_not_called_accelerated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mbv2, "accelerate", lambda model: mbv2.drop_in.accelerate.Report("MobileNetV2"))
    result = measured(tmp_path, "--peers", "torchvision", "--modes", accelerate.INFERENCE, code=1)
    assert "nothing of the network was swapped" in result.left_out["torchvision, inference, mbv2.accelerate, NCHW"]


def test_the_comparison_leaves_weights_and_statistics_as_they_were() -> None:
    original = accelerate.PEERS["torchvision"][1](0.35, 32)
    found, _ = accelerate.runners(original, accelerate.TRAINING, torch.device("cpu"), torch.float32)
    accelerate.results(found[accelerate.BASELINE], accelerate.TRAINING, 32, torch.float32)
    state = found[accelerate.BASELINE].model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in original.state_dict().items())


def test_a_peer_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    result = measured(tmp_path, "--peers", "torchvision", "timm", "--modes", accelerate.INFERENCE)
    assert result.left_out == {"timm": "timm is not installed: pip install timm"}
    assert {row["model"] for row in result.rows} == {"torchvision, inference"}
