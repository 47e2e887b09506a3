"""Weights on disk: reading .pth, .safetensors and training checkpoints, writing .safetensors, fitting them in."""

import hashlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbv2 import pth_file
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.model import PADDINGS, MobileNetV2, make_divisible

# Of tensors that are no float weights but numbers made of them (mbv2/int8_file.py).
INT8_PREFIX = "int8."
_WIDTHS = (0.1, 0.25, 0.35, 0.5, 0.75, 1.0, 1.1, 1.2, 1.3, 1.4)


@dataclass(frozen=True)
class Weights:
    """A state_dict in torchvision's names, and what is known of it.

    `meta` may hold alpha, resolution, num_classes, class_offset, class_names, class_synsets; padding and bn_eps (see
    `MobileNetV2`); mean, std, squeeze, crop_pct and interpolation (see `Recipe` and `eval_options`).
    """

    state_dict: dict[str, Tensor]
    meta: dict[str, Any] = field(default_factory=dict)
    source: str = ""


def read_weights(path: str | Path) -> Weights:
    """Read a `.pth`/`.pt` state_dict, a `.safetensors` file, or one of our training checkpoints.

    Nothing in the file is executed: pickles are read with `weights_only`. A `module.` prefix (DataParallel) is
    taken off; a checkpoint's EMA weights are preferred when it has them.

    Raises:
        UserError: missing, damaged, or not weights at all.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights file at {path}; give the path of a .pth, .safetensors or .ckpt file")
    state, meta = read_tensors(path)
    if "classifier.1.weight" not in state:
        raise UserError(
            f"{path}: no MobileNetV2 in torchvision's parameter names (no classifier.1.weight); "
            f"if another library wrote it, try mbv2 convert {path} {path.stem}.safetensors"
        )
    return Weights(state, meta, str(path))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a `.pth`/`.pt` or `.safetensors` file in whatever names it has, and our `meta` if it has one,
    without int8 numbers (see `mbv2.int8_file`).

    Nothing in the file is executed.

    Raises:
        UserError: damaged, or no dict of tensors.
    """
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    try:
        with warnings.catch_warnings():
            # Of old pickle protocols, which damaged files seem to have.
            warnings.simplefilter("ignore")
            content = _torch_file(path)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(
            f"{path}: not a readable weights file (damaged, or it holds code, which is never run): "
            "give a state_dict saved by torch.save, or a .safetensors file"
        ) from error
    meta: dict[str, Any] = {}
    if isinstance(content, dict) and isinstance(content.get("meta"), dict):
        meta = content["meta"]
    for key in ("ema", "model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict) and content[key]:
            content = content[key]
            break
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, not a state_dict of MobileNetV2")
    state = {
        str(key).removeprefix("module."): value
        for key, value in content.items()
        if isinstance(value, Tensor) and value.layout == torch.strided
    }
    return state, meta


def _torch_file(path: Path) -> Any:
    try:
        return pth_file.read(path)
    except pth_file.Unusual:
        return torch.load(path, map_location="cpu", weights_only=True)


def save_weights(path: str | Path, state_dict: dict[str, Tensor], meta: dict[str, Any]) -> None:
    """Write weights as .safetensors, atomically, with `meta` as JSON under the metadata key "mbv2"."""
    from safetensors.torch import save

    tensors = {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}
    write_atomic(path, save(tensors, metadata={"format": "pt", "mbv2": json.dumps(meta)}))


def published(name: str) -> Weights:
    """torchvision's published weights for a variant, from torch.hub's cache or downloaded into it.

    Raises:
        UserError: there are none for this variant, or the download failed.
    """
    if name != "mobilenet_v2_1.0_224":
        raise UserError(
            f"no published torch weights exist for {name} (only for mobilenet_v2_1.0_224); "
            "give --pretrained the path of a torchvision-named .pth or .safetensors file of this width"
        )
    from torchvision.models import MobileNet_V2_Weights

    chosen = MobileNet_V2_Weights.IMAGENET1K_V1
    try:
        state = chosen.get_state_dict(progress=True, check_hash=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"could not download {chosen.url} ({error}); download it elsewhere and give --pretrained its path"
        ) from error
    meta = {"alpha": 1.0, "resolution": 224, "num_classes": 1000, "class_offset": 0}
    return Weights(state, meta, chosen.url)


def conventions(meta: dict[str, Any]) -> dict[str, Any]:
    """The padding and bn_eps that weights were trained with, as arguments of `MobileNetV2`; torch's where not said.

    Raises:
        UserError: `meta` names a padding or an epsilon that there is not.
    """
    padding, eps = meta.get("padding", "symmetric"), meta.get("bn_eps", 1e-5)
    if padding not in PADDINGS or not isinstance(eps, float) or not 0 < eps < 1:
        raise UserError(
            f"the weights' metadata say padding {padding!r}, bn_eps {eps!r}; there is padding "
            f"{' or '.join(PADDINGS)}, and bn_eps between 0 and 1: write the file anew with mbv2 convert"
        )
    return {"padding": padding, "bn_eps": eps}


def load_into(model: MobileNetV2, weights: Weights, fine_tune: bool = False) -> str:
    """Load `weights` into `model` strictly.

    Args:
        model: the network to fill.
        weights: what to fill it with.
        fine_tune: a classifier of another size is left at its fresh initialisation instead of an error.

    Returns:
        A sentence on what was loaded.

    Raises:
        UserError: missing or unexpected parameters, shapes of another width or class count, or weights trained with
            another padding or BatchNorm epsilon.
    """
    state = dict(weights.state_dict)
    source = weights.source or "weights"
    theirs, ours = state["classifier.1.weight"].shape[0], model.num_classes
    note = ""
    for name, value in conventions(weights.meta).items():
        # What the file does not say cannot contradict.
        if name in weights.meta and value != getattr(model, name):
            raise UserError(
                f"{source}: trained with {name} {value}, but this network has {getattr(model, name)}; "
                f"build it with MobileNetV2({name}={value!r})"
            )
    if theirs != ours and fine_tune:
        del state["classifier.1.weight"], state["classifier.1.bias"]
        note = f"; the classifier for {theirs} classes was replaced by a fresh one for {ours}"
    own = model.state_dict()
    missing = [key for key in own if key not in state and not key.endswith("num_batches_tracked")]
    missing = [key for key in missing if not (note and key.startswith("classifier.1."))]
    unexpected = [key for key in state if key not in own]
    if missing or unexpected:
        raise UserError(
            f"{source}: not this MobileNetV2: {len(missing)} parameters missing ({_first(missing)}), "
            f"{len(unexpected)} unexpected ({_first(unexpected)})"
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise UserError(
                f"{source}: {key} is {list(value.shape)}, this network (alpha {model.width_mult:g}, "
                f"{ours} classes) has {list(own[key].shape)}; give the --alpha and --num_classes it was trained with"
            )
    for key, value in state.items():
        _copy(value, own[key])
    return f"loaded {source}{note}"


def _copy(value: Tensor, into: Tensor) -> None:
    if value.dtype == into.dtype and value.device.type == into.device.type == "cpu" and value.dtype != torch.bfloat16:
        # By numpy, on this thread: waking torch's threads for so little takes longer, on busy cores ten times.
        into.detach().numpy()[...] = value.detach().numpy()
    else:
        into.detach().copy_(value)


def model_from_weights(
    path: str | Path | Weights,
    alpha: float | None = None,
    num_classes: int | None = None,
    class_offset: int | None = None,
) -> tuple[MobileNetV2, dict[str, Any]]:
    """Build the network a weights file was made for, and load it.

    What is not given comes from the file's metadata, else from the shapes of its tensors.

    Raises:
        UserError: the file does not fit what was asked for.
    """
    weights = path if isinstance(path, Weights) else read_weights(path)
    meta = dict(weights.meta)
    if alpha is None:
        alpha = meta.get("alpha") or guess_width(weights)
    if num_classes is None:
        num_classes = weights.state_dict["classifier.1.weight"].shape[0]
    if class_offset is None:
        class_offset = int(meta.get("class_offset", 0))
    model = MobileNetV2(num_classes, alpha, class_offset=class_offset, initialise=False, **conventions(meta))
    load_into(model, weights)
    meta.update(alpha=alpha, num_classes=num_classes, class_offset=class_offset, **conventions(meta))
    return model, meta


def fingerprint(state_dict: dict[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values: equal exactly when two state_dicts are bit-identical."""
    digest = hashlib.sha256()
    for key in sorted(state_dict):
        value = state_dict[key].detach().cpu().contiguous()
        digest.update(f"{key}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [key for key in file.keys() if not key.startswith(INT8_PREFIX)]  # noqa: SIM118
            state = {key: file.get_tensor(key) for key in names}
            text = (file.metadata() or {}).get("mbv2", "{}")
        meta = json.loads(text)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error})") from error
    if not isinstance(meta, dict):
        raise UserError(f"{path}: its mbv2 metadata are no mapping; write it anew with mbv2 convert")
    meta.pop("int8", None)
    return state, meta


def guess_width(weights: Weights) -> float:
    """The published width multiplier whose channel counts these tensors have."""
    state = weights.state_dict
    try:
        found = (state["features.0.0.weight"].shape[0], state["features.17.conv.2.weight"].shape[0])
    except KeyError as error:
        raise UserError(f"{weights.source}: no MobileNetV2 in torchvision's parameter names ({error})") from error
    for width in _WIDTHS:
        if found == (make_divisible(32 * width), make_divisible(320 * width)):
            return width
    raise UserError(f"{weights.source}: unusual width (stem {found[0]}, last block {found[1]}); give --alpha")


def _first(names: list[str]) -> str:
    return names[0] if names else "none"
