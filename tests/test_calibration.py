"""`--dtype int8 --calibrate`: the int8 network in eval and infer, and one sentence where it cannot be."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import mbv2
from mbv2 import cli, int8_file
from mbv2.kernels import cpu_network
from mbv2.optimized import int8_numbers
from mbv2.weights import fingerprint, model_from_weights, read_weights, save_weights

pytestmark = pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}")


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = mbv2.MobileNetV2(3, 0.35)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.normal_(module.running_mean, 0, 0.3)
            torch.nn.init.uniform_(module.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.3)
    torch.nn.init.normal_(model.classifier[1].weight, 0, 1)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, model.state_dict(), {"alpha": 0.35, "resolution": 32})
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three classes under val/."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(12):
        place = root / "val" / f"class{number % 3}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(place / f"{number}.png")
    return root


@pytest.fixture(scope="module")
def with_numbers(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with int8 numbers beside them."""
    model, meta = model_from_weights(weights)
    path = tmp_path_factory.mktemp("weights") / "int8.safetensors"
    int8_file.save(path, model, meta, int8_numbers(model.eval(), torch.randn(2, 3, 32, 32)))
    return path


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main([*map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_infer_in_int8_is_near_float32_and_not_the_same(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["infer", "--device_target", "CPU", "--pretrained", weights, "--data_url", folder, "--topk", "3"]
    code, _, said = run(capsys, *arguments, "--dtype", "int8", "--calibrate", folder, "--json", tmp_path / "int8.json")
    assert code == 0
    assert "one compiled network in int8" in said
    assert run(capsys, *arguments, "--json", tmp_path / "float.json")[0] == 0
    inexact, exact = (
        np.array(
            [
                [p["probability"] for p in sorted(row["predictions"], key=lambda p: p["class"])]
                for row in json.loads((tmp_path / name).read_text())
            ]
        )
        for name in ("int8.json", "float.json")
    )
    assert inexact.shape == exact.shape == (12, 3)
    difference = np.abs(inexact - exact).max()
    assert 0 < difference < 0.1


def test_eval_runs_it_too(weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["eval", "--device_target", "CPU", "--pretrained", weights, "--data_url", folder, "--loader", "torch"]
    code, out, said = run(capsys, *arguments, "--dtype", "int8", "--calibrate", folder, "--json", tmp_path / "e.json")
    assert code == 0
    assert "Top_1_Accuracy" in out
    assert "one compiled network in int8" in said
    assert "int8" in (tmp_path / "e.json").read_text()


def test_numbers_saved_once_give_the_same_bits_as_calibrating_anew(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = tmp_path / "int8.safetensors"
    code, _, said = run(
        capsys, "export", weights, saved, "--format", "int8", "--data_url", folder, "--check", "--min_agreement", "0"
    )
    assert (code, "6 pictures: same class on" in said) == (0, True)
    assert saved.stat().st_size < 1.5 * weights.stat().st_size
    # The export measured on every second picture, in sorted order.
    half = tmp_path / "half"
    half.mkdir()
    for path in sorted(folder.rglob("*.png"))[::2]:
        (half / f"{path.parent.name}-{path.name}").write_bytes(path.read_bytes())
    arguments = ["infer", "--device_target", "CPU", "--data_url", folder, "--dtype", "int8"]
    code, out, said = run(capsys, *arguments, "--pretrained", saved, "--json", tmp_path / "saved.json")
    assert code == 0
    assert f"ranges from {saved}" in said
    code, fresh, _ = run(
        capsys, *arguments, "--pretrained", weights, "--calibrate", half, "--json", tmp_path / "fresh.json"
    )
    assert (code, out) == (0, fresh)
    assert (tmp_path / "saved.json").read_text() == (tmp_path / "fresh.json").read_text()


def test_a_file_with_numbers_serves_as_float_weights_and_loses_them_when_written_again(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, again = tmp_path / "int8.safetensors", tmp_path / "again.safetensors"
    assert run(capsys, "export", weights, saved, "--format", "int8", "--data_url", folder)[0] == 0
    assert run(capsys, "export", saved, again)[0] == 0
    states = [read_weights(path) for path in (weights, saved, again)]
    assert len({fingerprint(found.state_dict) for found in states}) == 1
    assert "int8" not in states[1].meta
    assert int8_file.has_numbers(saved) and not int8_file.has_numbers(again)


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda tensors, meta: tensors.pop("int8.3.weight"), "int8.3.weight is missing"),
        (lambda tensors, meta: tensors.update({"int8.99.weight": torch.zeros(1)}), "int8.99.weight is unknown"),
        (lambda tensors, meta: tensors.update({"int8.2.weight": torch.zeros(3, 3)}), "int8.2.weight is torch.float32"),
        (lambda tensors, meta: tensors["int8.0.weight"].fill_(float("nan")), "do not hold"),
        (lambda tensors, meta: tensors["int8.1.weight"].fill_(-32768), "do not hold"),
        (lambda tensors, meta: tensors["int8.2.weight"].fill_(1), "not those that were written"),
        (lambda tensors, meta: tensors["classifier.1.bias"].add_(1), "from other weights"),
        (lambda tensors, meta: meta.pop("int8"), "from other weights"),
        (lambda tensors, meta: [tensors.pop(name) for name in [*tensors] if name.startswith("int8.")], "no int8"),
    ],
)
def test_damaged_or_foreign_numbers_are_told_in_a_sentence(
    damage: Callable[[dict[str, torch.Tensor], dict[str, Any]], object],
    sentence: str,
    with_numbers: Path,
    tmp_path: Path,
) -> None:
    with safe_open(with_numbers, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(file.metadata()["mbv2"])
    damage(tensors, meta)
    save_weights(tmp_path / "damaged.safetensors", tensors, meta)
    model, _ = model_from_weights(tmp_path / "damaged.safetensors")
    with pytest.raises(mbv2.UserError, match=sentence):
        mbv2.optimize_for_inference(model.eval(), torch.int8, tmp_path / "damaged.safetensors")


@pytest.mark.parametrize(
    ("more", "environment", "sentence"),
    [
        (["--dtype", "int8"], {}, "give --calibrate a folder"),
        (["--dtype", "int8"], {}, "a file that mbv2 export --format int8 wrote"),
        (["--calibrate", "."], {}, "give both or neither"),
        (["--dtype", "int8", "--calibrate", "nowhere"], {}, "no picture or folder at 'nowhere'; give --calibrate"),
        (["--dtype", "int8", "--calibrate", "."], {"MBV2_BACKEND": "aten"}, "unset MBV2_BACKEND"),
        (["--dtype", "int8", "--calibrate", "."], {"MBV2_CPU_ISA": "mmx"}, "MBV2_CPU_ISA=mmx"),
    ],
)
def test_misuse_is_told_in_a_sentence(
    more: list[str],
    environment: dict[str, str],
    sentence: str,
    weights: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, _, said = run(capsys, "infer", "--pretrained", weights, "--data_url", folder, *more)
    assert code == 2
    assert sentence in said.splitlines()[-1]


def test_pictures_that_cannot_be_decoded_do_not_calibrate(
    weights: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    arguments = ["infer", "--pretrained", weights, "--data_url", folder, "--dtype", "int8", "--calibrate", tmp_path]
    code, _, said = run(capsys, *arguments)
    assert code == 2
    assert "none of the pictures can be decoded" in said.splitlines()[-1]
