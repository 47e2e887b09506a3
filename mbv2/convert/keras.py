"""Keras files: `.h5` (by layer names), and `.keras` and `.weights.h5` of Keras 3 (by kind and order of layer)."""

import io
import json
import re
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mbv2.convert import named
from mbv2.convert.network import Malformed, Network, NotThisNetwork
from mbv2.errors import UserError

_MAX_BYTES = 1 << 30
_COUNTED = re.compile(r"(?:_layer_checkpoint_dependencies|layers)/([a-z0-9_]+?)(?:_(\d+))?/vars/(\d+)")


def is_archive(archive: zipfile.ZipFile) -> bool:
    """Whether a zip is a Keras 3 model."""
    return "model.weights.h5" in archive.namelist()


def read_archive(path: Path) -> Network:
    """The network in a `.keras` file.

    Raises:
        Malformed, NotThisNetwork: see `read_h5`; also a zip that grows beyond 1 GiB.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            sizes = {
                name: archive.getinfo(name).file_size for name in ("model.weights.h5", "config.json") if name in names
            }
            if max(sizes.values(), default=0) > _MAX_BYTES or "model.weights.h5" not in sizes:
                raise Malformed(f"model.weights.h5 is missing or too large ({sizes})")
            weights, config = (
                archive.read(name) if name in sizes else b"" for name in ("model.weights.h5", "config.json")
            )
    except (zlib.error, EOFError, RuntimeError, ValueError) as error:
        # RuntimeError: encrypted, or packed in a way that zipfile does not know.
        raise Malformed(f"zip: {str(error)[:120]}") from error
    return read_h5(io.BytesIO(weights), config)


def read_h5(file: Path | BinaryIO, config: bytes = b"") -> Network:
    """The network in an HDF5 file that Keras wrote; `config` is the model's JSON where another file has it.

    Raises:
        UserError: h5py is not installed.
        Malformed: not HDF5, or it refers to other files, or claims more than 1 GiB.
        NotThisNetwork: the layers are another network's.
    """
    try:
        import h5py
    except ImportError as error:
        raise UserError("Keras files are read with h5py: pip install h5py") from error

    tensors: dict[str, Tensor] = {}
    total = 0

    def take(name: str, item: Any) -> None:
        nonlocal total
        if not isinstance(item, h5py.Dataset) or item.dtype.kind != "f":
            return
        if item.external or item.is_virtual:
            raise Malformed(f"{name[:80]} lies in another file")
        total += int(item.size) * item.dtype.itemsize
        if total > _MAX_BYTES:
            raise Malformed(f"it claims more than {_MAX_BYTES >> 30} GiB, at {name[:80]}")
        tensors[name] = torch.from_numpy(item[()].astype("float32")) if item.shape else torch.tensor(float(item[()]))

    try:
        with h5py.File(file, "r") as h5:
            own = h5.attrs.get("model_config", b"")
            h5.visititems(take)
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise Malformed(f"HDF5: {str(error).splitlines()[0][:120] if str(error) else 'unreadable'}") from error
    config = config or (own.encode() if isinstance(own, str) else bytes(own))
    network = _network(tensors, _epsilon(config))
    network.facts.update(_resolution(config))
    return network


def _network(tensors: dict[str, Tensor], eps: float | None) -> Network:
    kinds: dict[str, dict[int, dict[int, Tensor]]] = {}
    for name, value in tensors.items():
        match = _COUNTED.fullmatch(name)
        if match:
            kinds.setdefault(match[1], {}).setdefault(int(match[2] or 0), {})[int(match[3])] = value
    if kinds:
        return _by_kind(kinds, eps)
    # model_weights/<layer>/<...>/<layer>/<variable>:0
    flat = {}
    for name, value in tensors.items():
        parts = name.removesuffix(":0").split("/")
        if len(parts) > 1 and "optimizer_weights" not in parts:
            flat["/".join(parts[-2:])] = value
    return named.keras(flat, eps)


def _by_kind(kinds: dict[str, dict[int, dict[int, Tensor]]], eps: float | None) -> Network:
    def in_order(kind: str) -> list[list[Tensor]]:
        layers = kinds.get(kind, {})
        return [[layers[number][var] for var in sorted(layers[number])] for number in sorted(layers)]

    tops = in_order("dense")
    if len(tops) != 1:
        raise NotThisNetwork(f"{len(tops)} dense layers; save the model with its top")
    kernels = [layer[0] for layer in in_order("conv2d")]
    depthwise = [layer[0] for layer in in_order("depthwise_conv2d")]
    network = named.in_running_order(kernels, depthwise, in_order("batch_normalization"), tops[0])
    network.facts["bn_eps"] = eps or 1e-3
    return network


def _epsilon(config: bytes) -> float | None:
    """The epsilon of the BatchNorm layers in a model's JSON, if it says one."""
    found = {settings.get("epsilon") for kind, settings in _layers(config) if kind == "BatchNormalization"}
    eps = found.pop() if len(found) == 1 else None
    return eps if isinstance(eps, float) else None


def _resolution(config: bytes) -> dict[str, int]:
    """The resolution in a model's JSON, if it says one: Keras 3 has `batch_shape`, Keras 2 `batch_input_shape`."""
    for kind, settings in _layers(config):
        shape = settings.get("batch_shape", settings.get("batch_input_shape")) if kind == "InputLayer" else None
        if isinstance(shape, list) and len(shape) == 4 and isinstance(shape[1], int) and shape[1] == shape[2] >= 32:
            return {"resolution": shape[1]}
    return {}


def _layers(config: bytes) -> list[tuple[str, dict[str, Any]]]:
    """(class, settings) of each layer in a model's JSON; nothing where it is no such JSON."""
    try:
        content = json.loads(config)["config"]["layers"]
        return [(str(layer["class_name"]), dict(layer["config"])) for layer in content]
    except (ValueError, KeyError, TypeError):
        return []
