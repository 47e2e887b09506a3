"""`mbv2 export`: each format run in its own runtime against the network, and a check that can fail."""

from pathlib import Path

import pytest
import torch
from PIL import Image

from mbv2 import cli, weights
from mbv2.errors import UserError
from mbv2.export import export
from mbv2.export.check import Report, compare, runner
from mbv2.export.plain import PlainNetwork
from mbv2.model import MobileNetV2


def trained(padding: str = "symmetric", eps: float = 1e-5) -> MobileNetV2:
    torch.manual_seed(2)
    model = MobileNetV2(4, 0.35, padding=padding, bn_eps=eps)
    generator = torch.Generator().manual_seed(2)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and tensor.dim() == 1:
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(noise + 0.5 if name.endswith("running_var") else 0.7 + 0.6 * noise)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 1, generator=generator)
    return model.eval()


def saved(folder: Path, padding: str = "symmetric") -> str:
    model = trained(padding, 1e-3 if padding == "same" else 1e-5)
    meta = {"alpha": 0.35, "resolution": 64, "padding": padding, "bn_eps": model.bn_eps}
    weights.save_weights(folder / "w.safetensors", model.state_dict(), meta)
    return str(folder / "w.safetensors")


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [64, 65, 50])
def test_the_plain_network_equals_the_model(padding: str, size: int) -> None:
    model = trained(padding)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        expected = model(x)
        found = PlainNetwork(model, size)(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors", "net.ckpt"])
def test_light_formats_pass_their_check(tmp_path: Path, name: str, padding: str) -> None:
    source = saved(tmp_path, padding)
    if name == "net.ckpt" and padding == "same":
        with pytest.raises(UserError, match="pads symmetrically"):
            export(source, tmp_path / name)
        return
    report = export(source, tmp_path / name, check=True)
    assert report is not None
    assert report.refusal("torchscript", 0.9) is None, report


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net.onnx", "net.pt2"])
def test_graph_formats_hold_standard_operators_only_and_take_any_batch(tmp_path: Path, name: str) -> None:
    report = export(saved(tmp_path, "same"), tmp_path / name, check=True)
    assert report is not None
    assert report.refusal("onnx", 0.9) is None, report
    if name == "net.onnx":
        onnx = pytest.importorskip("onnx")
        graph = onnx.load(tmp_path / name)
        onnx.checker.check_model(graph, full_check=True)
        assert {node.domain for node in graph.graph.node} <= {"", "ai.onnx"}
    else:
        program = torch.export.load(tmp_path / name)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert called and all(target.startswith("aten.") for target in called)


@pytest.mark.slow
def test_int8_onnx_reports_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxruntime")
    generator = torch.Generator().manual_seed(4)
    for label in range(4):
        folder = tmp_path / "data" / "val" / f"c{label}"
        folder.mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(0, 256, (80, 80, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
    command = ["export", saved(tmp_path), str(tmp_path / "q.onnx"), "--format", "onnx-int8"]
    assert cli.main(command) == 2
    assert "--data_url" in capsys.readouterr().err
    command += ["--data_url", str(tmp_path / "data"), "--check", "--min_agreement", "0"]
    assert cli.main(command) == 0
    assert "top-1" in capsys.readouterr().err
    assert (tmp_path / "q.onnx").stat().st_size < 0.6 * (tmp_path / "w.safetensors").stat().st_size


def test_a_file_that_computes_something_else_fails_the_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = saved(tmp_path)
    other = trained()
    torch.nn.init.zeros_(other.classifier[1].weight)
    monkeypatch.setattr("mbv2.export.command.load_trained", _stand_in(source, other))
    monkeypatch.setattr("mbv2.export.check.runner", lambda path, format: other)
    assert cli.main(["export", source, str(tmp_path / "net.pt"), "--check"]) == 1
    assert "computes something else" in capsys.readouterr().err


def _stand_in(source: str, other: MobileNetV2) -> object:
    from mbv2.trained import load_trained

    return lambda *args, **options: load_trained(source, **options)


def test_the_verdict_goes_by_logits_or_by_classes() -> None:
    good, off, wrong = Report(9, 1e-5, 3.0, 1.0), Report(9, 0.5, 3.0, 1.0), Report(9, 0.5, 3.0, 0.5)
    assert good.refusal("onnx", 0.9) is None
    assert "logits differ" in str(off.refusal("onnx", 0.9))
    assert off.refusal("onnx-int8", 0.9) is None
    assert "50.0 %" in str(wrong.refusal("onnx-int8", 0.9))
    assert "logits" in str(Report(9, float("nan"), 3.0, 1.0).refusal("onnx", 0.9))


def test_labels_give_both_accuracies() -> None:
    model = trained()
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        labels = model(x).argmax(1)
    report = compare(model, model, [(x, labels)])
    assert (report.top1, report.top1_exported, report.difference) == (1.0, 1.0, 0.0)


def test_exported_torchscript_runs_without_this_package(tmp_path: Path) -> None:
    export(saved(tmp_path), tmp_path / "net.pt")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(runner(tmp_path / "net.pt", "torchscript")(x), trained()(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], "WEIGHTS and DST"), (["w", "net.xyz"], "net.xyz"), (["w", "nowhere/net.onnx"], "folder that exists")],
)
def test_wrong_commands_are_told_in_a_sentence(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *arguments]) == 2
    assert expected in capsys.readouterr().err
