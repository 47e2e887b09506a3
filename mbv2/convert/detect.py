"""What a file is, by what is in it, and the network it holds."""

import json
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from mbv2 import weights
from mbv2.convert import configuration, keras, mindspore, named, onnx, tensorflow, tflite
from mbv2.convert.network import Malformed, Network, NotThisNetwork
from mbv2.errors import UserError

FORMATS = {
    "torchvision": "torchvision's names, .pth or .safetensors",
    "timm": "timm's names, .pth or .safetensors",
    "huggingface": "a Hugging Face folder, or its model.safetensors beside config.json",
    "tensorflow": "a TF-slim or Keras checkpoint (.index), or a SavedModel folder",
    "frozen": "a frozen TensorFlow graph (.pb)",
    "keras": "Keras .h5 or .keras",
    "tflite": "TensorFlow Lite, float or quantised",
    "onnx": "ONNX, float or QDQ",
    "mindspore": "MindSpore .ckpt, mindcv's or mindvision's names",
}
_HDF5 = b"\x89HDF\r\n\x1a\n"
_MAX_JSON = 1 << 24


def read_network(path: str | Path, format: str = "auto") -> tuple[Network, str]:
    """Read a MobileNetV2 from a file or folder of any known format. Nothing in it is executed.

    Args:
        path: the file; for a TensorFlow checkpoint also its name without `.index`; a folder for Hugging Face and
            SavedModel.
        format: one of `FORMATS`, or "auto" to find out from the contents.

    Returns:
        The network, and the name of its format.

    Raises:
        UserError: missing, damaged, of no known format, or not a MobileNetV2.
    """
    path = Path(path)
    if not path.exists() and path.with_name(f"{path.name}.index").is_file():
        path = path.with_name(f"{path.name}.index")
    if not path.exists():
        raise UserError(f"nothing at {path}; give a weights file or folder")
    try:
        kind = detect(path) if format == "auto" else format
        return _read(path, kind), kind
    except Malformed as error:
        raise UserError(f"{path}: damaged, or not of the format it looks like ({error})") from error
    except NotThisNetwork as error:
        raise UserError(f"{path}: not a MobileNetV2 that can be converted: {error}") from error
    except (OSError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def detect(path: Path) -> str:
    """The format's name in `FORMATS`.

    Raises:
        UserError: none of them.
    """
    if path.is_dir():
        if (path / "variables" / "variables.index").is_file():
            return "tensorflow"
        if (path / "config.json").is_file():
            # timm's folders on the Hub have its own configuration under the same name.
            return "timm" if "pretrained_cfg" in (_json(path / "config.json") or {}) else "huggingface"
        raise UserError(f"{path}: neither a Hugging Face folder (config.json) nor a SavedModel (variables/)")
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(_HDF5):
        return "keras"
    if head[4:8] == b"TFL3":
        return "tflite"
    if head.startswith(b"PK\x03\x04"):
        with zipfile.ZipFile(path) as archive:
            if keras.is_archive(archive):
                return "keras"
        return _by_names(path)
    if _is_safetensors(path, head):
        return _by_names(path)
    if head.startswith(b"\x80"):
        if path.suffix == ".pdparams":
            raise UserError(
                f"{path}: PaddlePaddle's .pdparams is a pickle, which could run code and is not opened; in Paddle, "
                "export it with paddle2onnx and convert the .onnx file"
            )
        return _by_names(path)
    data = memoryview(path.read_bytes())
    if tensorflow.is_index(data):
        return "tensorflow"
    if onnx.looks_like(data):
        return "onnx"
    if mindspore.looks_like(data):
        return "mindspore"
    if tensorflow.looks_like_graph(data):
        return "frozen"
    raise UserError(f"{path}: no known format; --format names one of {', '.join(FORMATS)}")


def _read(path: Path, kind: str) -> Network:
    if kind in ("torchvision", "timm", "huggingface"):
        return _read_named(path, kind)
    if kind == "tensorflow":
        index = path / "variables" / "variables.index" if path.is_dir() else path
        return tensorflow.read_variables(tensorflow.read_bundle(index))
    if path.is_dir():
        raise UserError(f"{path}: is a folder; --format {kind} reads a file")
    if kind == "keras":
        return keras.read_archive(path) if zipfile.is_zipfile(path) else keras.read_h5(path)
    data = memoryview(path.read_bytes())
    if kind == "mindspore":
        return mindspore.read(mindspore.read_tensors(data))
    if kind == "frozen":
        return tensorflow.read_graph(data)
    if kind == "tflite":
        return tflite.read(data)
    return onnx.read(data, path.parent)


def _read_named(path: Path, kind: str) -> Network:
    if kind == "torchvision":
        return named.torchvision(_tensors(path)[0])
    folder, file = (path, _weights_in(path)) if path.is_dir() else (path.parent, path)
    tensors, _ = _tensors(file)
    config = _json(folder / "config.json")
    if kind == "timm":
        return named.timm(tensors, _said(configuration.of_timm, config or {}))
    if config is not None and config.get("model_type", "mobilenet_v2") != "mobilenet_v2":
        raise NotThisNetwork(f"config.json says {str(config['model_type'])[:40]!r}")
    pictures = _json(folder / "preprocessor_config.json") or {}
    return named.hugging_face(tensors, _said(configuration.of_hugging_face, config, pictures))


def _said(read: Callable[..., dict[str, Any]], *configs: dict[str, Any] | None) -> dict[str, Any]:
    """What `read` makes of JSON, in which anything may stand where a number or a list belongs."""
    try:
        return read(*configs)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise Malformed(f"its JSON: {type(error).__name__}: {str(error)[:120]}") from error


def _weights_in(folder: Path) -> Path:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{folder}: no model.safetensors and no pytorch_model.bin in it")


def _by_names(path: Path) -> str:
    """Whose names the tensors of a torch or safetensors file have."""
    tensors, _ = _tensors(path)
    for key, kind in (
        ("features.0.0.weight", "torchvision"),
        ("conv_stem.weight", "timm"),
        ("mobilenet_v2.conv_stem.first_conv.convolution.weight", "huggingface"),
    ):
        if key in tensors:
            return kind
    raise UserError(
        f"{path}: its {len(tensors)} tensors are named neither as torchvision's MobileNetV2, nor timm's, nor "
        f"Hugging Face's (the first: {next(iter(tensors), 'none')[:80]})"
    )


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        return weights.read_tensors(path)
    except (pickle.PickleError, AttributeError, EOFError, struct.error, UnicodeDecodeError) as error:
        raise Malformed(str(error)[:120]) from error


def _is_safetensors(path: Path, head: bytes) -> bool:
    if len(head) < 9:
        return False
    return head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] + 8 <= path.stat().st_size


def _json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    if path.stat().st_size > _MAX_JSON:
        raise Malformed(f"{path.name} is {path.stat().st_size} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise Malformed(f"{path.name}: {str(error)[:120]}") from error
    if not isinstance(content, dict):
        raise Malformed(f"{path.name} is no mapping")
    return content
