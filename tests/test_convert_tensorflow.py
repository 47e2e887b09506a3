"""TensorFlow's and Keras' files, written here in their layouts from transformers' network, which runs as TF does."""

from pathlib import Path
from types import ModuleType

import pytest
import torch
from test_convert import logits_agree, scrambled
from test_convert_fuzz import bundle
from torch import Tensor, nn

from mbv2.convert import convert, wire

NORM = (("gamma", "weight"), ("beta", "bias"), ("moving_mean", "running_mean"), ("moving_variance", "running_var"))


@pytest.fixture(scope="module")
def original() -> nn.Module:
    transformers: ModuleType = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=5, depth_multiplier=0.35)
    return scrambled(transformers.MobileNetV2ForImageClassification(config))


def parts(model: nn.Module) -> list[tuple[str, str, nn.Module]]:
    """(TF-slim's name, Keras' name, layer) in running order."""
    body = model.mobilenet_v2
    found = [("Conv", "Conv1", body.conv_stem.first_conv)]
    found.append(("expanded_conv/depthwise", "expanded_conv_depthwise", body.conv_stem.conv_3x3))
    found.append(("expanded_conv/project", "expanded_conv_project", body.conv_stem.reduce_1x1))
    for n, layer in enumerate(body.layer, 1):
        for step, part in (("expand", "expand_1x1"), ("depthwise", "conv_3x3"), ("project", "reduce_1x1")):
            found.append((f"expanded_conv_{n}/{step}", f"block_{n}_{step}", getattr(layer, part)))
    return [*found, ("Conv_1", "Conv_1", body.conv_1x1)]


def kernel(layer: nn.Module) -> Tensor:
    """[h, w, in, out], depthwise [h, w, C, 1]."""
    weight = layer.convolution.weight.detach()
    turned = weight.permute(2, 3, 0, 1) if layer.convolution.groups > 1 else weight.permute(2, 3, 1, 0)
    return turned.contiguous()


def slim(model: nn.Module) -> dict[str, Tensor]:
    tensors = {}
    for name, _, layer in parts(model):
        end = "depthwise_weights" if name.endswith("depthwise") else "weights"
        tensors[f"MobilenetV2/{name}/{end}"] = kernel(layer)
        for theirs, ours in NORM:
            tensors[f"MobilenetV2/{name}/BatchNorm/{theirs}"] = getattr(layer.normalization, ours).detach()
    top = "MobilenetV2/Logits/Conv2d_1c_1x1"
    tensors[f"{top}/weights"] = model.classifier.weight.detach().T[None, None].contiguous()
    tensors[f"{top}/biases"] = model.classifier.bias.detach()
    return tensors


def check(source: Path, original: nn.Module, size: int = 64) -> dict:
    target = source.parent / "w.safetensors"
    convert(source, target)
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        meta = logits_agree(target, original(x).logits, x)
    assert (meta["padding"], meta["bn_eps"], meta["squeeze"], meta["mean"]) == ("same", 1e-3, True, [0.5] * 3)
    return meta


@pytest.mark.parametrize("size", [64, 65])
def test_tf_slim_checkpoint(original: nn.Module, tmp_path: Path, size: int) -> None:
    index, data = bundle(slim(original) | {"global_step": torch.ones(1)})
    (tmp_path / "model.ckpt-1.index").write_bytes(index)
    (tmp_path / "model.ckpt-1.data-00000-of-00001").write_bytes(data)
    check(tmp_path / "model.ckpt-1", original, size)


def test_moving_averages_are_preferred(original: nn.Module, tmp_path: Path) -> None:
    tensors = slim(original)
    averaged = {f"{name}/ExponentialMovingAverage": value for name, value in tensors.items()}
    index, data = bundle({name: torch.zeros_like(value) for name, value in tensors.items()} | averaged)
    (tmp_path / "m.index").write_bytes(index)
    (tmp_path / "m.data-00000-of-00001").write_bytes(data)
    check(tmp_path / "m.index", original)


def test_saved_model_of_keras(original: nn.Module, tmp_path: Path) -> None:
    tensors, number = {}, 0
    end = "/.ATTRIBUTES/VARIABLE_VALUE"
    for _, _, layer in parts(original):
        name = "depthwise_kernel" if layer.convolution.groups > 1 else "kernel"
        tensors[f"layer_with_weights-{number}/{name}{end}"] = kernel(layer)
        for theirs, ours in NORM:
            key = f"layer_with_weights-{number + 1}/{theirs}{end}"
            tensors[key] = getattr(layer.normalization, ours).detach()
        number += 2
    tensors[f"layer_with_weights-{number}/kernel{end}"] = original.classifier.weight.detach().T.contiguous()
    tensors[f"layer_with_weights-{number}/bias{end}"] = original.classifier.bias.detach()
    index, data = bundle(tensors)
    folder = tmp_path / "saved"
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "variables.index").write_bytes(index)
    (folder / "variables" / "variables.data-00000-of-00001").write_bytes(data)
    check(folder, original)


def test_frozen_graph(original: nn.Module, tmp_path: Path) -> None:
    nodes = []
    for name, value in slim(original).items():
        shape = b"".join(wire.put(2, wire.put(1, size)) for size in value.shape)
        proto = wire.put(1, 1) + wire.put(2, shape) + wire.put(4, value.contiguous().numpy().tobytes())
        attribute = wire.put(1, "value") + wire.put(2, wire.put(8, proto))
        nodes.append(wire.put(1, wire.put(1, name) + wire.put(2, "Const") + wire.put(5, attribute)))
    (tmp_path / "frozen.pb").write_bytes(b"".join(nodes))
    check(tmp_path / "frozen.pb", original)


def test_keras_h5_by_layer_names(original: nn.Module, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "m.h5", "w") as file:
        for _, name, layer in parts(original):
            bn = {"Conv1": "bn_Conv1", "Conv_1": "Conv_1_bn"}.get(name, f"{name}_BN")
            end = "depthwise_kernel" if layer.convolution.groups > 1 else "kernel"
            file[f"model_weights/{name}/{name}/{end}:0"] = kernel(layer).numpy()
            for theirs, ours in NORM:
                file[f"model_weights/{bn}/{bn}/{theirs}:0"] = getattr(layer.normalization, ours).detach().numpy()
        file["model_weights/predictions/predictions/kernel:0"] = original.classifier.weight.detach().T.numpy()
        file["model_weights/predictions/predictions/bias:0"] = original.classifier.bias.detach().numpy()
    check(tmp_path / "m.h5", original)


def test_keras_3_weights_by_kind_and_order(original: nn.Module, tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    counts = {"conv2d": 0, "depthwise_conv2d": 0, "batch_normalization": 0}

    def next_name(kind: str) -> str:
        counts[kind] += 1
        return kind if counts[kind] == 1 else f"{kind}_{counts[kind] - 1}"

    with h5py.File(tmp_path / "m.weights.h5", "w") as file:
        for _, _, layer in parts(original):
            kind = "depthwise_conv2d" if layer.convolution.groups > 1 else "conv2d"
            file[f"layers/{next_name(kind)}/vars/0"] = kernel(layer).numpy()
            bn = next_name("batch_normalization")
            for number, (_, ours) in enumerate(NORM):
                file[f"layers/{bn}/vars/{number}"] = getattr(layer.normalization, ours).detach().numpy()
        file["layers/dense/vars/0"] = original.classifier.weight.detach().T.numpy()
        file["layers/dense/vars/1"] = original.classifier.bias.detach().numpy()
    check(tmp_path / "m.weights.h5", original)
