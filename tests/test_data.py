"""Choosing and making a loader."""

import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from mbv2.data import Recipe, choose_loader, make_loader, open_source
from mbv2.data.synthetic import SyntheticLoader
from mbv2.data.torch_loader import TorchLoader
from mbv2.distributed import World
from mbv2.errors import UserError

RECIPE = Recipe(resolution=32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six pictures of two classes."""
    for i in range(6):
        path = tmp_path / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (40, 40), (40 * i, 0, 0)).save(path)
    return tmp_path


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["auto", "torch", "dali", "synthetic"])
def test_every_loader_serves_the_same_interface(folder: Path, kind: str, train: bool) -> None:
    if kind == "dali" and importlib.util.find_spec("nvidia.dali") is None:
        pytest.skip("DALI is not installed")
    source = None if kind == "synthetic" else open_source(folder, "train")
    loader = make_loader(kind, source, RECIPE, train, 2, World(), workers=0, num_classes=2, length=6)
    loader.set_epoch(1, start_batch=1)
    batches = list(loader)
    loader.close()
    assert len(loader) == 3
    assert loader.num_samples == 6
    assert loader.skipped == 0
    assert [tuple(batch.images.shape) for batch in batches] == [(2, 3, 32, 32)] * 2
    assert all(batch.labels.dtype == torch.int64 for batch in batches)


def test_auto_is_torch_without_a_gpu_and_says_why(folder: Path) -> None:
    kind, why = choose_loader("auto", torch.device("cpu"))
    assert kind == "torch"
    assert "no GPU" in why
    assert isinstance(make_loader("auto", open_source(folder, "train"), RECIPE, True, 2, World()), TorchLoader)


def test_auto_is_dali_on_a_gpu_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mbv2.data.dali_loader.dali_available", lambda: True)
    assert choose_loader("auto", torch.device("cuda"))[0] == "dali"
    monkeypatch.setattr("mbv2.data.dali_loader.dali_available", lambda: False)
    kind, why = choose_loader("auto", torch.device("cuda"))
    assert kind == "torch"
    assert "pip install" in why
    with pytest.raises(UserError, match="DALI is not installed"):
        choose_loader("dali", torch.device("cuda"))


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"kind": "tf"}, "--loader tf: choose"),
        ({"batch_size": 0}, "--batch_size 0"),
        ({"workers": -1}, "--num_parallel_workers -1"),
        ({"on_corrupt": "ignore"}, "--on_corrupt ignore: choose fail or skip"),
        ({"repeat": 0}, "--repeat_num 0"),
        ({"batch_size": 7}, "6 training pictures do not fill one step of 1 x 7"),
        ({"world": World(0, 0, 4)}, "6 training pictures do not fill one step of 4 x 2"),
        ({"source": None}, "--data_url is needed"),
    ],
)
def test_impossible_options_are_refused(folder: Path, options: dict, why: str) -> None:
    defaults = {"kind": "torch", "source": open_source(folder, "train"), "batch_size": 2, "world": World()}
    with pytest.raises(UserError, match=why):
        make_loader(recipe=RECIPE, train=True, **(defaults | options))


def test_synthetic_needs_no_folder() -> None:
    assert isinstance(make_loader("synthetic", None, RECIPE, True, 2, World()), SyntheticLoader)
