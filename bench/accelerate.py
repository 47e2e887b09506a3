"""`python -m bench accelerate`: others' mobilenet_v2 as it is, and after `mbv2.accelerate`.

torchvision's, timm's and Hugging Face's network, with random weights, in inference and in a training step (forward,
loss, backward, SGD), in both of torch's layouts. First the logits, or the loss and gradients of one step, must be as
near to those in float64 as the network's own are; dropout is off so that this can be asked. For it BatchNorms of
training networks keep values between the bends of ReLU6, as one rounding past a bend changes gradients by a percent.
With --dtype bfloat16 or float16 everything runs under autocast.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

import mbv2
from bench import check, report, schema, timing
from bench.kernels import DTYPES
from bench.tables import Column
from bench.train import CHECKED_BATCH, ROUNDINGS, Step, batch_of
from mbv2.progress import Progress

INFERENCE, TRAINING = "inference", "training step"
LAYOUTS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
AS_IT_IS, ACCELERATED = "as it is", "mbv2.accelerate"
BASELINE = f"{AS_IT_IS}, NCHW"
COLUMNS = (
    Column("model", "model"),
    Column("batch", "batch"),
    Column("runner", "runner"),
    Column("median_ms", "median ms", ".1f"),
    Column("p25_ms", "p25", ".1f"),
    Column("p75_ms", "p75", ".1f"),
    Column("cpu_median_ms", "on cores", ".1f"),
    Column("images_per_s", "images/s", ".1f"),
    Column("faster", "x as it is", ".2f"),
    Column("faster_low", "p25", ".2f"),
    Column("faster_high", "p75", ".2f"),
    Column("error", "error", ".1e"),
)


def _torchvision(width: float, resolution: int) -> nn.Module:
    import torchvision

    return torchvision.models.mobilenet_v2(width_mult=width, dropout=0.0)


def _timm(width: float, resolution: int) -> nn.Module:
    import timm

    return timm.create_model(f"mobilenetv2_{round(100 * width):03}")


class _Logits(nn.Module):
    """Hugging Face's network with logits for a result."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x).logits


def _hugging_face(width: float, resolution: int) -> nn.Module:
    import transformers

    config = transformers.MobileNetV2Config(
        num_labels=1000, depth_multiplier=width, image_size=resolution, classifier_dropout_prob=0.0
    )
    return _Logits(transformers.MobileNetV2ForImageClassification(config))


# Name -> (package, what builds its network).
PEERS: dict[str, tuple[str, Callable[[float, int], nn.Module]]] = {
    "torchvision": ("torchvision", _torchvision),
    "timm": ("timm", _timm),
    "Hugging Face": ("transformers", _hugging_face),
}


def runners(
    original: nn.Module, mode: str, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Step], dict[str, str]]:
    """The network as it is and accelerated, in each layout, and why some are not there."""
    autocast = None if dtype == torch.float32 else dtype
    found, left_out = {}, {}
    for layout, memory_format in LAYOUTS.items():
        for name in (AS_IT_IS, ACCELERATED):
            model = copy.deepcopy(original).to(device)
            if name == ACCELERATED and not mbv2.accelerate(model).swapped:
                left_out[f"{name}, {layout}"] = "wrong: nothing of the network was swapped"
                continue
            step = Step(model, memory_format, autocast=autocast)
            model.train(mode == TRAINING)
            found[f"{name}, {layout}"] = step
    return found, left_out


def results(step: Step, mode: str, resolution: int, dtype: torch.dtype) -> list[Tensor]:
    """Logits, or the loss and each stage's gradients as one vector; the network is as before afterwards."""
    device = next(step.model.parameters()).device
    x, labels = batch_of(CHECKED_BATCH, resolution, device, step.memory_format)
    if mode == INFERENCE:
        return [infer(step, x.to(dtype)).cpu()]
    state = copy.deepcopy(step.model.state_dict())
    for module in step.model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.constant_(module.weight, 0.4)
            nn.init.constant_(module.bias, 3.0)
    loss = step.loss(x.to(dtype), labels)
    stages: dict[str, list[Tensor]] = {}
    for name, parameter in step.model.named_parameters():
        stages.setdefault(_stage(name), []).append(parameter.grad.flatten())
    step.model.load_state_dict(state)
    return [loss.cpu(), *(torch.cat(gradients).cpu() for gradients in stages.values())]


def infer(step: Step, x: Tensor) -> Tensor:
    """The logits of pictures, in float32 or wider."""
    cast = torch.autocast(x.device.type, step.autocast) if step.autocast else nullcontext()
    with torch.inference_mode(), cast:
        logits = step.model(x)
    return logits.float() if step.autocast else logits


def _stage(name: str) -> str:
    """A parameter's name up to its first number, or else to its module: what stands for a stage in all networks.

    Not each parameter by itself: what stands before a BatchNorm has gradients that are nothing but rounding.
    """
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
    return ".".join(parts[: number + 1])


def checked(
    found: dict[str, Step], original: nn.Module, mode: str, resolution: int, dtype: torch.dtype
) -> tuple[dict[str, float], dict[str, str]]:
    """The errors of the runners that are right, and why the others are left out."""
    reference = Step(copy.deepcopy(original).double(), torch.contiguous_format)
    reference.model.train(mode == TRAINING)
    expected = results(reference, mode, resolution, torch.float64)
    errors, left_out = {}, {}
    plain = check.error(results(found[BASELINE], mode, resolution, torch.float32), expected)
    for name, step in found.items():
        error = check.error(results(step, mode, resolution, torch.float32), expected)
        wrong = check.fault(error, plain, dtype, ROUNDINGS[dtype] if mode == TRAINING else None)
        if wrong:
            left_out[name] = wrong
        else:
            errors[name] = error
    return errors, left_out


def main(argv: Sequence[str]) -> int:
    """See the module's text."""
    parser = report.parser("accelerate", __doc__.split("\n")[0], seconds=20.0)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--modes", nargs="+", choices=(INFERENCE, TRAINING), default=[INFERENCE, TRAINING])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--width", type=float, choices=(0.35, 0.5, 0.75, 1.0, 1.4), default=1.0)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="other than float32: by autocast")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU [%(default)s]")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(argv)
    device = report.device_of(options.device)
    torch.set_num_threads(options.threads)
    chosen = ("width", "resolution", "dtype", "threads", "seconds")
    settings: dict[str, Any] = {"device": device.type, **{name: getattr(options, name) for name in chosen}}
    result = schema.new("accelerate", argv, settings)
    with Progress(len(options.peers) * len(options.modes), "accelerate", "cases") as progress:
        for peer in options.peers:
            package, build = PEERS[peer]
            try:
                torch.manual_seed(0)
                original = build(options.width, options.resolution)
            except ModuleNotFoundError as error:
                result.left_out[peer] = f"{error.name} is not installed: pip install {package}"
                progress.advance(len(options.modes))
                continue
            for mode in options.modes:
                _measure(result, f"{peer}, {mode}", original, mode, options, device)
                progress.advance()
    return report.finish(result, COLUMNS, options.out)


def _measure(
    result: schema.Result, name: str, original: nn.Module, mode: str, options: Any, device: torch.device
) -> None:
    dtype = DTYPES[options.dtype]
    found, left_out = runners(original, mode, device, dtype)
    errors, wrong = checked(found, original, mode, options.resolution, dtype)
    result.left_out.update({f"{name}, {runner}": why for runner, why in {**left_out, **wrong}.items()})
    for batch in options.batches:
        runs = {runner: _run(found[runner], mode, batch, options.resolution, device) for runner in errors}
        times = timing.interleaved(runs, options.seconds, device)
        for runner, taken in times.items():
            figures = timing.summary(taken, times[BASELINE], device)
            rate = 1e3 * batch / figures["median_ms"]
            where = {"model": name, "batch": batch, "runner": runner, "baseline": BASELINE}
            result.rows.append({**where, **figures, "images_per_s": rate, "error": errors[runner]})


def _run(step: Step, mode: str, batch: int, resolution: int, device: torch.device) -> Callable[[], object]:
    x, labels = batch_of(batch, resolution, device, step.memory_format)
    return (lambda: step(x, labels)) if mode == TRAINING else (lambda: infer(step, x))
