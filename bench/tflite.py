"""A float32 .tflite file of MobileNetV2 with given weights, as TensorFlow's converter would lay it out.

LiteRT has no padding of one pixel on every side: its SAME padding of a stride of two adds only below and on the
right. On pictures and kernels turned by 180 degrees that is the same arithmetic (for even sizes), so the file holds
turned kernels and takes turned pictures, and no padding operators slow it down.
"""

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from torch import Tensor

from mbv2.kernels.cpu_network import BlockShape

_VERSIONS = {"CONV_2D": 1, "DEPTHWISE_CONV_2D": 1, "ADD": 1, "MEAN": 1, "FULLY_CONNECTED": 1}


class _Writer:
    """Collects tensors, buffers and operators of one subgraph."""

    def __init__(self) -> None:
        self.tensors: list[Any] = []
        self.buffers: list[Any] = [schema.BufferT()]
        self.operators: list[Any] = []
        self.codes = list(_VERSIONS)

    def tensor(self, shape: tuple[int, ...], values: np.ndarray | None = None, kind: int | None = None) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape = f"t{len(self.tensors)}", list(shape)
        tensor.type = schema.TensorType.FLOAT32 if kind is None else kind
        tensor.buffer = 0
        if values is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(values).tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, name: str, inputs: list[int], shape: tuple[int, ...], options: Any) -> int:
        operator = schema.OperatorT()
        operator.opcodeIndex, operator.inputs = self.codes.index(name), inputs
        operator.outputs = [self.tensor(shape)]
        operator.builtinOptions = options
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(operator)
        return operator.outputs[0]

    def shape(self, tensor: int) -> tuple[int, ...]:
        return tuple(self.tensors[tensor].shape)

    def convolution(self, x: int, weight: Tensor, bias: Tensor, stride: int, relu6: bool, groups: bool) -> int:
        options = schema.DepthwiseConv2DOptionsT() if groups else schema.Conv2DOptionsT()
        options.padding = schema.Padding.SAME
        options.strideW = options.strideH = stride
        options.fusedActivationFunction = getattr(schema.ActivationFunctionType, "RELU6" if relu6 else "NONE")
        turned = weight.flip(2, 3)
        if groups:
            options.depthMultiplier = 1
            values = turned.permute(1, 2, 3, 0).numpy()
        else:
            values = turned.permute(0, 2, 3, 1).numpy()
        batch, height, width, _ = self.shape(x)
        inputs = [x, self.tensor(values.shape, values), self.tensor(tuple(bias.shape), bias.numpy())]
        out = (batch, -(-height // stride), -(-width // stride), weight.shape[0])
        return self.operator("DEPTHWISE_CONV_2D" if groups else "CONV_2D", inputs, out, options)

    def finish(self, inputs: int, outputs: int) -> bytes:
        graph = schema.SubGraphT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, [inputs], [outputs]
        model = schema.ModelT()
        model.version, model.description, model.subgraphs, model.buffers = 3, "mbv2", [graph], self.buffers
        model.operatorCodes = []
        for name in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode, code.version = code.builtinCode, _VERSIONS[name]
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1 << 24)
        builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
        return bytes(builder.Output())


def write(path: Path, folded: list[Tensor], blocks: list[BlockShape], shape: tuple[int, int, int]) -> None:
    """Write the network.

    Args:
        path: the file.
        folded: weights as `mbv2.kernels.cpu_network.pack` takes them, BatchNorm folded in.
        blocks: the blocks in order.
        shape: batch, height, width of the pictures; even heights and widths down to the last stride of two.
    """
    writer, parts = _Writer(), iter(folded)
    pictures = x = writer.tensor((*shape, 3))
    x = writer.convolution(x, next(parts), next(parts), 2, True, False)
    for index, block in enumerate(blocks):
        shortcut = x
        if index > 0:
            x = writer.convolution(x, next(parts), next(parts), 1, True, False)
        x = writer.convolution(x, next(parts), next(parts), block.stride, True, True)
        x = writer.convolution(x, next(parts), next(parts), 1, False, False)
        if block.residual:
            x = writer.operator("ADD", [x, shortcut], writer.shape(x), schema.AddOptionsT())
    x = writer.convolution(x, next(parts), next(parts), 1, True, False)
    axes = writer.tensor((2,), np.array([1, 2], np.int32), schema.TensorType.INT32)
    batch, channels = writer.shape(x)[0], writer.shape(x)[3]
    x = writer.operator("MEAN", [x, axes], (batch, channels), schema.ReducerOptionsT())
    weight, bias = next(parts), next(parts)
    inputs = [x, *(writer.tensor(tuple(tensor.shape), tensor.numpy()) for tensor in (weight, bias))]
    x = writer.operator("FULLY_CONNECTED", inputs, (batch, weight.shape[0]), schema.FullyConnectedOptionsT())
    path.write_bytes(writer.finish(pictures, x))
