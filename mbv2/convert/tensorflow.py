"""TensorFlow's own files: checkpoints (`.index` with `.data-00000-of-00001`), SavedModel folders, frozen `.pb` graphs.

An index is a LevelDB table (footer, index block, data blocks with shared prefixes) of protobuf entries; the
compression that TensorFlow never uses for it is refused. tensorflow/core/util/tensor_bundle has the format.
"""

import re
import struct
from collections.abc import Iterator
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from mbv2.convert import named, wire
from mbv2.convert.network import Malformed, Network, NotThisNetwork

_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_DTYPES = {1: torch.float32, 2: torch.float64, 3: torch.int32, 9: torch.int64, 14: torch.bfloat16, 19: torch.float16}
_STRING, _OBJECT_GRAPH = 7, b"_CHECKPOINTABLE_OBJECT_GRAPH"
_KERAS = re.compile(r"(?:model/)?layer_with_weights-(\d+)/([a-z_]+)/\.ATTRIBUTES/VARIABLE_VALUE")


def is_index(data: memoryview) -> bool:
    """Whether the file ends as a LevelDB table does."""
    return len(data) >= _FOOTER and struct.unpack("<Q", data[-8:])[0] == _MAGIC


def looks_like_graph(data: memoryview) -> bool:
    """Whether the first field is a NodeDef: a name, then an operator's name."""
    try:
        first = next(wire.fields(data))
        parts = list(wire.fields(first.bytes()))
        return first.number == 1 and [part.number for part in parts[:2]] == [1, 2] and parts[1].text().isalnum()
    except (Malformed, StopIteration):
        return False


def read_bundle(index: Path) -> dict[str, Tensor]:
    """The numeric variables of a checkpoint: by key, and by layer and variable (`Conv1/kernel`) where it says them.

    TensorFlow 2 files its variables under their place in the model's object tree, which differs between versions and
    ways of saving (`layer_with_weights-0/kernel`, `variables/0`, `_operations/1/_kernel`); an entry beside them, a
    TrackableObjectGraph, has the names that the layers gave them.

    Raises:
        Malformed: the index breaks the format, or a data file is missing or too short.
    """
    data = memoryview(index.read_bytes())
    shards, tensors, names = 0, {}, {}
    for key, value in _table(data):
        if key == b"":
            shards = next((field.number_of() for field in wire.fields(value) if field.number == 1), 1)
            continue
        name = key.decode("utf-8", "replace")
        dtype, shape, *place = _entry(value)
        if dtype in _DTYPES:
            tensors[name] = wire.tensor(_read_shard(index, shards, name, *place), shape, _DTYPES[dtype], name[:80])
        elif dtype == _STRING and key == _OBJECT_GRAPH:
            names = _layer_names(_read_shard(index, shards, name, *place))
    return tensors | {names[key]: value for key, value in tensors.items() if key in names}


def read_variables(tensors: dict[str, Tensor]) -> Network:
    """The network of a TF-slim checkpoint, or of a Keras model saved as a SavedModel or checkpoint.

    Raises:
        NotThisNetwork: the variables are another network's.
    """
    if "bn_Conv1/gamma" in tensors:
        return named.keras({name: value for name, value in tensors.items() if not name.endswith("VARIABLE_VALUE")})
    layers: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        match = _KERAS.fullmatch(name)
        if match and len(match[1]) < 6:
            layers.setdefault(int(match[1]), {})[match[2]] = value
    if layers:
        return _keras_layers([layers[number] for number in sorted(layers)])
    return named.tf_slim(_below_root(tensors))


def read_graph(data: memoryview) -> Network:
    """The network of a frozen graph (GraphDef) with TF-slim's names.

    Raises:
        Malformed: the file breaks the format.
        NotThisNetwork: the constants are another network's, or have been folded.
    """
    constants: dict[str, Tensor] = {}
    eps: set[float] = set()
    for field in wire.fields(data):
        if field.number != 1:
            continue
        name = op = ""
        attributes = {}
        for part in wire.fields(field.bytes()):
            if part.number == 1:
                name = part.text()
            elif part.number == 2:
                op = part.text()
            elif part.number == 5:
                pair = {item.number: item for item in wire.fields(part.bytes())}
                if 1 in pair and 2 in pair:
                    attributes[pair[1].text()] = pair[2].bytes()
        if op == "Const" and "value" in attributes:
            for item in wire.fields(attributes["value"]):
                value = _tensor_proto(item.bytes(), name) if item.number == 8 else None
                if value is not None:
                    constants[name] = value
        elif op.startswith("FusedBatchNorm") and "epsilon" in attributes:
            eps.update(item.float32() for item in wire.fields(attributes["epsilon"]) if item.number == 4)
    network = named.tf_slim(_below_root(constants))
    if len(eps) == 1:
        network.facts["bn_eps"] = round(eps.pop(), 9)
    return network


def _below_root(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names from `MobilenetV2/` on: modules of TF-Hub put something before it."""
    root = "MobilenetV2/"
    return {name[name.index(root) :]: value for name, value in tensors.items() if root in name}


def _keras_layers(layers: list[dict[str, Tensor]]) -> Network:
    norms = [
        [layer[name] for name in ("gamma", "beta", "moving_mean", "moving_variance") if name in layer]
        for layer in layers
        if "gamma" in layer
    ]
    tops = [layer for layer in layers if "bias" in layer]
    if len(tops) != 1 or "kernel" not in tops[0]:
        raise NotThisNetwork(f"{len(tops)} layers that could be the classifier")
    kernels = [layer["kernel"] for layer in layers if "kernel" in layer and layer is not tops[0]]
    depthwise = [layer["depthwise_kernel"] for layer in layers if "depthwise_kernel" in layer]
    return named.in_running_order(kernels, depthwise, norms, [tops[0]["kernel"], tops[0]["bias"]])


def _table(data: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    if not is_index(data):
        raise Malformed("no LevelDB table (wrong last bytes)")
    footer = data[-_FOOTER:]
    _, at = wire.varint(footer, 0)
    _, at = wire.varint(footer, at)
    offset, at = wire.varint(footer, at)
    size, at = wire.varint(footer, at)
    for _, handle in _block(data, offset, size):
        start, place = wire.varint(handle, 0)
        length, _ = wire.varint(handle, place)
        yield from _block(data, start, length)


def _block(data: memoryview, offset: int, size: int) -> Iterator[tuple[bytes, memoryview]]:
    if offset + size + 5 > len(data) or size < 4:
        raise Malformed(f"a block of {size} bytes at byte {offset} runs over the end")
    if data[offset + size] != 0:
        raise Malformed("a compressed block, which TensorFlow does not write")
    block = data[offset : offset + size]
    restarts = struct.unpack("<I", block[-4:])[0]
    end = size - 4 - 4 * restarts
    if end < 0:
        raise Malformed(f"{restarts} restarts in a block of {size} bytes")
    at, key = 0, b""
    while at < end:
        shared, at = wire.varint(block, at)
        own, at = wire.varint(block, at)
        length, at = wire.varint(block, at)
        if shared > len(key) or at + own + length > end:
            raise Malformed(f"a key at byte {offset + at} runs over its block")
        key = key[:shared] + bytes(block[at : at + own])
        yield key, block[at + own : at + own + length]
        at += own + length


def _layer_names(data: memoryview) -> dict[str, str]:
    """Checkpoint key -> layer and variable, by a TrackableObjectGraph in a string tensor (length, checksum, text).

    An optimizer's variables, whose names end as those of the layers do, are left out.
    """
    size, at = wire.varint(data, 0)
    graph = data[at + 4 :]
    if len(graph) != size:
        raise Malformed(f"the object graph is {len(graph)} bytes, not {size}")
    found = {}
    for node in (field.bytes() for field in wire.fields(graph) if field.number == 1):
        for attribute in (field.bytes() for field in wire.fields(node) if field.number == 2):
            texts = {part.number: part.text() for part in wire.fields(attribute) if part.number in (2, 3)}
            name, key = texts.get(2, ""), texts.get(3, "")
            if name and "optimizer" not in key.lower():
                found[key] = "/".join(name.split("/")[-2:])
    return found


def _entry(data: memoryview) -> tuple[int, list[int], int, int, int]:
    """(dtype, shape, shard, offset, size) of a BundleEntryProto; dtype 0 for slices of a tensor."""
    numbers, shape, is_sliced = {1: 0, 3: 0, 4: 0, 5: 0}, [], False
    for field in wire.fields(data):
        if field.number in numbers:
            numbers[field.number] = field.number_of()
        elif field.number == 2:
            shape = _shape(field.bytes())
        elif field.number == 7:
            is_sliced = True
    return 0 if is_sliced else numbers[1], shape, numbers[3], numbers[4], numbers[5]


def _shape(data: memoryview) -> list[int]:
    sizes = [field.bytes() for field in wire.fields(data) if field.number == 2]
    return [next((part.number_of() for part in wire.fields(size) if part.number == 1), 0) for size in sizes]


def _read_shard(index: Path, shards: int, name: str, shard: int, offset: int, size: int) -> memoryview:
    if not 0 <= shard < shards or shards > 99999:
        raise Malformed(f"{name[:80]} lies in part {shard} of {shards}")
    path = index.with_name(f"{index.name.removesuffix('.index')}.data-{shard:05d}-of-{shards:05d}")
    if not path.is_file():
        raise Malformed(f"the file {path.name} is missing beside it")
    if offset < 0 or size < 0 or offset + size > path.stat().st_size:
        raise Malformed(f"{path.name} is cut short: {name[:80]} ends at byte {offset + size}")
    with path.open("rb") as file:
        file.seek(offset)
        return memoryview(file.read(size))


def _tensor_proto(data: memoryview, name: str) -> Tensor | None:
    kind, dims, content, floats = 0, [], data[:0], data[:0]
    for field in wire.fields(data):
        if field.number == 1:
            kind = field.number_of()
        elif field.number == 2:
            dims = _shape(field.bytes())
        elif field.number == 4:
            content = field.bytes()
        elif field.number == 5:
            floats = field.bytes() if field.kind == wire.BYTES else memoryview(struct.pack("<I", field.value))
    if kind == 1 and len(floats) == 4 * prod(dims) and not len(content):
        content = floats
    return wire.tensor(content, dims, _DTYPES[kind], name[:80]) if kind in _DTYPES and len(content) else None
