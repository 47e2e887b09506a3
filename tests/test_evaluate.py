"""Evaluation: exact counts, the extra class, bad labels, result files, and real weights on real pictures."""

import ast
import csv
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from mbv2 import cli
from mbv2.data.batch import Batch
from mbv2.distributed import World
from mbv2.errors import UserError
from mbv2.evaluate import evaluate_model
from mbv2.model import MobileNetV2
from mbv2.weights import save_weights

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


class Echo(nn.Module):
    """A network whose logits are its input, with MobileNetV2's rules for the extra class."""

    num_real_classes = MobileNetV2.num_real_classes
    real_logits = MobileNetV2.real_logits
    targets = MobileNetV2.targets

    def __init__(self, num_classes: int, class_offset: int = 0) -> None:
        super().__init__()
        self.num_classes, self.class_offset = num_classes, class_offset

    def forward(self, x: Tensor) -> Tensor:
        return x


class Given:
    """A loader of the batches it is given."""

    def __init__(self, logits: Tensor, labels: Tensor, batch_size: int = 3) -> None:
        self.num_samples, self.skipped = len(labels), 0
        self._batches = list(zip(logits.split(batch_size), labels.split(batch_size), strict=True))

    def __iter__(self) -> Iterator[Batch]:
        for logits, labels in self._batches:
            yield Batch(logits, labels, [""] * len(labels))


def _one_hot(classes: list[int], num_classes: int) -> Tensor:
    return nn.functional.one_hot(torch.tensor(classes), num_classes).float() * 9


def test_accuracies_are_shares_of_the_pictures() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    labels = torch.randint(10, (200,), generator=generator)
    metrics = evaluate_model(Echo(10), Given(logits, labels, 7), World())
    ranks = (logits > logits.gather(1, labels[:, None])).sum(dim=1)
    assert (metrics.right1, metrics.right5, metrics.count) == (int((ranks < 1).sum()), int((ranks < 5).sum()), 200)
    assert metrics.top1 == metrics.right1 / 200
    assert metrics.top5 == metrics.right5 / 200
    assert metrics.loss == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)
    assert metrics.confusion is None


def test_top5_of_fewer_classes_is_all_of_them() -> None:
    metrics = evaluate_model(Echo(3), Given(_one_hot([0, 1, 2, 0], 3), torch.tensor([0, 0, 0, 0])), World())
    assert (metrics.top1, metrics.top5) == (0.5, 1.0)


def test_a_background_class_at_0_takes_no_part() -> None:
    logits = _one_hot([3, 1], 8)
    logits[:, 0] = 100.0
    metrics = evaluate_model(Echo(8, class_offset=1), Given(logits, torch.tensor([2, 0])), World())
    assert metrics.top1 == 1.0


def test_the_unused_last_logit_of_1001_takes_no_part() -> None:
    logits = _one_hot([7, 999], 1001)
    logits[:, 1000] = 100.0
    metrics = evaluate_model(Echo(1001), Given(logits, torch.tensor([7, 999])), World())
    assert metrics.top1 == 1.0


def test_the_confusion_matrix_has_true_classes_in_rows() -> None:
    given = Given(_one_hot([1, 1, 2, 0], 6), torch.tensor([0, 1, 2, 5]))
    metrics = evaluate_model(Echo(6), given, World(), per_class=True)
    assert metrics.confusion is not None and metrics.top5_by_class is not None
    assert sorted(map(tuple, metrics.confusion.nonzero().tolist())) == [(0, 1), (1, 1), (2, 2), (5, 0)]
    assert metrics.confusion.sum() == 4
    assert metrics.top5_by_class.sum() == metrics.right5


def test_logits_that_are_not_finite_are_wrong_and_the_loss_says_so() -> None:
    metrics = evaluate_model(Echo(6), Given(torch.full((4, 6), math.nan), torch.arange(4)), World())
    assert (metrics.top1, metrics.top5) == (0.0, 0.0)
    assert math.isnan(metrics.loss)


@pytest.mark.parametrize("label", [-1, 6, 1000])
def test_a_label_outside_the_classes_is_an_error(label: int) -> None:
    with pytest.raises(UserError, match=r"1 pictures have labels outside the model's 6 classes \(0\.\.5\)"):
        evaluate_model(Echo(6), Given(_one_hot([0, 1], 6), torch.tensor([0, label])), World())


def test_no_picture_is_an_error() -> None:
    with pytest.raises(UserError, match="no picture could be evaluated"):
        evaluate_model(Echo(6), Given(torch.zeros(0, 6), torch.zeros(0, dtype=torch.int64)), World())


def test_the_model_stays_in_its_mode_and_its_statistics_are_not_touched() -> None:
    model = MobileNetV2(4, 0.35).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate_model(model, Given(torch.randn(3, 3, 32, 32), torch.tensor([0, 1, 2])), World())
    assert model.training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small network with seven named classes, at 32 pixels."""
    torch.manual_seed(0)
    model = MobileNetV2(len(NAMES), 0.35)
    nn.init.normal_(model.classifier[1].weight, 0, 1)
    path = tmp_path_factory.mktemp("weights") / "small.safetensors"
    save_weights(path, model.state_dict(), {"alpha": 0.35, "resolution": 32, "class_names": NAMES})
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """23 pictures in val/, a folder per class; the class "eel" has none."""
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for number in range(23):
        name = [name for name in NAMES if name != "eel"][number % 6]
        folder = root / "val" / name
        folder.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (4, 5, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((50, 40), Image.Resampling.BILINEAR).save(folder / f"{number}.png")
    return root


def _eval(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["eval", "--device_target", "CPU", "--num_parallel_workers=0", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_stdout_holds_the_figures_alone(trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _eval(capsys, "--pretrained", trained, "--data_url", pictures)
    assert code == 0
    figures = ast.literal_eval(out)
    assert list(figures) == ["Top_1_Accuracy", "Top_5_Accuracy"]
    assert out == f"{figures}\n"
    assert 0 <= figures["Top_1_Accuracy"] <= figures["Top_5_Accuracy"] <= 1
    assert "right of 23" in err


def test_result_files_agree_with_the_figures(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ("r.json", "c.csv", "c.png")
    options = zip(("--json", "--per_class_csv", "--confusion_png"), (tmp_path / name for name in names), strict=True)
    code, out, err = _eval(
        capsys, "--pretrained", trained, "--data_url", pictures, *(word for pair in options for word in pair)
    )
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert {key: result[key] for key in ("Top_1_Accuracy", "Top_5_Accuracy")} == ast.literal_eval(out)
    assert (result["count"], result["skipped"], result["resize"], result["alpha"]) == (23, 0, 32, 0.35)
    with (tmp_path / "c.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [name for name in NAMES if name != "eel"]
    assert [int(row["class"]) for row in rows] == [0, 1, 2, 3, 5, 6]
    assert sum(int(row["count"]) for row in rows) == 23
    assert sum(int(row["top1_right"]) for row in rows) == result["top1_right"]
    assert sum(int(row["top5_right"]) for row in rows) == result["top5_right"]
    with Image.open(tmp_path / "c.png") as picture:
        assert picture.width > 200


def test_a_variants_yaml_is_read_and_the_command_line_overrides_it(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"alpha: 0.35\nresize: 64\nnum_classes: 1001\nclass_offset: 0\nmax_lr: 0.1\naugment:\n  flip: 0.5\n"
        f"data_url: {pictures}\npretrained: false\nbatch_size: 5\n"
    )
    code, _, err = _eval(capsys, "-c", recipe, "--pretrained", trained, "--resize=48", "--json", tmp_path / "r.json")
    assert code == 0, err
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["resize"], result["num_classes"], result["count"]) == (48, 7, 23)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretraned", "x"], "unrecognized arguments: --pretraned"),
        (["--batch_size", "many"], "--batch_size: expected int"),
        (["--loader", "fast"], "--loader: expected one of"),
        (["--data_url", "nowhere"], "--pretrained is needed"),
        (["--pretrained", "nothing.pth"], "no weights file at nothing.pth"),
        (["-c", "no.yaml"], "-c no.yaml: cannot be read"),
        (["--alpha", "0.75", "--resize", "192", "--pretrained", "True"], "no published torch weights exist"),
        (["--json", "no/such/folder/x.json"], "--json no/such/folder/x.json: no folder"),
    ],
)
def test_bad_options_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _eval(capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err
    assert err.startswith("mbv2: error: ")
    assert err.count("\n") == 1


def test_a_picture_of_a_class_the_weights_do_not_know_is_an_error(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "labels.csv").write_text("file,label\na.png,7\n")
    code, _, err = _eval(capsys, "--pretrained", trained, "--data_url", tmp_path)
    assert code == 2
    assert "label 7" in err
    assert "7 classes (0..6)" in err


def test_a_broken_picture_is_named_or_left_out(
    trained: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "good.png").write_bytes((pictures / "val" / "ant" / "0.png").read_bytes())
    (tmp_path / "ant" / "half.png").write_bytes((pictures / "val" / "ant" / "0.png").read_bytes()[:200])
    arguments = ("--pretrained", trained, "--data_url", tmp_path, "--json", tmp_path / "r.json")
    code, out, err = _eval(capsys, *arguments)
    assert (code, out) == (2, "")
    assert "half.png" in err
    code, _, err = _eval(capsys, *arguments, "--on_corrupt", "skip")
    assert code == 0
    assert "skipped 1 broken" in err
    assert json.loads((tmp_path / "r.json").read_text())["count"] == 1


def _torchrun(*arguments: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "mbv2"]
    command += ["eval", "--device_target", "CPU", *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=280, env={**environment, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_ranks_print_once_what_one_prints(
    trained: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--pretrained", trained, "--data_url", pictures, "--batch_size=4", "--num_parallel_workers=0")
    code, one, _ = _eval(capsys, *arguments)
    assert code == 0
    assert _torchrun(*arguments) == one


# What stock torchvision code gets on these sets; see the figures that come with the data.
REAL = [("ilsvrc_val_227", 1000, 782, 943), ("nips17_ccby_299", 700, 590, 670)]
REAL_WEIGHTS = "mobilenet_v2_torchvision_qnnpack_dequant_unitvar.pth"


def _real(shared_data: Path, name: str) -> tuple[object, ...]:
    weights, pictures = shared_data / "weights" / REAL_WEIGHTS, shared_data / "eval" / name
    if not (weights.is_file() and pictures.is_dir()):
        pytest.skip(f"{weights} or {pictures} is missing")
    return ("--pretrained", weights, "--data_url", pictures)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count", "top1", "top5"), REAL)
@pytest.mark.parametrize(("loader", "within"), [("torch", 3), ("dali", 8)])
def test_real_weights_get_their_known_figures(
    shared_data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    name: str,
    count: int,
    top1: int,
    top5: int,
    loader: str,
    within: int,
) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    path = tmp_path / "r.json"
    code, _, err = _eval(capsys, *_real(shared_data, name), "--loader", loader, "--json", path, "--batch_size=50")
    assert code == 0, err
    result = json.loads(path.read_text())
    assert result["count"] == count
    assert abs(result["top1_right"] - top1) <= within
    assert abs(result["top5_right"] - top5) <= within


@pytest.mark.slow
def test_two_ranks_equal_one_on_real_pictures(shared_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = _real(shared_data, "nips17_ccby_299")
    code, one, err = _eval(capsys, *arguments)
    assert code == 0, err
    assert _torchrun(*arguments, "--num_parallel_workers=0") == one
