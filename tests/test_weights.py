"""Weights files: read, write, fit in, and refuse with a sentence."""

import os
from pathlib import Path

import pytest
import torch
import torchvision

import mbv2
from mbv2 import weights
from mbv2.errors import UserError
from mbv2.model import MobileNetV2


def save_pth(path: Path, model: torch.nn.Module) -> Path:
    torch.save(model.state_dict(), path)
    return path


def test_safetensors_carry_tensors_and_meta_there_and_back(tmp_path: Path) -> None:
    model = MobileNetV2(5, 0.35)
    meta = {"alpha": 0.35, "class_names": ["a", "b", "ç", "d", "e"], "num_classes": 5}
    weights.save_weights(tmp_path / "w.safetensors", model.state_dict(), meta)
    back = weights.read_weights(tmp_path / "w.safetensors")
    assert back.meta == meta
    assert weights.fingerprint(back.state_dict) == weights.fingerprint(model.state_dict())


def test_width_and_classes_are_read_off_the_shapes(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "w.pth", torchvision.models.mobilenet_v2(num_classes=12, width_mult=0.75))
    model, meta = weights.model_from_weights(path)
    assert (model.width_mult, model.num_classes) == (0.75, 12)
    assert meta["alpha"] == 0.75


def test_another_class_count_is_fine_tuned_with_a_fresh_classifier_and_said(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "w.pth", MobileNetV2(10, 0.35))
    model = MobileNetV2(3, 0.35)
    said = weights.load_into(model, weights.read_weights(path), fine_tune=True)
    assert "10 classes was replaced by a fresh one for 3" in said
    with pytest.raises(UserError, match="num_classes"):
        weights.load_into(model, weights.read_weights(path))


def test_another_width_names_the_tensor_and_the_remedy(tmp_path: Path) -> None:
    path = save_pth(tmp_path / "w.pth", MobileNetV2(10, 0.5))
    with pytest.raises(UserError, match=r"features.*--alpha"):
        weights.load_into(MobileNetV2(10, 1.0), weights.read_weights(path))


def test_data_parallel_prefix_is_taken_off(tmp_path: Path) -> None:
    state = {f"module.{key}": value for key, value in MobileNetV2(4, 0.35).state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pth")
    model, _ = weights.model_from_weights(tmp_path / "w.pth")
    assert model.num_classes == 4


class Malice:
    def __reduce__(self) -> tuple:
        return (os.mkdir, ("executed",))


def test_code_in_a_weights_file_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Malice()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="never run"):
        weights.read_weights(tmp_path / "w.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"PK\x03\x04 half a zip"])
def test_files_that_are_no_weights_are_refused_in_one_sentence(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        weights.read_weights(tmp_path / name)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        weights.read_weights(tmp_path / "nowhere.pth")


def test_create_model_loads_a_path(tmp_path: Path) -> None:
    source = MobileNetV2(1000, 0.35)
    path = save_pth(tmp_path / "w.pth", source)
    model = mbv2.create_model("mobilenet_v2_0.35_96", pretrained=path)
    assert weights.fingerprint(model.state_dict()) == weights.fingerprint(source.state_dict())


def test_published_weights_come_from_torch_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    chosen = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V1
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    source = MobileNetV2(1000, 1.0)
    save_pth(cache / chosen.url.rsplit("/", 1)[1], source)
    model = mbv2.create_model("mobilenet_v2_1.0_224", pretrained=True)
    assert weights.fingerprint(model.state_dict()) == weights.fingerprint(source.state_dict())


def test_variants_without_published_weights_say_so() -> None:
    with pytest.raises(UserError, match="no published torch weights exist for mobilenet_v2_0.75_192"):
        mbv2.create_model("mobilenet_v2_0.75_192", pretrained=True)


def test_real_torchvision_weights_load(shared_data: Path) -> None:
    path = shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"
    model, meta = weights.model_from_weights(path)
    assert (meta["alpha"], model.num_classes) == (1.0, 1000)
