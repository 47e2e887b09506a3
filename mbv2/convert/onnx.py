"""ONNX files, float and QDQ, read without the onnx package; the field numbers are those of onnx.proto.

Weights beside the file (external data) are read from its own folder only.
"""

import struct
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbv2.convert import graph, wire
from mbv2.convert.network import Malformed, Network, Norm, NotThisNetwork

_DTYPES = {
    1: torch.float32,
    2: torch.uint8,
    3: torch.int8,
    6: torch.int32,
    7: torch.int64,
    10: torch.float16,
    11: torch.float64,
    16: torch.bfloat16,
}
_DEEPEST = 8


class _Node(NamedTuple):
    op: str
    inputs: list[str]
    outputs: list[str]
    attributes: dict[str, Any]


def looks_like(data: memoryview) -> bool:
    """Whether the top level has an IR version and a graph, as a ModelProto has."""
    numbers = set()
    try:
        for field in wire.fields(data):
            numbers.add((field.number, field.kind))
    except Malformed:
        return False
    return {(1, wire.VARINT), (7, wire.BYTES)} <= numbers


def read(data: memoryview, folder: Path | None = None) -> Network:
    """The network of an ONNX model.

    Args:
        data: the file.
        folder: where external data may lie; None refuses it.

    Raises:
        Malformed: the file breaks the format.
        NotThisNetwork: the graph is another network's.
    """
    graphs = [field.bytes() for field in wire.fields(data) if field.number == 7]
    if len(graphs) != 1:
        raise Malformed(f"{len(graphs)} graphs")
    nodes, constants, size = [], {}, 0
    for field in wire.fields(graphs[0]):
        if field.number == 1:
            nodes.append(_node(field.bytes(), folder))
        elif field.number == 5:
            name, value = _tensor(field.bytes(), folder)
            constants[name] = value
        elif field.number == 11 and not size:
            size = _picture_size(field.bytes())
    return _Graph(nodes, constants).network(size)


class _Graph:
    """Nodes and constants, and the questions asked of them."""

    def __init__(self, nodes: list[_Node], constants: dict[str, Callable[[], Tensor]]) -> None:
        self._nodes, self._constants = nodes, constants
        self._maker = {name: node for node in nodes for name in node.outputs}
        self._users: dict[str, list[_Node]] = {}
        for node in nodes:
            for name in node.inputs:
                self._users.setdefault(name, []).append(node)

    def network(self, size: int) -> Network:
        convs = [self._convolution(node) for node in self._nodes if node.op == "Conv"]
        dense = [node for node in self._nodes if node.op in ("Gemm", "MatMul")]
        quantised = [node.op for node in self._nodes if node.op in ("QLinearConv", "ConvInteger", "FusedConv")]
        if quantised:
            raise NotThisNetwork(f"its convolutions are {quantised[0]} operators; export it in QDQ format instead")
        if len(dense) > 1:
            raise NotThisNetwork(f"{len(dense)} fully connected layers")
        if dense:
            classifier, bias = self._dense(dense[0])
        elif convs and convs[-1].bias is not None:
            last = convs.pop()
            classifier, bias = last.weight.flatten(1), last.bias
        else:
            raise NotThisNetwork("no classifier")
        facts = {"resolution": size} if size >= 32 else {}
        ops = {node.op for node in self._nodes}
        notes = ("its stages end in ReLU, ours in ReLU6: outputs differ a little",)
        return graph.assemble(convs, classifier, bias, facts, notes if "Relu" in ops and "Clip" not in ops else ())

    def constant(self, name: str, depth: int = 0) -> Tensor | None:
        """The value of `name` where it follows from constants alone, dequantised; else None."""
        if depth > _DEEPEST:
            return None
        if name in self._constants:
            return self._constants[name]()
        node = self._maker.get(name)
        if node is None:
            return None
        if node.op == "Constant":
            value = node.attributes.get("value")
            return value() if callable(value) else None
        parts = [self.constant(part, depth + 1) if part else None for part in node.inputs]
        if not parts or parts[0] is None:
            return None
        if node.op in ("Identity", "Cast"):
            return parts[0]
        if node.op == "Transpose" and parts[0].dim() == 2 and node.attributes.get("perm", [1, 0]) == [1, 0]:
            return parts[0].T
        if node.op == "DequantizeLinear" and len(parts) > 1 and parts[1] is not None:
            return _dequantise(parts[0], parts[1], parts[2] if len(parts) > 2 else None, node.attributes.get("axis", 1))
        return None

    def _need(self, name: str) -> Tensor:
        value = self.constant(name)
        if value is None:
            raise NotThisNetwork(f"{name[:80] or 'an input'} is computed, not stored")
        return value

    def _convolution(self, node: _Node) -> graph.Convolution:
        attributes = node.attributes
        strides = attributes.get("strides", [1, 1])
        if len(node.inputs) < 2 or len(strides) != 2 or strides[0] != strides[1]:
            raise NotThisNetwork(f"a convolution of strides {strides}")
        if any(step != 1 for step in attributes.get("dilations", [])):
            raise NotThisNetwork("a dilated convolution")
        weight = self._need(node.inputs[1])
        bias = self._need(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
        users = self._users.get(node.outputs[0], []) if node.outputs else []
        norm, eps = None, 0.0
        if len(users) == 1 and users[0].op == "BatchNormalization" and len(users[0].inputs) == 5:
            norm = Norm(*(self._need(name).float() for name in users[0].inputs[1:]))
            eps = float(users[0].attributes.get("epsilon", 1e-5))
        return graph.Convolution(
            weight.float(), None if bias is None else bias.float(), strides[0], self._pads(node), norm, eps
        )

    def _pads(self, node: _Node) -> tuple[int, int] | None:
        auto = node.attributes.get("auto_pad", "NOTSET")
        if auto == "SAME_UPPER":
            return None
        pads = node.attributes.get("pads", [0, 0, 0, 0])
        if auto not in ("NOTSET", "VALID") or len(pads) != 4 or pads[0] != pads[1] or pads[2] != pads[3]:
            raise NotThisNetwork(f"a convolution padded {auto} {pads[:8]}")
        before, after = pads[0], pads[2]
        source = self._maker.get(node.inputs[0])
        while source is not None and source.op in ("QuantizeLinear", "DequantizeLinear", "Identity") and source.inputs:
            source = self._maker.get(source.inputs[0]) if source.inputs[0] != source.outputs[0] else None
        if source is not None and source.op == "Pad":
            extra = source.attributes.get("pads")
            if extra is None and len(source.inputs) > 1:
                extra = self._need(source.inputs[1]).flatten().tolist()
            if not extra or len(extra) != 8 or any(extra[i] for i in (0, 1, 4, 5)):
                raise NotThisNetwork(f"a padding of {extra}")
            if extra[2] != extra[3] or extra[6] != extra[7]:
                raise NotThisNetwork(f"a padding of {extra}")
            before, after = before + int(extra[2]), after + int(extra[6])
        return before, after

    def _dense(self, node: _Node) -> tuple[Tensor, Tensor]:
        if len(node.inputs) < 2:
            raise Malformed(f"a {node.op} of {len(node.inputs)} inputs")
        weight = self._need(node.inputs[1]).float()
        if node.op == "Gemm":
            if len(node.inputs) < 3 or any(node.attributes.get(key, 1.0) != 1.0 for key in ("alpha", "beta")):
                raise NotThisNetwork("a classifier without bias, or scaled")
            return weight if node.attributes.get("transB", 0) else weight.T, self._need(node.inputs[2]).float()
        for user in self._users.get(node.outputs[0], []):
            others = [name for name in user.inputs if name != node.outputs[0]]
            if user.op == "Add" and len(others) == 1:
                return weight.T, self._need(others[0]).float()
        raise NotThisNetwork("a classifier without bias")


def _node(data: memoryview, folder: Path | None) -> _Node:
    op, inputs, outputs, attributes = "", [], [], {}
    for field in wire.fields(data):
        if field.number == 1:
            inputs.append(field.text())
        elif field.number == 2:
            outputs.append(field.text())
        elif field.number == 4:
            op = field.text()
        elif field.number == 5:
            name, value = _attribute(field.bytes(), folder)
            attributes[name] = value
    return _Node(op, inputs, outputs, attributes)


def _attribute(data: memoryview, folder: Path | None) -> tuple[str, Any]:
    name, value, integers = "", None, []
    for field in wire.fields(data):
        if field.number == 1:
            name = field.text()
        elif field.number == 2:
            value = field.float32()
        elif field.number == 3:
            value = field.number_of()
        elif field.number == 4:
            value = field.bytes().tobytes().decode("utf-8", "replace")
        elif field.number == 5:
            value = _tensor(field.bytes(), folder)[1]
        elif field.number == 8:
            integers += field.integers()
    return name, integers if integers or value is None else value


def _tensor(data: memoryview, folder: Path | None) -> tuple[str, Callable[[], Tensor]]:
    """(name, a function that makes the tensor): most are read only when a convolution asks for them."""
    dims: list[int] = []
    numbers: list[int] = []
    external: dict[str, str] = {}
    name, kind, raw, floats, is_external = "", 0, data[:0], data[:0], False
    for field in wire.fields(data):
        if field.number == 1:
            dims += field.integers()
        elif field.number == 2:
            kind = field.number_of()
        elif field.number == 4:
            floats = field.bytes() if field.kind == wire.BYTES else memoryview(struct.pack("<I", field.value))
        elif field.number in (5, 7):
            numbers += field.integers()
        elif field.number == 8:
            name = field.text()
        elif field.number == 9:
            raw = field.bytes()
        elif field.number == 13:
            pair = {part.number: part.text() for part in wire.fields(field.bytes())}
            external[pair.get(1, "")] = pair.get(2, "")
        elif field.number == 14:
            is_external = field.number_of() == 1

    def make() -> Tensor:
        if kind not in _DTYPES:
            raise NotThisNetwork(f"{name[:80]} is of ONNX type {kind}")
        dtype = _DTYPES[kind]
        if is_external:
            return wire.tensor(_external(external, folder), dims, dtype, name)
        if len(floats) and kind == 1:
            return wire.tensor(floats, dims, dtype, name)
        if numbers and kind in (2, 3, 6, 7):
            packed = memoryview(struct.pack(f"<{len(numbers)}q", *numbers))
            return wire.tensor(packed, dims, torch.int64, name).to(dtype)
        return wire.tensor(raw, dims, dtype, name)

    return name, make


def _external(where: dict[str, str], folder: Path | None) -> memoryview:
    location = where.get("location", "")
    if folder is None or not location or PurePath(location).name != location or location in (".", ".."):
        raise Malformed(f"weights in another file, {location[:80]!r}, which is not in the model's own folder")
    path = folder / location
    if path.is_symlink() or not path.is_file():
        raise Malformed(f"weights in the file {location[:80]}, which is missing beside the model")
    offset, length = (where.get(key, "0") for key in ("offset", "length"))
    if not (offset.isascii() and offset.isdigit() and length.isascii() and length.isdigit()):
        raise Malformed(f"weights in {location[:80]} at {offset[:20]!r}")
    start, size = int(offset), int(length) or path.stat().st_size - int(offset)
    if size < 0 or start + size > path.stat().st_size:
        raise Malformed(f"{location[:80]} is cut short")
    with path.open("rb") as file:
        file.seek(start)
        return memoryview(file.read(size))


def _dequantise(raw: Tensor, scale: Tensor, zero: Tensor | None, axis: int) -> Tensor:
    if scale.numel() > 1:
        if not -raw.dim() <= axis < raw.dim() or scale.numel() != raw.shape[axis]:
            raise Malformed(f"{scale.numel()} scales along axis {axis} of {list(raw.shape)}")
        shape = [1] * raw.dim()
        shape[axis] = -1
    else:
        shape = []
    zero = torch.zeros_like(scale) if zero is None else zero
    if zero.numel() != scale.numel():
        raise Malformed(f"{scale.numel()} scales but {zero.numel()} zero points")
    return ((raw.double() - zero.double().reshape(shape)) * scale.double().reshape(shape)).float()


def _picture_size(data: memoryview) -> int:
    """Height of the input where its shape is known, [N, 3, H, W] with H = W; else 0."""
    dims: list[int] = []
    message = data
    for number in (2, 1, 2):  # type, tensor_type, shape
        message = next((field.bytes() for field in wire.fields(message) if field.number == number), data[:0])
    for field in wire.fields(message):
        values = [part.number_of() for part in wire.fields(field.bytes()) if part.number == 1]
        dims.append(values[0] if values else 0)
    return dims[2] if len(dims) == 4 and dims[2] == dims[3] and 0 < dims[2] < 1 << 14 else 0
