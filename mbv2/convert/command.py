"""`mbv2 convert SRC DST`: weights of any known format into our .safetensors, or into MindSpore's .ckpt."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mbv2 import arguments, weights
from mbv2.convert import mindspore
from mbv2.convert.calibrate import calibrate
from mbv2.convert.detect import FORMATS, read_network
from mbv2.convert.network import NotThisNetwork, state_dict
from mbv2.data.recipe import INTERPOLATIONS, Recipe, eval_options
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.model import PADDINGS, MobileNetV2

# How pictures are given to networks of the two families.
PREPROCESSING: dict[str, dict[str, Any]] = {
    "torch": {"mean": list(Recipe.mean), "std": list(Recipe.std), "squeeze": False},
    "tf": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "squeeze": True},
}


@dataclass(frozen=True)
class Said:
    """What the user says of the weights; None leaves it to the file.

    Attributes:
        padding: "symmetric" or "same".
        bn_eps: BatchNorm's epsilon.
        class_offset: 1 when logit 0 is a background class.
        preprocessing: "torch" or "tf", which sets mean, std and squeeze.
        mean, std: per channel, on values 0..1.
        squeeze: evaluate the whole picture squeezed into the square instead of a centre crop.
        interpolation: evaluate on pictures resized "bilinear" or "bicubic".
        crop_pct: side of evaluation's crop as a share of the resized picture's shorter side.
        resize: side of the network's input in pixels.
        alpha: width multiplier, for a width that is not a published one.
        channel_order: "rgb", or "bgr" for a network that was trained on pictures in that order.
    """

    padding: str | None = None
    bn_eps: float | None = None
    class_offset: int | None = None
    preprocessing: str | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    squeeze: bool | None = None
    interpolation: str | None = None
    crop_pct: float | None = None
    resize: int | None = None
    alpha: float | None = None
    channel_order: str = "rgb"


def convert(
    src: str | Path,
    dst: str | Path,
    format: str = "auto",
    said: Said | None = None,
    naming: str = "mindcv",
    pictures: str = "",
) -> list[str]:
    """Read weights of any format and write them as `.safetensors` (with all that evaluation needs) or `.ckpt`.

    Args:
        src: see `read_network`.
        dst: a `.safetensors` file, or a `.ckpt` file for MindSpore.
        format: of `src`.
        said: what the file cannot say.
        naming: of a MindSpore file to write: "mindcv" or "mindvision".
        pictures: a folder of pictures to measure BatchNorm's statistics on where the format has folded them away.

    Returns:
        Sentences on what was found.

    Raises:
        UserError: unreadable, not a MobileNetV2, or something has to be said; the sentence names the option.
    """
    src, dst = Path(src), Path(dst)
    if dst.suffix not in (".safetensors", ".ckpt"):
        raise UserError(f"{dst}: give a name that ends in .safetensors, or in .ckpt for MindSpore")
    if not dst.absolute().parent.is_dir():
        raise UserError(f"{dst}: no folder {dst.absolute().parent}; make it first")
    if dst.exists() and src.exists() and dst.samefile(src):
        raise UserError(f"{dst}: is the source; give another name")
    found = describe(src, format, said or Said())
    model, meta = weights.model_from_weights(found)
    notes = list(found.meta.pop("notes"))
    folded = meta.pop("folded", False)
    meta.pop("notes", None)
    if folded and pictures:
        notes.append(calibrate(model, meta, pictures))
    elif folded:
        notes.append("BatchNorm is folded in: before fine-tuning, give --calibrate a folder of pictures")
    try:
        save(model, meta, dst, "safetensors" if dst.suffix == ".safetensors" else "mindspore", naming)
    except OSError as error:
        raise UserError(f"{dst}: cannot be written ({error.strerror or error})") from error
    facts = ", ".join(f"{key} {meta[key]}" for key in ("alpha", "resolution", "num_classes", "class_offset", "padding"))
    share = meta.get("crop_pct", 1.0 if meta["squeeze"] else 0.875)
    crop = "whole picture squeezed" if meta["squeeze"] else "picture"
    crop += "" if share == 1 else f", centre crop of {share:g}"
    crop += f", {meta.get('interpolation', 'bilinear')}"
    picture = f"pictures: mean {_rounded(meta['mean'])}, std {_rounded(meta['std'])}, {crop}"
    return [f"{meta['converted_from']}: {facts}, bn_eps {meta['bn_eps']:g}", picture, *notes]


def save(model: MobileNetV2, meta: dict[str, Any], dst: Path, format: str, naming: str = "mindcv") -> None:
    """Write `model` as "safetensors" with its meta, or as "mindspore" in one of its two namings.

    Raises:
        UserError: MindSpore's network could not compute the same.
        OSError: what the file system says.
    """
    if format == "safetensors":
        weights.save_weights(dst, model.state_dict(), meta)
        return
    if model.padding != "symmetric":
        raise UserError(f"{dst}: MindSpore's MobileNetV2 pads symmetrically; these weights are trained with SAME")
    write_atomic(dst, mindspore.write(model.state_dict(), naming))


def describe(src: Path, format: str, said: Said) -> weights.Weights:
    """The weights in our names, with everything known or said of them as meta.

    Raises:
        UserError: see `convert`.
    """
    known: dict[str, Any] = {}
    network, kind = read_network(src, format)
    if kind == "torchvision":
        # Our own files have these names too, and say the rest themselves.
        _, known = weights.read_tensors(src)
    facts = {**network.facts, **known}
    meta = {key: facts[key] for key in ("class_names", "class_synsets", "folded") if key in facts}
    meta["padding"] = said.padding or facts.get("padding") or _ask(src, "how it pads", "--padding same or symmetric")
    meta["bn_eps"] = said.bn_eps or facts.get("bn_eps") or (1e-3 if meta["padding"] == "same" else 1e-5)
    meta |= _pictures(src, facts, said)
    classes = network.classifier.shape[0]
    meta["num_classes"] = classes
    meta["class_offset"] = _class_offset(src, facts, said, classes)
    network.facts["bn_eps"] = meta["bn_eps"]
    try:
        state = state_dict(network)
    except NotThisNetwork as error:
        raise UserError(f"{src}: not a MobileNetV2 that can be converted: {error}") from error
    if said.channel_order == "bgr":
        state["features.0.0.weight"] = state["features.0.0.weight"].flip(1).contiguous()
    meta["converted_from"] = f"{src.name} ({kind})"
    meta["notes"] = list(network.notes)
    found = weights.Weights(state, meta, str(src))
    meta["alpha"] = said.alpha or facts.get("alpha") or weights.guess_width(found)
    return found


def main(argv: Sequence[str]) -> int:
    """`mbv2 convert`.

    Raises:
        UserError: see `convert`.
    """
    about = "Convert weights of any known format into ours (DST.safetensors) or MindSpore's (DST.ckpt)."
    parser = arguments.parser("mbv2 convert", about, FORMATS)
    add = parser.add_argument
    add("src", help="file or folder to read")
    add("dst", help="file to write: .safetensors, or .ckpt for MindSpore")
    add("--format", choices=("auto", *FORMATS), default="auto", help="of SRC (default: found out from its contents)")
    add("--padding", choices=PADDINGS, help="of the 3x3 convolutions (default: from the file)")
    add("--bn_eps", type=float, help="BatchNorm's epsilon (default: from the file)")
    add(
        "--class_offset", type=int, choices=(0, 1), help="1 when logit 0 is a background class (default: from the file)"
    )
    add(
        "--preprocessing",
        choices=tuple(PREPROCESSING),
        help="torch: ImageNet's mean and std; tf: x/127.5-1",
    )
    add("--mean", type=float, nargs=3, help="per channel, on values 0..1")
    add("--std", type=float, nargs=3, help="per channel, on values 0..1")
    add(
        "--squeeze", action=argparse.BooleanOptionalAction, help="evaluate on the whole picture squeezed, not on a crop"
    )
    add(
        "--interpolation", choices=INTERPOLATIONS, help="evaluate on pictures resized this way (default: from the file)"
    )
    add("--crop_pct", type=float, help="evaluation's crop as a share of the shorter side (default: from the file)")
    add("--resize", type=int, help="side of the network's input in pixels (default: from the file, else 224)")
    add("--alpha", type=float, help="width multiplier (default: from the shapes)")
    add("--channel_order", choices=("rgb", "bgr"), default="rgb", help="that SRC expects; DST always expects RGB")
    add("--naming", choices=("mindcv", "mindvision"), default="mindcv", help="of a MindSpore file to write")
    add("--calibrate", default="", metavar="FOLDER", help="pictures to restore folded BatchNorm statistics on")
    options = arguments.parse(parser, argv, "SRC and DST")
    said = Said(**{name: getattr(options, name) for name in Said.__dataclass_fields__})
    for line in convert(options.src, options.dst, options.format, said, options.naming, options.calibrate):
        print(f"convert: {line}", file=sys.stderr)
    print(options.dst)
    return 0


def _pictures(src: Path, facts: dict[str, Any], said: Said) -> dict[str, Any]:
    """mean, std, squeeze and resolution."""
    family = said.preprocessing or facts.get("preprocessing")
    given = {key: getattr(said, key) for key in ("mean", "std", "squeeze")}
    if family is None and any(given[key] is None and key not in facts for key in ("mean", "std")):
        _ask(src, "how pictures are normalised", "--preprocessing torch or tf, or --mean and --std")
    base = PREPROCESSING[family] if family else {"squeeze": False}
    # What is said outweighs the file, and the file outweighs the habits of its family.
    stated = {} if said.preprocessing else {key: facts[key] for key in ("mean", "std", "squeeze") if key in facts}
    found = {**base, **stated, **{key: value for key, value in given.items() if value is not None}}
    resolution = said.resize or int(facts.get("resolution") or 224)
    optional = {key: facts[key] for key in ("interpolation", "crop_pct") if key in facts}
    optional |= {key: getattr(said, key) for key in ("interpolation", "crop_pct") if getattr(said, key) is not None}
    # Raises for what no picture could be given by.
    Recipe(resolution, tuple(found["mean"]), tuple(found["std"]), **eval_options(found | optional, resolution))
    return {
        **optional,
        "mean": [float(value) for value in found["mean"]],
        "std": [float(value) for value in found["std"]],
        "squeeze": bool(found["squeeze"]),
        "resolution": resolution,
    }


def _class_offset(src: Path, facts: dict[str, Any], said: Said, classes: int) -> int:
    if said.class_offset is not None:
        offset = said.class_offset
    elif "class_offset" in facts:
        offset = int(facts["class_offset"])
    elif classes != 1001:
        offset = 0
    elif facts.get("padding") == "same" or facts.get("preprocessing") == "tf":
        offset = 1  # TensorFlow's ImageNet networks have a background class first
    else:
        _ask(src, "which of its 1001 classes is extra", "--class_offset 1 (the first) or 0 (the last)")
    if classes <= offset:
        raise UserError(f"{src}: {classes} class leaves none beside the background class of --class_offset {offset}")
    return offset


def _ask(src: Path, what: str, option: str) -> Any:
    raise UserError(f"{src} does not say {what}; give {option}")


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 4) for value in values]
