"""Benchmarks of whole networks: a runner is timed only when its logits, or its loss and gradients, are right."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bench import __main__ as cli
from bench import accuracy, cpu, model, schema, train
from mbv2.kernels import cpu_network

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


FEW = ["torchvision channels_last", "mbv2 aten"]


def test_right_runners_pass_with_losses_and_gradients_near_float64() -> None:
    errors, left_out = train.checked(train.steps(0.35, CPU, torch.float32, FEW), 0.35, 32, CPU, torch.float32)
    assert set(errors) == {train.BASELINE, *FEW}
    assert not left_out
    assert max(errors.values()) < 1e-3


class _Scaled(torch.autograd.Function):
    """Identity whose gradient is wrong by a thousandth."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * 1.001


def test_a_gradient_that_is_wrong_by_a_thousandth_is_refused() -> None:
    steps = train.steps(0.35, CPU, torch.float32, ["mbv2 aten"])
    network = steps["mbv2 aten"].model
    steps["mbv2 aten"]._run = lambda x: _through(network, x)
    errors, left_out = train.checked(steps, 0.35, 32, CPU, torch.float32)
    assert set(errors) == {train.BASELINE}
    assert left_out["mbv2 aten"].startswith("wrong result")


def _through(network: nn.Module, x: Tensor) -> Tensor:
    for number, feature in enumerate(network.features[:-1]):
        x = _Scaled.apply(feature(x)) if number == 3 else feature(x)
    return network.classifier(network.features[-1](x).mean((2, 3)))


def test_the_check_leaves_weights_and_statistics_as_they_were() -> None:
    step = train.steps(0.35, CPU, torch.float32, ["mbv2 aten"])["mbv2 aten"]
    before = {name: value.clone() for name, value in step.model.state_dict().items()}
    train.first_step(step, 32, CPU, between_bends=True)
    assert all(torch.equal(before[name], value) for name, value in step.model.state_dict().items())


def test_a_step_trains() -> None:
    step = train.steps(0.35, CPU, torch.float32, ["mbv2 aten"])["mbv2 aten"]
    x, labels = train.batch_of(4, 32, CPU, torch.channels_last)
    losses = [step(x, labels).item() for _ in range(5)]
    assert losses[-1] < losses[0]


def test_the_train_benchmark_writes_rates_and_names_what_it_left_out(tmp_path: Path) -> None:
    argv = [
        "train",
        "--models",
        "0.35_32",
        "--batches",
        "2",
        "--seconds",
        "0",
        "--threads",
        "1",
        "--device",
        "cpu",
        "--out",
    ]
    assert cli.main([*argv, str(tmp_path / "t"), "--runners", "mbv2 aten", "mbv2 triton"]) == 0
    result = schema.read(tmp_path / "t.json")
    assert [row["runner"] for row in result.rows] == [train.BASELINE, "mbv2 aten"]
    assert all(row["images_per_s"] == pytest.approx(2e3 / row["median_ms"]) for row in result.rows)
    assert "not on a CUDA GPU" in result.left_out["mbv2 triton"]


needs_compiled = pytest.mark.skipif(cpu_network.refusal() is not None, reason="no compiled CPU network in this build")


@needs_compiled
def test_the_model_benchmark_refuses_a_runner_with_wrong_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(models: tuple[nn.Module, nn.Module], case: cpu.Case, x: Tensor, folder: str) -> cpu.Runner:
        return lambda pictures: models[1](pictures) * 1.01

    monkeypatch.setitem(cpu.RUNNERS, "wrong", wrong)
    argv = ["model", "--models", "0.35_32", "--batches", "1", "--threads", "1", "--seconds", "0", "--device", "cpu"]
    assert cli.main([*argv, "--runners", "mbv2", "eager NCHW", "wrong", "--out", str(tmp_path / "m")]) == 0
    result = schema.read(tmp_path / "m.json")
    assert {row["runner"] for row in result.rows} == {"mbv2", "eager NCHW"}
    assert {row["baseline"] for row in result.rows} == {"eager NCHW"}
    assert "wrong logits" in result.left_out["wrong"]


def test_pictures_of_the_benchmarks_are_always_the_same() -> None:
    assert torch.equal(model.pictures(2, 32), model.pictures(2, 32))


def test_published_figures_cover_every_variant_and_are_never_called_ours() -> None:
    rows = accuracy.published_rows()
    assert {row["source"] for row in rows} == {"MindSpore", "TensorFlow", "torchvision", "timm"}
    for source in ("MindSpore", "TensorFlow"):
        assert len([row for row in rows if row["source"] == source]) == 22


def test_torchvisions_published_figures_are_those_in_its_meta_data() -> None:
    from torchvision.models import MobileNet_V2_Weights

    rows = {row["weights"]: row for row in accuracy.published_rows() if row["source"] == "torchvision"}
    for weights in MobileNet_V2_Weights:
        published = weights.meta["_metrics"]["ImageNet-1K"]
        assert rows[weights.name]["top1_percent"] == published["acc@1"]
        assert rows[weights.name]["top5_percent"] == published["acc@5"]


@pytest.mark.slow
def test_measured_accuracy_at_224_is_that_of_mbv2_eval(shared_data: Path) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"
    rows = accuracy.measured_rows(str(weights), str(shared_data / "eval" / "ilsvrc_val_227"), 50, (224,))
    assert [(row["model"], row["right"], row["pictures"]) for row in rows] == [("mobilenet_v2_1.0_224", 782, 1000)]
