"""Inference on a CPU against what else runs MobileNetV2 there: one table, JSON and a picture.

python -m bench.cpu --models 1.0_224 --batches 1 32 --threads 1 2 --out results/cpu

Every runner gets the same weights and its logits are compared with the model's before anything is timed. Timings
are interleaved: each round times every runner once, so that all see the same disturbances; minimum, median and the
90th percentile of the rounds are printed, and the share of the fused multiply-add peak measured between the
rounds. The time that the process was on a core is given beside it: on a busy machine, and with one thread, it is
the one to compare. Peers that are not installed are left out (`pip install 'mbv2[bench]'`);
LiteRT takes a float model from --tflite.
"""

import argparse
import copy
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import mbv2
from mbv2.kernels import cpu_network

Runner = Callable[[Tensor], Any]


class Case(NamedTuple):
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
    import openvino

    model = openvino.convert_model(models[1], example_input=x, input=[tuple(x.shape)])
    config = {
        "INFERENCE_NUM_THREADS": case.threads,
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(model, "CPU", config).create_infer_request()
    pictures = openvino.Tensor(x.numpy(), shared_memory=True)

    def run(_: Tensor) -> Any:
        return next(iter(request.infer([pictures], share_inputs=True, share_outputs=True).values()))

    return run


def litert(models: tuple[nn.Module, nn.Module], case: Case, x: Tensor, folder: str) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    path = os.environ["MBV2_BENCH_TFLITE"].format(width=case.width, resolution=case.resolution)
    interpreter = Interpreter(path, num_threads=case.threads)
    place, result = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    channels_first = place["shape"][1] == 3
    pictures = x.numpy() if channels_first else x.permute(0, 2, 3, 1).contiguous().numpy()
    interpreter.resize_tensor_input(place["index"], pictures.shape)
    interpreter.allocate_tensors()

    def run(_: Tensor) -> Any:
        interpreter.set_tensor(place["index"], pictures)
        interpreter.invoke()
        return interpreter.get_tensor(result["index"])

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


def multiply_adds(width: float, resolution: int) -> int:
    """Multiply-adds of one picture."""
    import torchvision
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        torchvision.models.mobilenet_v2(width_mult=width).eval()(torch.empty(1, 3, resolution, resolution))
    return counter.get_total_flops() // 2


def prepare(case: Case, wanted: list[str], folder: str) -> tuple[dict[str, Runner], Tensor, dict[str, str]]:
    """The runners whose logits are right, the pictures, and why the others are left out."""
    models = make_models(case.width)
    x = torch.randn(case.batch, 3, case.resolution, case.resolution)
    expected = models[1].double()(x.double())
    models[1].float()
    runners, left_out = {}, {}
    for name in wanted:
        try:
            runner = RUNNERS[name](models, case, x, folder)
            logits = torch.as_tensor(runner(x))
        except (ImportError, KeyError) as error:
            left_out[name] = f"{type(error).__name__}: {error}"
            continue
        difference = ((logits - expected).abs().max() / expected.abs().max()).item()
        if difference < 1e-4:
            runners[name] = runner
        else:
            left_out[name] = f"wrong logits (relative error {difference:.1e})"
    return runners, x, left_out


def measure(case: Case, wanted: list[str], seconds: float, folder: str) -> dict[str, Any]:
    torch.set_num_threads(case.threads)
    runners, x, left_out = prepare(case, wanted, folder)
    times: dict[str, list[float]] = {name: [] for name in runners}
    busy: dict[str, list[float]] = {name: [] for name in runners}
    peaks = []
    for runner in runners.values():
        runner(x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(peaks) < 5:
        for name, runner in runners.items():
            start, start_busy = time.perf_counter(), time.process_time()
            runner(x)
            times[name].append(time.perf_counter() - start)
            busy[name].append(time.process_time() - start_busy)
        peaks.append(torch.ops.mbv2.cpu_fma_rate(cpu_network.isa()))
    peak = max(peaks) * case.threads
    work = 2 * case.batch * multiply_adds(case.width, case.resolution)
    rows = {}
    for name, taken in times.items():
        ordered = sorted(taken)
        own = busy.get("mbv2", busy[name])
        rows[name] = {
            "min_ms": 1e3 * ordered[0],
            "median_ms": 1e3 * statistics.median(ordered),
            "p90_ms": 1e3 * ordered[int(0.9 * (len(ordered) - 1))],
            "percent_of_peak": 100 * work / ordered[0] / peak,
            "over_ours": ordered[0] / min(times.get("mbv2", ordered)),
            "cpu_min_ms": 1e3 * min(busy[name]),
            "cpu_median_ms": 1e3 * statistics.median(busy[name]),
            "cpu_over_ours": min(busy[name]) / min(own),
            "cpu_median_over_ours": statistics.median(busy[name]) / statistics.median(own),
        }
    return {
        "case": case._asdict(),
        "name": case.name,
        "rounds": len(peaks),
        "peak_gflops": peak / 1e9,
        "load": os.getloadavg()[0],
        "isa": cpu_network.isa(),
        "rows": rows,
        "left_out": left_out,
    }


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['name']}: {result['rounds']} rounds, {result['isa']}, FMA peak {result['peak_gflops']:.0f} "
        f"GFLOP/s, load {result['load']:.1f}"
    )
    columns = ("min_ms", "median_ms", "p90_ms", "percent_of_peak", "over_ours", "cpu_min_ms", "cpu_median_ms")
    columns += ("cpu_over_ours", "cpu_median_over_ours")
    heads = ("min ms", "median", "p90", "% peak", "/ours", "CPU ms", "median", "/ours", "median/ours")
    print(f"{'':<20}" + "".join(f" {head:>11}" for head in heads))
    for name, row in result["rows"].items():
        print(f"{name:<20}" + "".join(f" {row[column]:11.3f}" for column in columns))
    for name, why in result["left_out"].items():
        print(f"{name:<20} left out: {why.splitlines()[0][:90]}")
    sys.stdout.flush()


def draw(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(results), 1, figsize=(8, 2.4 * len(results)), squeeze=False)
    for axis, result in zip(axes[:, 0], results, strict=True):
        names = list(result["rows"])[::-1]
        axis.barh(names, [result["rows"][name]["min_ms"] for name in names])
        axis.set_title(f"{result['name']} (fastest round, ms)")
    figure.tight_layout()
    figure.savefig(path)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["1.0_224"], help="width_resolution")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--runners", nargs="+", default=list(RUNNERS), choices=list(RUNNERS))
    parser.add_argument("--seconds", type=float, default=20, help="for each case")
    parser.add_argument("--tflite", default="", help="float .tflite file; {width} and {resolution} are put in")
    parser.add_argument("--out", type=Path, help="file name without suffix for .json and .png")
    options = parser.parse_args()
    if options.tflite:
        os.environ["MBV2_BENCH_TFLITE"] = options.tflite
    results = []
    for model in options.models:
        width, resolution = model.split("_")
        for batch in options.batches:
            for threads in options.threads:
                case = Case(float(width), int(resolution), batch, threads)
                with tempfile.TemporaryDirectory() as folder:
                    results.append(measure(case, options.runners, options.seconds, folder))
                show(results[-1])
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
