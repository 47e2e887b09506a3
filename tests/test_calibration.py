"""`--dtype int8 --calibrate`: the int8 network in eval and infer, and one sentence where it cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mbv2
from mbv2 import cli
from mbv2.kernels import cpu_network
from mbv2.weights import save_weights

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


@pytest.mark.parametrize(
    ("more", "environment", "sentence"),
    [
        (["--dtype", "int8"], {}, "give --calibrate a folder"),
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
