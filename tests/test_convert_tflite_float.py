"""TFLite files of float32, float16 and int8 weights, laid out by litert's schema classes, run by ai-edge-litert."""

from pathlib import Path

import numpy as np
import pytest
import torch
from test_export import trained
from torch import Tensor, nn

from mbv2 import weights
from mbv2.convert import convert
from mbv2.export.plain import PaddedConv, PlainBlock, PlainNetwork

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
flatbuffers = pytest.importorskip("flatbuffers")
litert = pytest.importorskip("ai_edge_litert.interpreter")
SIZE = 64
Codes, Types = schema.BuiltinOperator, schema.TensorType


class Writer:
    """A TFLite model of a PlainNetwork with SAME padding; weights as `kind` says, the arithmetic in float32."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.buffers, self.tensors, self.operators, self.codes = [schema.BufferT()], [], [], []

    def tensor(self, shape: list[int], value: np.ndarray | None = None, type: int = Types.FLOAT32) -> int:
        tensor = schema.TensorT()
        tensor.name, tensor.shape, tensor.type = f"t{len(self.tensors)}", shape, type
        tensor.buffer = 0
        if value is not None:
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(np.ascontiguousarray(value).tobytes(), np.uint8)
            tensor.buffer = len(self.buffers)
            self.buffers.append(buffer)
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def operator(self, code: int, inputs: list[int], shape: list[int], kind: str = "", options: object = None) -> int:
        operator = schema.OperatorT()
        if code not in self.codes:
            self.codes.append(code)
        operator.opcodeIndex, operator.inputs = self.codes.index(code), inputs
        operator.outputs = [self.tensor(shape)]
        if kind:
            operator.builtinOptionsType, operator.builtinOptions = getattr(schema.BuiltinOptions, kind), options
        self.operators.append(operator)
        return operator.outputs[0]

    def weight(self, value: np.ndarray, channel: int) -> int:
        """A constant; float16 and int8 ones become float32 in an operator of their own, as converters do it."""
        shape = list(value.shape)
        if self.kind == "float32":
            return self.tensor(shape, value)
        if self.kind == "float16":
            stored = self.tensor(shape, value.astype(np.float16), Types.FLOAT16)
        else:
            axes = tuple(axis for axis in range(value.ndim) if axis != channel)
            scale = np.abs(value).max(axes, keepdims=True) / 127
            stored = self.tensor(shape, np.round(value / scale).astype(np.int8), Types.INT8)
            how = schema.QuantizationParametersT()
            how.scale, how.zeroPoint = scale.ravel().astype(np.float32), np.zeros(scale.size, np.int64)
            how.quantizedDimension = channel
            self.tensors[stored].quantization = how
        return self.operator(Codes.DEQUANTIZE, [stored], shape, "DequantizeOptions", schema.DequantizeOptionsT())

    def convolution(self, module: PaddedConv, x: int, relu6: bool) -> int:
        conv = module.conv
        stride = conv.stride[0]
        side = -(-self.tensors[x].shape[1] // stride)
        shape = [1, side, side, conv.out_channels]
        # Ours is [out, in / groups, k, k]; theirs [out, k, k, in], depthwise [1, k, k, channels].
        depthwise = conv.groups > 1
        value = conv.weight.permute(1, 2, 3, 0) if depthwise else conv.weight.permute(0, 2, 3, 1)
        kernel = self.weight(value.numpy(), 3 if depthwise else 0)
        options = schema.DepthwiseConv2DOptionsT() if depthwise else schema.Conv2DOptionsT()
        options.padding, options.strideW, options.strideH = schema.Padding.SAME, stride, stride
        options.dilationWFactor = options.dilationHFactor = 1
        if depthwise:
            options.depthMultiplier = 1
        none, clipped = schema.ActivationFunctionType.NONE, schema.ActivationFunctionType.RELU6
        options.fusedActivationFunction = clipped if relu6 else none
        inputs = [x, kernel, self.tensor([conv.out_channels], conv.bias.numpy())]
        code, kind = (
            (Codes.DEPTHWISE_CONV_2D, "DepthwiseConv2DOptions") if depthwise else (Codes.CONV_2D, "Conv2DOptions")
        )
        return self.operator(code, inputs, shape, kind, options)

    def run(self, modules: list[nn.Module], x: int) -> int:
        for index, module in enumerate(modules):
            if isinstance(module, PaddedConv):
                relu6 = index + 1 < len(modules) and isinstance(modules[index + 1], nn.ReLU6)
                x = self.convolution(module, x, relu6)
            elif isinstance(module, PlainBlock):
                out = self.run(list(module.stages), x)
                add = schema.AddOptionsT()
                x = (
                    self.operator(Codes.ADD, [x, out], self.tensors[out].shape, "AddOptions", add)
                    if module.residual
                    else out
                )
        return x

    def write(self, network: PlainNetwork, path: Path) -> None:
        start = self.tensor([1, SIZE, SIZE, 3])
        x = self.run(list(network.features), start)
        top = network.classifier
        axes = self.tensor([2], np.array([1, 2], np.int32), Types.INT32)
        x = self.operator(Codes.MEAN, [x, axes], [1, top.in_features], "ReducerOptions", schema.ReducerOptionsT())
        # Without a bias, as TensorFlow's converter writes one of zeros.
        inputs = [x, self.weight(top.weight.numpy(), 0), -1]
        dense = schema.FullyConnectedOptionsT()
        end = self.operator(Codes.FULLY_CONNECTED, inputs, [1, top.out_features], "FullyConnectedOptions", dense)
        graph, model = schema.SubGraphT(), schema.ModelT()
        graph.tensors, graph.operators, graph.inputs, graph.outputs = self.tensors, self.operators, [start], [end]
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [graph], self.buffers, []
        for value in self.codes:
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = value
            code.version = 1
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))


def run(path: Path, x: Tensor) -> Tensor:
    interpreter = litert.Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    feed, answer = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]
    found = []
    for picture in x.permute(0, 2, 3, 1).contiguous().numpy():
        interpreter.set_tensor(feed, picture[None])
        interpreter.invoke()
        found.append(torch.from_numpy(interpreter.get_tensor(answer).copy()))
    return torch.cat(found)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
@torch.no_grad()
def test_the_converted_network_gives_the_interpreters_logits(tmp_path: Path, kind: str) -> None:
    original = trained("same")
    original.classifier[1].bias.zero_()
    source, target = tmp_path / "m.tflite", tmp_path / "w.safetensors"
    Writer(kind).write(PlainNetwork(original, SIZE), source)
    x = torch.randn(3, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(6))
    expected = run(source, x)
    convert(source, target)
    model, meta = weights.model_from_weights(target)
    found = model.eval()(x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert (meta["padding"], meta["resolution"]) == ("same", SIZE)
    # The files differ, and each is read as it is.
    error = (expected - original(x)).abs().max() / expected.abs().max()
    assert (error < 1e-4) if kind == "float32" else (error > 1e-5)
