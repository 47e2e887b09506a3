"""`mbv2 convert` against the libraries the weights come from: their own outputs, from their own files."""

import io
import sys
import warnings
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torchvision
from torch import nn

from mbv2 import cli, weights
from mbv2.convert import convert, read_network
from mbv2.convert.command import Said
from mbv2.convert.network import state_dict
from mbv2.errors import UserError
from mbv2.model import MobileNetV2
from mbv2.trained import load_trained


def scrambled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
    return model.eval()


def logits_agree(path: Path, expected: torch.Tensor, x: torch.Tensor) -> dict:
    """Our network from the converted file against the original's logits; returns the file's meta."""
    model, meta = weights.model_from_weights(path)
    with torch.no_grad():
        found = model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-4 * expected.abs().max().item())
    return meta


@pytest.fixture
def timm() -> ModuleType:
    return pytest.importorskip("timm")


def test_torchvision(tmp_path: Path) -> None:
    model = scrambled(torchvision.models.mobilenet_v2(num_classes=11, width_mult=0.35))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        meta = logits_agree(tmp_path / "w.safetensors", model(x), x)
    assert (meta["padding"], meta["bn_eps"], meta["alpha"], meta["squeeze"]) == ("symmetric", 1e-5, 0.35, False)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_timm(timm: ModuleType, tmp_path: Path, suffix: str) -> None:
    from safetensors.torch import save_file

    model = scrambled(timm.create_model("mobilenetv2_050", num_classes=7))
    path = tmp_path / f"timm.{suffix}"
    save_file(model.state_dict(), path) if suffix == "safetensors" else torch.save(model.state_dict(), path)
    convert(path, tmp_path / "w.safetensors")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits_agree(tmp_path / "w.safetensors", model(x), x)


def test_timms_deeper_network_is_refused(timm: ModuleType, tmp_path: Path) -> None:
    torch.save(timm.create_model("mobilenetv2_110d", num_classes=2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="not a MobileNetV2 that can be converted"):
        convert(tmp_path / "w.pth", tmp_path / "w.safetensors")


@pytest.mark.parametrize("tf_padding", [True, False])
@pytest.mark.parametrize("size", [64, 65])
def test_hugging_face_folder(tmp_path: Path, tf_padding: bool, size: int) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(
        num_labels=12, depth_multiplier=0.35, tf_padding=tf_padding, image_size=96, layer_norm_eps=0.002
    )
    model = scrambled(transformers.MobileNetV2ForImageClassification(config))
    model.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "w.safetensors")
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        meta = logits_agree(tmp_path / "w.safetensors", model(x).logits, x)
    assert meta["padding"] == ("same" if tf_padding else "symmetric")
    assert (meta["bn_eps"], meta["resolution"], meta["mean"]) == (0.002, 96, [0.5, 0.5, 0.5])


def test_hugging_face_weights_without_config_ask_for_the_padding(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=3, depth_multiplier=0.35)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").unlink()
    source = tmp_path / "hf" / "model.safetensors"
    with pytest.raises(UserError, match="--padding same or symmetric"):
        convert(source, tmp_path / "w.safetensors")
    convert(source, tmp_path / "w.safetensors", said=Said(padding="same"))
    assert weights.read_weights(tmp_path / "w.safetensors").meta["bn_eps"] == 1e-3


def test_hugging_face_background_class_is_found(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {0: "background", **{index: f"thing {index}" for index in range(1, 4)}}
    config = transformers.MobileNetV2Config(num_labels=4, id2label=names, depth_multiplier=0.35)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "w.safetensors")
    trained = load_trained(str(tmp_path / "w.safetensors"))
    assert trained.model.class_offset == 1
    assert trained.class_names == ["thing 1", "thing 2", "thing 3"]


def exported(model: nn.Module, path: Path, size: int = 64) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (torch.randn(1, 3, size, size),), path, dynamo=True, verbose=False)
    return path


@pytest.mark.slow
def test_onnx_of_torchvision_with_weights_beside_the_file(tmp_path: Path) -> None:
    model = scrambled(torchvision.models.mobilenet_v2(num_classes=9, width_mult=0.35))
    source = exported(model, tmp_path / "net.onnx")
    with pytest.raises(UserError, match="--preprocessing"):
        convert(source, tmp_path / "w.safetensors")
    convert(source, tmp_path / "w.safetensors", said=Said(preprocessing="torch"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        meta = logits_agree(tmp_path / "w.safetensors", model(x), x)
    assert (meta["resolution"], meta["padding"]) == (64, "symmetric")


@pytest.mark.slow
def test_onnx_of_timm(timm: ModuleType, tmp_path: Path) -> None:
    model = scrambled(timm.create_model("mobilenetv2_035", num_classes=9))
    convert(exported(model, tmp_path / "net.onnx"), tmp_path / "w.safetensors", said=Said(preprocessing="torch"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        logits_agree(tmp_path / "w.safetensors", model(x), x)


@pytest.mark.slow
def test_onnx_of_hugging_face_keeps_same_padding(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MobileNetV2Config(num_labels=9, depth_multiplier=0.35, return_dict=False)
    model = scrambled(transformers.MobileNetV2ForImageClassification(config))
    convert(exported(model, tmp_path / "net.onnx"), tmp_path / "w.safetensors", said=Said(preprocessing="tf"))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        meta = logits_agree(tmp_path / "w.safetensors", model(x)[0], x)
    assert meta["padding"] == "same"


@pytest.mark.parametrize("naming", ["mindcv", "mindvision"])
def test_mindspore_there_and_back(tmp_path: Path, naming: str) -> None:
    model = scrambled(MobileNetV2(6, 0.5))
    weights.save_weights(tmp_path / "a.safetensors", model.state_dict(), {"alpha": 0.5, "mean": [0.1, 0.2, 0.3]})
    convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt", naming=naming)
    convert(tmp_path / "b.ckpt", tmp_path / "c.safetensors")
    back = weights.read_weights(tmp_path / "c.safetensors").state_dict
    assert weights.fingerprint(back) == weights.fingerprint(model.state_dict())


def test_mindspore_real_file_equals_its_torch_twin_and_is_written_back_byte_for_byte(
    shared_data: Path, tmp_path: Path
) -> None:
    real = shared_data / "mindspore" / "mobilenet_v2_100_dequant_ms2.10.ckpt"
    convert(real, tmp_path / "w.safetensors")
    found = weights.read_weights(tmp_path / "w.safetensors").state_dict
    twin = torch.load(
        shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth", weights_only=True
    )
    theirs = torchvision.models.mobilenet_v2()
    theirs.load_state_dict(twin)
    ours = torchvision.models.mobilenet_v2()
    ours.load_state_dict(found)
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-3, atol=1e-3)
    convert(tmp_path / "w.safetensors", tmp_path / "back.ckpt")
    from mbv2.convert import mindspore

    a = mindspore.read_tensors(memoryview(real.read_bytes()))
    b = mindspore.read_tensors(memoryview((tmp_path / "back.ckpt").read_bytes()))
    assert list(a) == list(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("nolzhou_checkpoint_lenet-1_1875.ckpt", {"conv1.weight": [6, 1, 5, 5], "fc3.bias": [10]}),
        ("qishna_LeNet5_10_step.ckpt", {}),
        ("qishna_LinearNet_10_step.ckpt", {}),
    ],
)
def test_other_mindspore_files_are_read_but_are_no_mobilenet(shared_data: Path, name: str, shapes: dict) -> None:
    from mbv2.convert import mindspore

    path = shared_data / "mindspore" / name
    tensors = mindspore.read_tensors(memoryview(path.read_bytes()))
    assert tensors and all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    for key, shape in shapes.items():
        assert list(tensors[key].shape) == shape
    with pytest.raises(UserError, match=f"{name}: not a MobileNetV2"):
        read_network(path)


def test_bgr_networks_get_rgb_pictures(tmp_path: Path) -> None:
    model = scrambled(MobileNetV2(3, 0.35))
    torch.save(model.state_dict(), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", said=Said(channel_order="bgr"))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        logits_agree(tmp_path / "w.safetensors", model(x.flip(1)), x)


def test_a_thousand_and_one_torch_classes_ask_which_is_extra(tmp_path: Path) -> None:
    torch.save(MobileNetV2(1001, 0.35).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="--class_offset 1"):
        convert(tmp_path / "w.pth", tmp_path / "w.safetensors")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", said=Said(class_offset=1))
    assert load_trained(str(tmp_path / "w.safetensors")).model.class_offset == 1


def test_own_files_keep_what_they_know(tmp_path: Path) -> None:
    meta = {
        "alpha": 0.35,
        "resolution": 96,
        "padding": "same",
        "bn_eps": 1e-3,
        "class_names": ["x", "y"],
        "mean": [0.5] * 3,
    }
    model = MobileNetV2(2, 0.35, padding="same", bn_eps=1e-3)
    weights.save_weights(tmp_path / "a.safetensors", model.state_dict(), meta)
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    kept = weights.read_weights(tmp_path / "b.safetensors").meta
    assert {key: kept[key] for key in meta} == meta
    with pytest.raises(UserError, match="pads symmetrically"):
        convert(tmp_path / "a.safetensors", tmp_path / "b.ckpt")


def test_preprocessing_reaches_evaluation(tmp_path: Path) -> None:
    torch.save(MobileNetV2(2, 0.35).state_dict(), tmp_path / "w.pth")
    convert(tmp_path / "w.pth", tmp_path / "w.safetensors", said=Said(preprocessing="tf", resize=96))
    recipe = load_trained(str(tmp_path / "w.safetensors")).recipe
    assert (recipe.mean, recipe.std, recipe.squeeze, recipe.resolution) == ((0.5,) * 3, (0.5,) * 3, True, 96)


def test_paddles_pickle_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "m.pdparams").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(UserError, match="paddle2onnx"):
        convert(tmp_path / "m.pdparams", tmp_path / "w.safetensors")


def test_the_command_line_says_what_it_found_and_what_it_wants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(MobileNetV2(2, 0.35).state_dict(), tmp_path / "w.pth")
    assert cli.main(["convert", str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors")]) == 0
    said = capsys.readouterr()
    assert said.out.strip() == str(tmp_path / "w.safetensors")
    assert "w.pth (torchvision): alpha 0.35" in said.err
    for arguments, expected in (
        ([], "SRC and DST"),
        ([str(tmp_path / "w.pth"), str(tmp_path / "w.npz")], ".safetensors"),
        ([str(tmp_path / "none.pth"), str(tmp_path / "x.safetensors")], "none.pth"),
        ([str(tmp_path / "w.pth"), str(tmp_path / "x.safetensors"), "--padding", "valid"], "--padding"),
        ([str(tmp_path / "w.pth"), str(tmp_path / "x.safetensors"), "--paddin", "same"], "--paddin"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        assert expected in capsys.readouterr().err


def test_files_of_no_known_format_are_refused(tmp_path: Path) -> None:
    for content in (b"", b"hello, this is text", bytes(range(256))):
        (tmp_path / "thing.bin").write_bytes(content)
        with pytest.raises(UserError, match=r"thing\.bin"):
            read_network(tmp_path / "thing.bin")


def test_a_network_without_batchnorm_in_some_stages_is_no_state_dict() -> None:
    buffer = io.BytesIO()
    model = MobileNetV2(2, 0.35)
    state = {key: value for key, value in model.state_dict().items() if "features.3.conv.3" not in key}
    torch.save(state, buffer)
    from mbv2.convert import named
    from mbv2.convert.network import NotThisNetwork

    with pytest.raises(NotThisNetwork, match=r"features\.3\.conv\.3"):
        state_dict(named.torchvision(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)))
    assert "tensorflow" not in sys.modules
