"""The loader benchmark: the same pictures or none, and figures from whole epochs."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import __main__ as cli
from bench import loader, schema
from bench.loader import Epoch
from mbv2.data.recipe import Recipe
from mbv2.errors import UserError
from mbv2.shapes import ShapesSpec, draw_shapes

CPU = torch.device("cpu")
RECIPE = Recipe(48)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(draw_shapes(tmp_path_factory.mktemp("drawn") / "data", ShapesSpec(2, 1, 60, 90)))


def test_our_loader_gives_imagefolders_pictures_and_labels(folder: str) -> None:
    expected = loader.image_folder(folder, RECIPE, 5, 0, CPU)
    assert loader.difference(loader.ours("torch", folder, RECIPE, 7, 0, CPU), expected, CPU) < 0.01


def _changed(folder: str, images: float = 0.0, labels: int = 0, drop: int = 0) -> loader.Batches:
    def batches(train: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for x, y in loader.image_folder(folder, RECIPE, 8, 0, CPU)(train):
            yield (x + images)[drop:], (y + labels)[drop:]

    return batches


@pytest.mark.parametrize(
    ("change", "message"),
    [({"images": 0.2}, "pixels differ by 0.200"), ({"labels": 1}, "label 1, not 0"), ({"drop": 8}, "another number")],
)
def test_other_pictures_are_refused(folder: str, change: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        loader.difference(_changed(folder, **change), loader.image_folder(folder, RECIPE, 8, 0, CPU), CPU)


def test_an_epoch_counts_from_the_first_batch_on(folder: str) -> None:
    found = loader.epoch(loader.ours("torch", folder, RECIPE, 5, 0, CPU), CPU)
    # 24 pictures in batches of 5, the ragged tail dropped.
    assert (found.images, found.steady_images) == (20, 15)
    assert found.seconds > 0
    assert found.cpu > 0


def test_rows_have_medians_over_epochs_and_ratios_round_by_round() -> None:
    slow = [Epoch(100, 2.0, 80, cpu) for cpu in (1.0, 2.0, 4.0)]
    fast = [Epoch(100, 1.0, 80, cpu / 2) for cpu in (1.0, 2.0, 4.0)]
    first, second = loader.rows(
        {loader.BASELINE: slow, "mbv2 dali": fast}, {loader.BASELINE: 0, "mbv2 dali": 0}, "cpu", 2
    )
    assert (first["images_per_s"], second["images_per_s"]) == (40, 80)
    assert (first["less_cpu"], second["less_cpu"], second["less_cpu_high"]) == (1, 2, 2)
    assert second["cpu_ms_per_image"] == pytest.approx(10)


def test_the_benchmark_writes_what_it_measured(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "OURS", {"mbv2 torch": "torch", "mbv2 other": "other"})
    argv = ["loader", "--data_url", folder, "--resize", "48", "--batch", "8", "--workers", "0", "--rounds", "2"]
    assert cli.main([*argv, "--device", "cpu", "--out", str(tmp_path / "l")]) == 0
    result = schema.read(tmp_path / "l.json")
    assert [row["loader"] for row in result.rows] == [loader.BASELINE, "mbv2 torch"]
    assert result.settings["pictures"] == 24
    assert "choose auto, dali, torch" in result.left_out["mbv2 other"]
    assert folder not in (tmp_path / "l.json").read_text()


def test_a_loader_with_wrong_pictures_gets_no_time(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "ours", lambda *args: _changed(folder, labels=1))
    argv = ["loader", "--data_url", folder, "--resize", "48", "--batch", "8", "--workers", "0", "--rounds", "2"]
    assert cli.main([*argv, "--device", "cpu"]) == 1
