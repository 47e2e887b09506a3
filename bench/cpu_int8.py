"""`python -m bench cpu_int8`: inference in int8 on a CPU against what else runs MobileNetV2 so there.

ONNX Runtime and OpenVINO run the QDQ file that `mbv2 export --format onnx-int8` writes of the same weights; LiteRT runs
the file given with --tflite, which has weights of its own (e.g. TensorFlow's published mobilenet_v2_1.0_224_quant).
Ranges are measured on the same random pictures. No runner is timed whose logits are further from float64 than 30 %
(Frobenius norm), LiteRT's from those of its file converted by `mbv2 convert`; the table has every error. Our network in
float32 is timed beside them. Rounds are interleaved; `faster` is the median of the rounds' ratios over that, of time on
the core, by the clock with several threads. "% of peak" is of float32's.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import mbv2
from bench import cpu_formats
from bench.cpu_formats import COLUMNS as COLUMNS
from bench.cpu_formats import Comparison, MakeRunner, Models
from bench.cpu_peers import Case, Runner
from mbv2 import weights
from mbv2.cli import run_guarded
from mbv2.convert.command import Said, describe
from mbv2.export import write
from mbv2.export.plain import PlainNetwork


def calibration(case: Case) -> Tensor:
    """Random pictures, others than the timed ones."""
    generator = torch.Generator().manual_seed(2)
    return torch.randn(32, 3, case.resolution, case.resolution, generator=generator)


def ours(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0], torch.int8, calibration(case))


def ours_in_float32(models: Models, case: Case, x: Tensor) -> Runner:
    return mbv2.optimize_for_inference(models[0])


def qdq_file(models: Models, case: Case, folder: str) -> str:
    path = Path(folder) / "int8.onnx"
    network = PlainNetwork(models[0], case.resolution)
    write.onnx_int8(network, case.resolution, path, calibration(case).split(8))
    return str(path)


def onnx_runtime(models: Models, case: Case, x: Tensor) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        session = onnxruntime.InferenceSession(qdq_file(models, case, folder), options, ["CPUExecutionProvider"])
    name, pictures = session.get_inputs()[0].name, x.numpy()
    return lambda _: session.run(None, {name: pictures})[0]


def openvino(models: Models, case: Case, x: Tensor) -> Runner:
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        network = openvino.Core().read_model(qdq_file(models, case, folder))
        network.reshape(list(x.shape))
        config = {"INFERENCE_NUM_THREADS": case.threads, "PERFORMANCE_HINT": "LATENCY"}
        request = openvino.Core().compile_model(network, "CPU", config).create_infer_request()
    pictures = openvino.Tensor(x.numpy(), shared_memory=True)
    return lambda _: next(iter(request.infer([pictures], share_inputs=True, share_outputs=True).values()))


class LiteRT:
    """A quantised .tflite file, picture by picture, as such files are written for one; `expected` are the outputs of
    its weights in float on the same bytes.
    """

    def __init__(self, file: Path, models: Models, case: Case, x: Tensor) -> None:
        from ai_edge_litert.interpreter import Interpreter

        self._interpreter = Interpreter(str(file), num_threads=case.threads)
        self._interpreter.allocate_tensors()
        self._place, self._result = self._interpreter.get_input_details()[0], self._interpreter.get_output_details()[0]
        if list(self._place["shape"]) != [1, case.resolution, case.resolution, 3] or self._place["dtype"] != np.uint8:
            raise ValueError(f"{file.name} does not take the bytes of one picture of {case.resolution} pixels")
        scale, zero = self._place["quantization"]
        levels = (x / scale + zero).round().clamp(0, 255)
        self._pictures = levels.byte().permute(0, 2, 3, 1).contiguous().numpy()
        model, _ = weights.model_from_weights(describe(file, "tflite", Said()))
        if model.width_mult != case.width:
            raise ValueError(f"{file.name} is of width {model.width_mult}")
        self.expected = model.eval().double()((levels - zero).double() * scale)
        if "softmax" in self._result["name"].lower():
            self.expected = self.expected.softmax(1)

    def __call__(self, _: Tensor) -> Tensor:
        scale, zero = self._result["quantization"]
        rows = []
        for index in range(len(self._pictures)):
            self._interpreter.set_tensor(self._place["index"], self._pictures[index : index + 1])
            self._interpreter.invoke()
            rows.append(torch.from_numpy(self._interpreter.get_tensor(self._result["index"])))
        return (torch.cat(rows).float() - zero) * scale


RUNNERS: dict[str, MakeRunner] = {
    "mbv2": ours,
    "mbv2 float32": ours_in_float32,
    "ONNX Runtime QDQ": onnx_runtime,
    "OpenVINO QDQ": openvino,
}


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tflite", type=Path)
    own, rest = parser.parse_known_args(argv)
    runners = RUNNERS if own.tflite is None else RUNNERS | {"LiteRT QAT": partial(LiteRT, own.tflite)}
    comparison = Comparison("cpu_int8", "int8", runners, "mbv2 float32", 0.3)
    return cpu_formats.main(comparison, __doc__.split("\n")[0], rest)


if __name__ == "__main__":
    sys.exit(run_guarded(lambda: main(sys.argv[1:])))
