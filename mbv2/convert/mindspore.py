"""MindSpore's `.ckpt`: a concatenation of protobuf messages, one tensor each, in both directions.

    message Checkpoint { message Value { required string tag = 1; required TensorProto tensor = 2; } repeated Value value = 1; }
    message TensorProto { repeated int64 dims = 1; required string tensor_type = 2; required bytes tensor_content = 3; }

A tensor of more than 512 MiB comes in parts under one tag. The names depend on who wrote the model: mindcv
(`features.2.layers.0.weight`) or mindvision (`backbone.features.1.conv.0.features.0.weight`, head a 1x1
convolution). Both number their parts in the order they run, and that is all that is relied on.
"""  # noqa: E501

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from mbv2.convert.network import BLOCKS, Malformed, Network, Norm, NotThisNetwork, gather, stage_names
from mbv2.convert.wire import BYTES, fields, put, tensor

_DTYPES = {
    "Float32": torch.float32,
    "Float16": torch.float16,
    "Float64": torch.float64,
    "BFloat16": torch.bfloat16,
    "Int8": torch.int8,
    "Int16": torch.int16,
    "Int32": torch.int32,
    "Int64": torch.int64,
    "UInt8": torch.uint8,
    "Bool": torch.bool,
}
_NORM = ("gamma", "beta", "moving_mean", "moving_variance")
# What an optimizer or a training loop keeps beside the weights.
_NOT_WEIGHTS = re.compile(r"(^|\.)(moments?\d*|stat|accum|velocity|ema)\.")
_CHUNK = 512 << 20


def looks_like(data: memoryview) -> bool:
    """Whether the first message is a Value with a tag and a tensor of a MindSpore type."""
    try:
        first = next(fields(data))
        if first.number != 1 or first.kind != BYTES:
            return False
        parts = {part.number: part for part in fields(first.data)}
        kinds = [part.text() for part in fields(parts[2].bytes()) if part.number == 2]
    except (Malformed, StopIteration, KeyError):
        return False
    return len(kinds) == 1 and kinds[0] in _DTYPES


def read_tensors(data: memoryview) -> dict[str, Tensor]:
    """All tensors by tag, in the file's order.

    Raises:
        Malformed: the file breaks the format, or holds a type that torch has not.
    """
    parts: dict[str, list[memoryview]] = {}
    heads: dict[str, tuple[list[int], str]] = {}
    for message in fields(data):
        if message.number != 1:
            raise Malformed(f"field {message.number} where a tensor belongs")
        tag, body = "", None
        for part in fields(message.bytes()):
            if part.number == 1:
                tag = part.text()
            elif part.number == 2:
                body = part.bytes()
        if not tag or body is None:
            raise Malformed("a value without tag or tensor")
        dims: list[int] = []
        kind, content = "", data[:0]
        for part in fields(body):
            if part.number == 1:
                dims += part.integers()
            elif part.number == 2:
                kind = part.text()
            elif part.number == 3:
                content = part.bytes()
        if heads.setdefault(tag, (dims, kind)) != (dims, kind):
            raise Malformed(f"{tag} comes twice, with different shapes")
        parts.setdefault(tag, []).append(content)
    tensors = {}
    for tag, (dims, kind) in heads.items():
        if kind not in _DTYPES:
            raise Malformed(f"{tag} is of type {kind[:40]!r}")
        # A scalar is written with dims [0] by some versions.
        chunks = parts[tag]
        content = chunks[0] if len(chunks) == 1 else memoryview(b"".join(chunks))
        tensors[tag] = tensor(content, [] if dims == [0] and len(content) else dims, _DTYPES[kind], tag)
    return tensors


def read(tensors: Mapping[str, Tensor]) -> Network:
    """The network in a checkpoint, whichever of the two namings it has.

    Raises:
        NotThisNetwork: the tensors are another network's.
    """
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        if "." in name and not _NOT_WEIGHTS.search(name):
            prefix, last = name.rsplit(".", 1)
            groups.setdefault(prefix, {})[last] = value
    convs, norms, dense = [], [], []
    for prefix in sorted(groups, key=_natural):
        parts = groups[prefix]
        if set(_NORM) <= set(parts):
            norms.append(Norm(*(parts[name] for name in _NORM)))
        elif "bias" in parts and "weight" in parts:
            dense.append(prefix)
        elif "weight" in parts:
            convs.append(parts["weight"])
    if len(convs) != 3 * BLOCKS + 1 or len(norms) != len(convs) or len(dense) != 1:
        raise NotThisNetwork(
            f"{len(convs)} convolutions, {len(norms)} BatchNorms and {len(dense)} classifiers; "
            f"MobileNetV2 has {3 * BLOCKS + 1}, {3 * BLOCKS + 1} and 1"
        )
    weight, bias = groups[dense[0]]["weight"], groups[dense[0]]["bias"]
    facts = {"padding": "symmetric", "bn_eps": 1e-5, "preprocessing": "torch"}
    if weight.shape[0] == 1001:
        # The seed's extra class is an unused last logit.
        facts["class_offset"] = 0
    return Network(convs, norms, weight.flatten(1), bias, facts=facts)


def write(state: Mapping[str, Tensor], naming: str = "mindcv") -> bytes:
    """A checkpoint of a state_dict in torchvision's names.

    Args:
        state: what `mbv2.weights.save_weights` takes.
        naming: "mindcv", or "mindvision" (head a 1x1 convolution, as in the seed).
    """
    weights, norms = gather(state, stage_names())
    out = []
    for (conv, norm), weight, values in zip(_names(naming), weights, norms, strict=True):
        out.append(_value(f"{conv}.weight", weight))
        out += [_value(f"{norm}.{name}", value) for name, value in zip(_NORM, values, strict=True)]
    head = "classifier.1" if naming == "mindcv" else "head.classifier"
    weight = state["classifier.1.weight"]
    out.append(_value(f"{head}.weight", weight if naming == "mindcv" else weight[:, :, None, None]))
    out.append(_value(f"{head}.bias", state["classifier.1.bias"]))
    return b"".join(out)


def _names(naming: str) -> list[tuple[str, str]]:
    if naming == "mindvision":
        # features.N.K of torchvision is features.N.features.K there, within blocks likewise.
        return [(f"backbone.{_nested(conv)}", f"backbone.{_nested(norm)}") for conv, norm in stage_names()]
    names = [("features.0", "features.1")]
    for block in range(1, BLOCKS + 1):
        steps = (0, 3) if block == 1 else (0, 3, 6)
        names += [(f"features.{block + 2}.layers.{k}", f"features.{block + 2}.layers.{k + 1}") for k in steps]
    return [*names, (f"features.{BLOCKS + 3}", f"features.{BLOCKS + 4}")]


def _nested(name: str) -> str:
    name = re.sub(r"^features\.(\d+)\.(\d+)$", r"features.\1.features.\2", name)
    return re.sub(r"^(features\.\d+\.conv\.\d+)\.(\d+)$", r"\1.features.\2", name)


def _value(tag: str, value: Tensor) -> bytes:
    value = value.detach().to(torch.float32).contiguous().cpu()
    head = b"".join(put(1, size) for size in value.shape) + put(2, "Float32")
    content = value.numpy().tobytes()
    chunks = [content[at : at + _CHUNK] for at in range(0, max(1, len(content)), _CHUNK)]
    return b"".join(put(1, put(1, tag) + put(2, head + put(3, chunk))) for chunk in chunks)


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() and len(part) < 10 else (-1, part) for part in name.split(".")]
