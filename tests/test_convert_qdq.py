"""ONNX files written by the onnx package and quantised by onnxruntime: read, and compared with its outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_export import trained
from torch import Tensor, nn

from mbv2 import weights
from mbv2.convert import convert
from mbv2.convert.command import Said
from mbv2.errors import UserError
from mbv2.export.plain import PaddedConv, PlainBlock, PlainNetwork

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
SIZE = 64


class Writer:
    """An ONNX graph of a PlainNetwork, node by node with onnx.helper."""

    def __init__(self) -> None:
        self.nodes, self.constants = [], []

    def constant(self, value: np.ndarray) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def node(self, op: str, *inputs: str, **attributes: object) -> str:
        name = f"n{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], **attributes))
        return name

    def add(self, module: nn.Module, x: str) -> str:
        if isinstance(module, PaddedConv):
            conv = module.conv
            before, after = (module.pads[0], module.pads[1]) if any(module.pads) else (conv.padding[0],) * 2
            return self.node(
                "Conv",
                x,
                self.constant(conv.weight.numpy()),
                self.constant(conv.bias.numpy()),
                strides=list(conv.stride),
                group=conv.groups,
                pads=[before, before, after, after],
            )
        if isinstance(module, nn.ReLU6):
            return self.node("Clip", x, self.constant(np.float32(0)), self.constant(np.float32(6)))
        if isinstance(module, PlainBlock):
            out = self.add(module.stages, x)
            return self.node("Add", x, out) if module.residual else out
        for part in module:
            x = self.add(part, x)
        return x

    def write(self, network: PlainNetwork, path: Path) -> None:
        x = self.add(network.features, "images")
        x = self.node("Flatten", self.node("GlobalAveragePool", x))
        top = network.classifier
        weight, bias = self.constant(top.weight.numpy()), self.constant(top.bias.numpy())
        self.nodes.append(onnx.helper.make_node("Gemm", [x, weight, bias], ["logits"], transB=1))
        value = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            self.nodes,
            "network",
            [value("images", onnx.TensorProto.FLOAT, ["n", 3, SIZE, SIZE])],
            [value("logits", onnx.TensorProto.FLOAT, ["n", top.out_features])],
            self.constants,
        )
        opset = [onnx.helper.make_opsetid("", 17)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=10), path)


def pictures(count: int = 4) -> Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5))


def run(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"images": x.numpy()})[0])


def written(folder: Path, padding: str) -> Path:
    Writer().write(PlainNetwork(trained(padding), SIZE), folder / "float.onnx")
    return folder / "float.onnx"


def read(source: Path) -> tuple[nn.Module, dict]:
    target = source.with_suffix(".safetensors")
    convert(source, target, said=Said(preprocessing="tf"))
    model, meta = weights.model_from_weights(target)
    return model.eval(), meta


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@torch.no_grad()
def test_a_float_file_gives_onnxruntimes_logits(tmp_path: Path, padding: str) -> None:
    source = written(tmp_path, padding)
    expected = run(source, pictures())
    model, meta = read(source)
    torch.testing.assert_close(model(pictures()), expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (meta["padding"], meta["resolution"]) == (padding, SIZE)


@pytest.mark.parametrize("per_channel", [True, False])
@torch.no_grad()
def test_a_quantised_file_gives_its_own_weights(tmp_path: Path, per_channel: bool) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"images": pictures().numpy()}])

        def get_next(self) -> dict | None:
            return next(self.batches, None)

    source = written(tmp_path, "same")
    quantised = tmp_path / "q.onnx"
    options = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": per_channel}
    quantize_static(source, quantised, Reader(), quant_format=QuantFormat.QDQ, **options)
    model, meta = read(quantised)
    assert meta["padding"] == "same"
    # Each weight is a whole number of steps, at most half a step from the float file's.
    for found, original in zip(kernels(model), kernels(read(source)[0]), strict=True):
        dims = (1, 2, 3) if per_channel else (0, 1, 2, 3)
        step = original.abs().amax(dims, keepdim=True) / 127
        assert float(((found - original).abs() / step).max()) < 0.51
        assert not torch.equal(found, original)
    # What is left between us and onnxruntime is the rounding of activations, which only its graph has.
    ours, theirs, unquantised = model(pictures()), run(quantised, pictures()), run(source, pictures())
    assert (ours - theirs).norm() < 0.1 * theirs.norm()
    assert (ours - unquantised).norm() < 0.1 * unquantised.norm()


def kernels(model: nn.Module) -> list[Tensor]:
    """The convolutions' weights with the BatchNorms that conversion adds taken in."""
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    return [
        conv.weight * (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
        for conv, norm in zip(convs, norms, strict=True)
    ]


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@torch.no_grad()
def test_calibration_gives_the_statistics_of_the_pictures_and_keeps_the_logits(tmp_path: Path, padding: str) -> None:
    source, folder = written(tmp_path, padding), tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(3)
    for number in range(6):
        Image.fromarray(generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    said = Said(preprocessing="tf")
    notes = convert(source, tmp_path / "folded.safetensors", said=said)
    assert "--calibrate" in notes[-1]
    notes = convert(source, tmp_path / "w.safetensors", said=said, pictures=str(folder))
    assert "measured on 6 pictures" in notes[-1]
    before, after = (weights.model_from_weights(tmp_path / name)[0] for name in ("folded.safetensors", "w.safetensors"))
    x = torch.stack([torch.from_numpy(np.array(Image.open(folder / f"{n}.png"))) for n in range(6)])
    x = x.permute(0, 3, 1, 2).contiguous() / 127.5 - 1
    expected = before.eval()(x)
    scale = expected.abs().max().item()
    torch.testing.assert_close(after.eval()(x), expected, rtol=1e-3, atol=1e-3 * scale)
    # In training BatchNorm normalises by the batch's own statistics: those that were measured.
    after.classifier[0].p = before.classifier[0].p = 0.0
    torch.testing.assert_close(after.train()(x), expected, rtol=1e-2, atol=1e-2 * scale)
    assert (before.train()(x) - expected).abs().max() > 0.1 * scale


def test_calibration_without_a_picture_that_can_be_read_is_refused(tmp_path: Path) -> None:
    source = written(tmp_path, "symmetric")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="--calibrate.*decoded"):
        convert(source, tmp_path / "w.safetensors", said=Said(preprocessing="tf"), pictures=str(tmp_path / "p"))
