"""What runs MobileNetV2 on a CPU beside us, each made ready to be timed by `bench.cpu`."""

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mbv2

Runner = Callable[[Tensor], Any]


class Case(NamedTuple):
    """One model, batch and number of threads."""

    width: float
    resolution: int
    batch: int
    threads: int

    @property
    def name(self) -> str:
        return f"{self.width}_{self.resolution} batch {self.batch}, {self.threads} thread{'s' * (self.threads > 1)}"


def make_models(width: float) -> tuple[mbv2.MobileNetV2, nn.Module]:
    """Our model with random weights and statistics, and torchvision's with the same."""
    import torchvision

    torch.manual_seed(0)
    ours = mbv2.MobileNetV2(1000, width).eval()
    for module in ours.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    theirs = torchvision.models.mobilenet_v2(width_mult=width).eval()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def export_onnx(model: nn.Module, x: Tensor, folder: str) -> str:
    path = str(Path(folder) / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False, external_data=False)
    return path


def ours(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    return mbv2.optimize_for_inference(models[0])


def eager_nchw(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    return models[1]


def eager_channels_last(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    last = copy.deepcopy(models[1]).to(memory_format=torch.channels_last)
    pictures = x.to(memory_format=torch.channels_last)
    return lambda _: last(pictures)


def compiled(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    torch._dynamo.reset()
    return torch.compile(models[1])


def frozen(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.optimize_for_inference(torch.jit.freeze(torch.jit.trace(models[1], x)))


def onnx_runtime(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = case.threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(export_onnx(models[1], x, folder), options, ["CPUExecutionProvider"])
    name, pictures = session.get_inputs()[0].name, x.numpy()
    return lambda _: session.run(None, {name: pictures})[0]


def openvino(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    return openvino_runner(models[1], case, x, "f32")


def openvino_runner(model: nn.Module, case: Case, x: Tensor, precision: str) -> Runner:
    """OpenVINO on `model`, computing in `precision` as it names it: f32 or bf16."""
    import openvino

    converted = openvino.convert_model(model, example_input=x, input=[tuple(x.shape)])
    config = {
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(converted, "CPU", config).create_infer_request()
    pictures = openvino.Tensor(x.numpy(), shared_memory=True)

    def run(_: Tensor) -> Any:
        return next(iter(request.infer([pictures], share_inputs=True, share_outputs=True).values()))

    return run


def litert(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    from bench import tflite
    from mbv2.optimized import block_shapes, fold

    sizes = [case.resolution >> halvings for halvings in range(5)]
    if any(size % 2 for size in sizes):
        raise ValueError(f"{case.resolution} pixels cannot be halved five times, as the .tflite writer needs")
    path = Path(folder) / "model.tflite"
    tflite.write(path, fold(models[0]), block_shapes(models[0]), (case.batch, case.resolution, case.resolution))
    interpreter = Interpreter(str(path), num_threads=case.threads)
    interpreter.allocate_tensors()
    place, result = (
        details()[0]["index"] for details in (interpreter.get_input_details, interpreter.get_output_details)
    )
    interpreter.set_tensor(place, x.flip(2, 3).permute(0, 2, 3, 1).contiguous().numpy())

    def run(_: Tensor) -> Any:
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return run


RUNNERS: dict[str, Callable[..., Runner]] = {
    "mbv2": ours,
    "LiteRT": litert,
    "OpenVINO f32": openvino,
    "ONNX Runtime": onnx_runtime,
    "torch.jit freeze": frozen,
    "torch.compile": compiled,
    "eager NCHW": eager_nchw,
    "eager channels_last": eager_channels_last,
}
