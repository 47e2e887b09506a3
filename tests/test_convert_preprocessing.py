"""How pictures are given to timm's and Hugging Face's networks: kept at conversion, honoured by the loaders."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mbv2 import cli, weights
from mbv2.convert import convert
from mbv2.convert.command import Said
from mbv2.data.recipe import Recipe, eval_options
from mbv2.data.torch_loader import eval_picture
from mbv2.errors import UserError
from mbv2.model import MobileNetV2
from mbv2.trained import load_trained

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")


def picture(height: int = 150, width: int = 190) -> Image.Image:
    """Smooth, so that rounding to 8 bits in another order is what differs between libraries."""
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (7 + 3 * c)) * np.cos(y / (9 - 2 * c)) for c in range(3)]
    return Image.fromarray(np.stack(waves, 2).astype(np.uint8))


def ours(recipe: Recipe) -> Tensor:
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (recipe.mean, recipe.std))
    return (eval_picture(pixels, recipe).float() / 255 - mean) / std


def apart(a: Tensor, b: Tensor, recipe: Recipe) -> float:
    """Largest difference in steps of 8 bits."""
    assert a.shape == b.shape
    return float(((a - b) * torch.tensor(recipe.std).view(3, 1, 1) * 255).abs().max())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_timm_folder_gives_timms_pictures(tmp_path: Path, interpolation: str, mode: str) -> None:
    from safetensors.torch import save_file

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    stated = {"input_size": [3, 96, 96], "crop_pct": 0.9, "interpolation": interpolation, "mean": mean, "std": std}
    save_file(timm.create_model("mobilenetv2_035", num_classes=3).state_dict(), tmp_path / "model.safetensors")
    config = {"architecture": "mobilenetv2_035", "pretrained_cfg": stated | {"crop_mode": mode}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    convert(tmp_path, tmp_path / "w.safetensors")
    recipe = load_trained(str(tmp_path / "w.safetensors")).recipe
    transform = timm.data.create_transform(
        (3, 96, 96), mean=mean, std=std, interpolation=interpolation, crop_pct=0.9, crop_mode=mode
    )
    assert apart(ours(recipe), transform(picture()), recipe) < 2.5
    assert (recipe.interpolation, recipe.squeeze, recipe.eval_resize) == (interpolation, mode == "squash", 106)


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"resample": 3, "size": {"shortest_edge": 120}},
        {"do_center_crop": False, "size": {"height": 96, "width": 96}},
        {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0], "image_std": [1.0, 1.0, 1.0]},
        {"do_normalize": False},
    ],
)
def test_a_hugging_face_folder_gives_its_processors_pictures(tmp_path: Path, changed: dict) -> None:
    usual = {"size": {"shortest_edge": 128}, "crop_size": {"height": 96, "width": 96}}
    processor = transformers.MobileNetV2ImageProcessor(**usual | changed)
    config = transformers.MobileNetV2Config(num_labels=3, depth_multiplier=0.35)
    transformers.MobileNetV2ForImageClassification(config).save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    convert(tmp_path / "hf", tmp_path / "w.safetensors")
    recipe = load_trained(str(tmp_path / "w.safetensors")).recipe
    expected = processor(picture(), return_tensors="pt")["pixel_values"][0]
    assert apart(ours(recipe), expected, recipe) < 2.5


def test_what_is_said_outweighs_the_file_and_reaches_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(MobileNetV2(2, 0.35).state_dict(), tmp_path / "w.pth")
    said = Said(interpolation="bicubic", crop_pct=0.95, resize=96)
    notes = convert(tmp_path / "w.pth", tmp_path / "w.safetensors", said=said)
    assert "centre crop of 0.95, bicubic" in notes[1]
    # Our own file keeps what it knows when it is converted again.
    convert(tmp_path / "w.safetensors", tmp_path / "again.safetensors")
    meta = weights.read_weights(tmp_path / "again.safetensors").meta
    assert (meta["interpolation"], meta["crop_pct"]) == ("bicubic", 0.95)
    recipe = load_trained(str(tmp_path / "again.safetensors")).recipe
    assert (recipe.interpolation, recipe.eval_resize) == ("bicubic", 101)
    assert load_trained(str(tmp_path / "again.safetensors"), resize=64).recipe.eval_resize == 67
    bad = ["convert", str(tmp_path / "w.pth"), str(tmp_path / "x.safetensors"), "--crop_pct", "1.5"]
    assert cli.main(bad) == 2
    assert "crop_pct 1.5" in capsys.readouterr().err


def test_usual_metadata_mean_the_usual_crop() -> None:
    assert Recipe(224, **eval_options({}, 224)) == Recipe()
    assert Recipe(224, **eval_options({"crop_pct": 224 / 256}, 224)).eval_resize == 256
    with pytest.raises(UserError, match="interpolation 'area'"):
        Recipe(**eval_options({"interpolation": "area"}, 224))


def test_dali_resizes_bicubic_as_torch_does(tmp_path: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from mbv2.data import Source, make_loader
    from mbv2.data.sources import Sample
    from mbv2.distributed import World

    picture().save(tmp_path / "p.png")
    source = Source([Sample("p.png", 0, str(tmp_path / "p.png"))], ["thing"])
    recipe = Recipe(96, resize=101, interpolation="bicubic")
    found = {}
    for kind in ("torch", "dali"):
        loader = make_loader(kind, source, recipe, False, 1, World(), workers=1 if kind == "dali" else 0)
        found[kind] = next(iter(loader)).images[0].clone()
        loader.close()
    assert apart(found["torch"], found["dali"], recipe) < 2.5
    linear = Recipe(96, resize=101)
    assert apart(found["dali"], ours(linear), recipe) > apart(found["dali"], ours(recipe), recipe)
