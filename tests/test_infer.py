"""Inference: the lines, the files, the names, and an input folder that stays as it was."""

import ast
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mbv2 import cli
from mbv2.data.decode import decode
from mbv2.data.recipe import Recipe
from mbv2.data.torch_loader import eval_picture
from mbv2.model import MobileNetV2
from mbv2.weights import model_from_weights, save_weights

NAMES = ["ant", "bee", "cat, domestic", "dog"]


def _weights(path: Path, num_classes: int, **meta: object) -> Path:
    torch.manual_seed(0)
    model = MobileNetV2(num_classes, 0.35)
    nn.init.normal_(model.classifier[1].weight, 0, 1)
    save_weights(path, model.state_dict(), {"alpha": 0.35, "resolution": 32, **meta})
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _weights(tmp_path_factory.mktemp("weights") / "small.safetensors", 4, class_names=NAMES)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Six pictures in a folder and one in a folder inside, sizes and formats mixed, and a text file."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for number, name in enumerate(["b.png", "a.jpg", "c.gif", "d.bmp", "e.webp", "f.png", "more/a.jpg"]):
        pixels = random.integers(0, 256, (20 + number * 9, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    return folder


def _infer(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["infer", "--device_target", "CPU", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _bytes_of(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_one_picture_gives_one_line_with_its_class(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = pictures / "b.png"
    code, out, err = _infer(capsys, "--data_url", picture, "--pretrained", trained)
    model, _ = model_from_weights(trained)
    image = eval_picture(decode(picture.read_bytes(), "b"), Recipe(32)).float() / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (Recipe.mean, Recipe.std))
    with torch.no_grad():
        label = int(model.eval()(((image - mean) / std)[None]).argmax())
    assert code == 0, err
    assert out == f"{ {label: NAMES[label]} }\n"


def test_a_folder_is_gone_through_in_sorted_order(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "r.json"
    code, out, err = _infer(capsys, "--data_url", pictures, "--pretrained", trained, "--json", report, "--batch_size=2")
    assert code == 0, err
    files = json.loads(report.read_text())
    names = ["a.jpg", "b.png", "c.gif", "d.bmp", "e.webp", "f.png", "more/a.jpg"]
    assert [entry["file"] for entry in files] == names
    lines = [ast.literal_eval(line) for line in out.splitlines()]
    assert lines == [{entry["predictions"][0]["class"]: entry["predictions"][0]["name"]} for entry in files]
    assert [line.rstrip(":") for line in err.splitlines() if line.endswith(":")] == names


def test_topk_names_that_many_classes_best_first(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "r.csv"
    code, out, err = _infer(
        capsys, "--data_url", pictures / "b.png", "--pretrained", trained, "--topk=3", "--csv", table
    )
    assert code == 0, err
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["rank"] for row in rows] == ["1", "2", "3"]
    assert {row["file"] for row in rows} == {"b.png"}
    chances = [float(row["probability"]) for row in rows]
    assert chances == sorted(chances, reverse=True)
    assert sum(chances) <= 1.00001
    assert ast.literal_eval(out) == {int(row["class"]): row["name"] for row in rows}


def test_topk_beyond_the_classes_names_them_all(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = _infer(capsys, "--data_url", pictures / "b.png", "--pretrained", trained, "--topk=50")
    assert code == 0
    assert ast.literal_eval(out) == dict(enumerate(NAMES))


def test_weights_without_names_say_class_n(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = _weights(tmp_path / "plain.safetensors", 3)
    code, out, _ = _infer(capsys, "--data_url", pictures / "b.png", "--pretrained", weights, "--topk=3")
    assert code == 0
    assert ast.literal_eval(out) == {0: "class 0", 1: "class 1", 2: "class 2"}


def test_the_extra_class_is_never_named(pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = _weights(tmp_path / "seed.safetensors", 1001)
    code, out, _ = _infer(capsys, "--data_url", pictures / "b.png", "--pretrained", weights, "--topk=2000")
    assert code == 0
    named = ast.literal_eval(out)
    assert sorted(named) == list(range(1000))
    assert named[283] == "Persian cat"


def test_annotated_copies_leave_the_input_and_older_copies_as_they_were(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out" / "deep"
    before = _bytes_of(pictures)
    arguments = ("--data_url", pictures, "--pretrained", trained, "--output", output)
    assert _infer(capsys, *arguments)[0] == 0
    assert _bytes_of(pictures) == before
    first = _bytes_of(output)
    names = {path.name for path in output.iterdir()}
    assert names == {"a.jpg", "b.png", "c.jpg", "d.jpg", "e.jpg", "f.png", "more_a.jpg"}
    with Image.open(output / "b.png") as copy, Image.open(pictures / "b.png") as original:
        assert copy.height > original.height
    assert _infer(capsys, *arguments)[0] == 0
    second = _bytes_of(output)
    assert len(second) == 2 * len(first)
    assert {name: second[name] for name in first} == first


@pytest.mark.parametrize("output", ["in", "in/annotated", "in/../in"])
def test_output_into_the_input_folder_is_refused(
    trained: Path, pictures: Path, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _bytes_of(pictures)
    output_folder = pictures.parent / output
    code, out, err = _infer(capsys, "--data_url", pictures, "--pretrained", trained, "--output", output_folder)
    assert (code, out) == (2, "")
    assert "input folder" in err
    assert _bytes_of(pictures) == before
    assert not (pictures / "annotated").exists()


def test_output_beside_a_single_picture_is_refused(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--data_url", pictures / "b.png", "--pretrained", trained, "--output", pictures)
    assert _infer(capsys, *arguments)[0] == 2


def test_a_broken_picture_is_named_and_stops_or_is_passed_over(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "c.gif").write_bytes(b"")
    code, _, err = _infer(capsys, "--data_url", pictures, "--pretrained", trained)
    assert code == 2
    assert "c.gif: the file is empty" in err
    code, out, err = _infer(capsys, "--data_url", pictures, "--pretrained", trained, "--on_corrupt=skip")
    assert code == 0
    assert out.count("\n") == 6
    assert "skipped 1 broken pictures: c.gif" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data_url", "gone"], "no picture or folder at 'gone'"),
        ([], "no picture or folder at ''"),
        (["--topk", "0"], "--topk 0: must be at least 1"),
        (["--json", "."], "--json .: is a folder"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _infer(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("mbv2: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_folder_without_pictures_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("nothing to see")
    code, _, err = _infer(capsys, "--data_url", tmp_path, "--pretrained", trained)
    assert code == 2
    assert "holds no picture" in err


def test_real_weights_know_a_real_picture(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = shared_data / "weights" / "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"
    picture = shared_data / "eval" / "ilsvrc_val_227" / "images" / "ILSVRC2012_val_00000347.JPEG"
    if not (weights.is_file() and picture.is_file()):
        pytest.skip(f"{weights} or {picture} is missing")
    code, out, err = _infer(capsys, "--data_url", picture, "--pretrained", weights)
    assert code == 0, err
    assert out == "{472: 'canoe'}\n"
