"""TensorFlow Lite: float, float16 and quantised (uint8 or int8, per tensor or per channel) files, dequantised.

Field numbers and codes are those of tensorflow/lite/schema/schema.fbs. BatchNorm is folded away in all of them.
"""

from typing import Any

import torch
from torch import Tensor

from mbv2.convert import graph, wire
from mbv2.convert.flatbuffer import Table
from mbv2.convert.network import Malformed, Network, NotThisNetwork

_DTYPES = {0: torch.float32, 1: torch.float16, 2: torch.int32, 3: torch.uint8, 4: torch.int64, 9: torch.int8}
_ADD, _CONV, _DEPTHWISE, _DEQUANTIZE, _DENSE, _PAD = 0, 3, 4, 6, 9, 34
_RELU = 1


def read(data: memoryview) -> Network:
    """The network of a `.tflite` file.

    Raises:
        Malformed: the file breaks the format.
        NotThisNetwork: the graph is another network's.
    """
    model = Table.root(data)
    codes = [max(code.integer(0, "b"), code.integer(3, "i")) for code in model.tables(1)]
    graphs = model.tables(2)
    if not graphs:
        raise NotThisNetwork("a TFLite file without a graph")
    if len(graphs) > 1:
        raise NotThisNetwork(f"{len(graphs)} graphs in one file")
    tensors = _Tensors(graphs[0].tables(0), model.tables(4))
    inputs = [int(index) for index in graphs[0].numbers(1, "i")]
    return _Reader(codes, tensors).read(graphs[0].tables(3), inputs)


class _Tensors:
    """The tensors of the graph by index: shape, contents, quantisation."""

    def __init__(self, tables: list[Table], buffers: list[Table]) -> None:
        self._tables, self._buffers = tables, buffers

    def table(self, index: int) -> Table:
        if not 0 <= index < len(self._tables):
            raise Malformed(f"there is no tensor {index}")
        return self._tables[index]

    def shape(self, index: int) -> list[int]:
        return [int(size) for size in self.table(index).numbers(0, "i")]

    def values(self, index: int) -> Tensor | None:
        """The constant contents as float32 (integers stay integers when not quantised), or None."""
        table = self.table(index)
        place = table.integer(2, "I")
        if place >= len(self._buffers):
            raise Malformed(f"there is no buffer {place}")
        content = self._buffers[place].bytes(0)
        if len(content) == 0:
            return None
        kind = table.integer(1, "b")
        if kind not in _DTYPES:
            raise NotThisNetwork(f"tensor {index} is of TFLite type {kind}")
        raw = wire.tensor(content, self.shape(index), _DTYPES[kind], f"tensor {index}")
        scales, zeros, axis = self.quantisation(index)
        if not scales:
            return raw.float() if raw.is_floating_point() else raw
        if len(scales) == 1:
            return ((raw.double() - zeros[0]) * scales[0]).float()
        if not 0 <= axis < raw.dim() or len(scales) != raw.shape[axis] or len(zeros) != len(scales):
            raise Malformed(f"tensor {index} has {len(scales)} scales along axis {axis} of {list(raw.shape)}")
        shape = [1] * raw.dim()
        shape[axis] = -1
        scale, zero = (torch.tensor(part, dtype=torch.float64).view(shape) for part in (scales, zeros))
        return ((raw.double() - zero) * scale).float()

    def quantisation(self, index: int) -> tuple[list[float], list[int], int]:
        table = self.table(index).table(4)
        if table is None:
            return [], [], 0
        scales = [float(value) for value in table.numbers(2, "f")]
        zeros = [int(value) for value in table.numbers(3, "q")] or [0] * len(scales)
        return scales, zeros, table.integer(6, "i")


class _Reader:
    """Walks the operators in the order they run."""

    def __init__(self, codes: list[int], tensors: _Tensors) -> None:
        self._codes, self._tensors = codes, tensors
        self._convs: list[graph.Convolution] = []
        self._dequantised: dict[int, int] = {}
        self._padded: dict[int, tuple[int, int]] = {}
        self._dense: tuple[Tensor, Tensor | None] | None = None
        self._relu = self._adds = 0

    def read(self, operators: list[Table], inputs: list[int]) -> Network:
        for operator in operators:
            code = operator.integer(0, "I")
            if code >= len(self._codes):
                raise Malformed(f"there is no operator code {code}")
            self._operator(self._codes[code], operator)
        if self._dense is None and self._convs:
            # The released files classify by a 1x1 convolution of the pooled features.
            last = self._convs.pop()
            self._dense = last.weight.flatten(1), last.bias
        if self._dense is None:
            raise NotThisNetwork("no classifier")
        classifier, bias = self._dense
        # TensorFlow's converter leaves out a bias of zeros.
        bias = classifier.new_zeros(classifier.shape[0]) if bias is None else bias
        if self._adds != 10:
            raise NotThisNetwork(f"{self._adds} shortcuts; MobileNetV2 has 10")
        notes = ("its stages end in ReLU, ours in ReLU6: outputs differ a little",) if self._relu else ()
        return graph.assemble(self._convs, classifier, bias, self._input_facts(inputs), notes)

    def _operator(self, code: int, operator: Table) -> None:
        ins = [int(index) for index in operator.numbers(1, "i")]
        outs = [int(index) for index in operator.numbers(2, "i")]
        if code == _ADD:
            self._adds += 1
        elif code == _DEQUANTIZE and ins and outs:
            self._dequantised[outs[0]] = ins[0]
        elif code == _PAD and len(ins) > 1 and outs:
            pads = self._constant(ins[1])
            if pads.shape != (4, 2) or pads[[0, 3]].any() or not torch.equal(pads[1], pads[2]):
                raise NotThisNetwork(f"a padding of {pads.flatten().tolist()[:16]}")
            self._padded[outs[0]] = (int(pads[1, 0]), int(pads[1, 1]))
        elif code in (_CONV, _DEPTHWISE):
            self._convs.append(self._convolution(operator, ins, code == _DEPTHWISE))
        elif code == _DENSE:
            if self._dense is not None or len(ins) < 2:
                raise NotThisNetwork("more than one fully connected layer")
            self._dense = self._constant(ins[1]), self._bias(ins)

    def _convolution(self, operator: Table, ins: list[int], depthwise: bool) -> graph.Convolution:
        options = operator.table(4)
        if options is None or len(ins) < 2:
            raise Malformed("a convolution without options or weights")
        weight = self._constant(ins[1])
        if weight.dim() != 4:
            raise NotThisNetwork(f"a convolution with weights of shape {list(weight.shape)}")
        strides = options.integer(1, "i", 1), options.integer(2, "i", 1)
        if strides[0] != strides[1]:
            raise NotThisNetwork(f"a convolution of stride {strides}")
        self._relu += options.integer(4 if depthwise else 3, "b") == _RELU
        pads = None if options.integer(0, "b") == 0 else self._padded.get(ins[0], (0, 0))
        weight = weight.permute(3, 0, 1, 2) if depthwise else weight.permute(0, 3, 1, 2)
        return graph.Convolution(weight, self._bias(ins), strides[0], pads)

    def _bias(self, ins: list[int]) -> Tensor | None:
        return self._constant(ins[2]) if len(ins) > 2 and ins[2] >= 0 else None

    def _constant(self, index: int) -> Tensor:
        values = self._tensors.values(self._dequantised.get(index, index))
        if values is None:
            raise NotThisNetwork(f"tensor {index} is computed, not stored")
        return values

    def _input_facts(self, inputs: list[int]) -> dict[str, Any]:
        facts: dict[str, Any] = {"preprocessing": "tf"}
        if not inputs:
            raise Malformed("a graph without input")
        shape = self._tensors.shape(inputs[0])
        if len(shape) == 4 and shape[1] == shape[2] and shape[1] >= 32:
            facts["resolution"] = shape[1]
        scales, zeros, _ = self._tensors.quantisation(inputs[0])
        kind = self._tensors.table(inputs[0]).integer(1, "b")
        if len(scales) == 1 and scales[0] > 0 and kind in (3, 9):
            zero = zeros[0] + (128 if kind == 9 else 0)
            facts["mean"], facts["std"] = [zero / 255] * 3, [1 / (255 * scales[0])] * 3
        return facts
