"""`mbv2 export`: each format run in its own runtime against the network, and a check that can fail."""

from dataclasses import replace
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


def drawn_pictures(folder: Path, per_class: int = 4) -> str:
    """A labelled folder of noise for the four classes."""
    generator = torch.Generator().manual_seed(4)
    for label in range(4):
        (folder / "val" / f"c{label}").mkdir(parents=True)
        for number in range(per_class):
            pixels = torch.randint(0, 256, (80, 80, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(folder / "val" / f"c{label}" / f"{number}.png")
    return str(folder)


@pytest.mark.slow
def test_a_compiled_package_computes_the_same(tmp_path: Path) -> None:
    report = export(saved(tmp_path, "same"), tmp_path / "net.pt2", format="aoti", resize=32, check=True)
    assert report is not None and report.count == 4
    assert report.refusal("aoti", 0.9) is None, report


def test_a_compiled_package_needs_torchs_suffix(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"net\.so.*\.pt2"):
        export(saved(tmp_path), tmp_path / "net.so", format="aoti")


@pytest.mark.slow
@pytest.mark.parametrize(("format", "name"), [("onnx-int8", "q.onnx"), ("pt2e-int8", "q.pt2")])
def test_int8_reports_its_accuracy(tmp_path: Path, capsys: pytest.CaptureFixture[str], format: str, name: str) -> None:
    pytest.importorskip("onnxruntime" if format == "onnx-int8" else "torchao")
    data = drawn_pictures(tmp_path / "data")
    command = ["export", saved(tmp_path), str(tmp_path / name), "--format", format, "--resize", "32"]
    assert cli.main(command) == 2
    assert "--data_url" in capsys.readouterr().err
    command += ["--data_url", data, "--check", "--min_agreement", "0"]
    assert cli.main(command) == 0
    said = capsys.readouterr().err
    # Ranges were measured on every second of the 16.
    assert "8 pictures: same class on" in said and "top-1" in said
    if format == "pt2e-int8":
        stored = torch.export.load(tmp_path / name).state_dict.values()
        kernels = [tensor for tensor in stored if tensor.dim() > 1]
        assert len(kernels) == 53 and all(tensor.dtype == torch.int8 for tensor in kernels)
        assert str(Path(__file__).parents[1]).encode() not in (tmp_path / name).read_bytes()
    else:
        assert (tmp_path / name).stat().st_size < 0.6 * (tmp_path / "w.safetensors").stat().st_size
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        exact = trained()(x)
        error = (runner(tmp_path / name, format)(x) - exact).norm() / exact.norm()
    assert 1e-4 < error < 0.2
    if format == "onnx-int8":
        from mbv2.convert import convert
        from mbv2.convert.command import Said

        convert(tmp_path / name, tmp_path / "back.safetensors", said=Said(preprocessing="torch"))
        with torch.no_grad():
            back = weights.model_from_weights(tmp_path / "back.safetensors")[0].eval()(x)
        assert (back - exact).norm() < 0.2 * exact.norm()


def test_ranges_and_accuracy_are_measured_on_different_pictures(tmp_path: Path) -> None:
    from mbv2.data import open_source
    from mbv2.export.command import split

    source = open_source(drawn_pictures(tmp_path, per_class=100), "val")
    ranges, others = split(source)
    names = [sample.name for part in (ranges, others) for sample in part.samples]
    assert sorted(names) == sorted(sample.name for sample in source.samples)
    assert 64 < len(ranges.samples) <= 128
    assert {sample.label for sample in ranges.samples} == {sample.label for sample in others.samples} == {0, 1, 2, 3}
    one = split(replace(source, samples=source.samples[:1]))
    assert [len(part.samples) for part in one] == [1, 1]


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
    [
        ([], "WEIGHTS and DST"),
        (["w", "net.xyz"], "net.xyz"),
        (["w", "nowhere/net.onnx"], "folder that exists"),
        (["w", "net.pt", "--format", "int8", "--data_url", "d"], "ends in .safetensors"),
    ],
)
def test_wrong_commands_are_told_in_a_sentence(
    arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["export", *arguments]) == 2
    assert expected in capsys.readouterr().err
