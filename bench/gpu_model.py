"""The whole network on a GPU: training steps and inference, against torchvision (cuDNN), torch.compile and TensorRT.

    python -m bench.gpu_model --out folder [--batch 256] [--dtype float16 bfloat16 float32] [--dry-run]

Writes model.json and model.md. Everybody runs channels_last with the same weights, whose BatchNorm statistics are of
random pictures: with those of a new network activations would fade below float16. Inference converts the weights once,
and is checked against torchvision in float32 before it is timed; training runs under autocast. torch computes float32
without tf32. What cannot run here is named with the reason; the exit status is 1 where it is our own network.
--dry-run: on the CPU, a narrow network on tiny pictures, bfloat16, nothing compiled, our networks' kernels through
their PTX.
"""

import argparse
import copy
import importlib.util
import itertools
import json
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import mbv2
from bench import gpu_rehearsal, gpu_timing
from bench.gpu_kernels import DTYPES
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.kernels import dispatch
from mbv2.optimized_cuda import OptimizedCudaMobileNetV2

# Of logits, against torchvision's in float32; two correct networks differ by a fraction of it.
MOST_ERROR = {torch.float16: 0.05, torch.bfloat16: 0.2, torch.float32: 1e-3}
# Pictures that BatchNorm's statistics are taken from.
CALIBRATION = 32
Way = Callable[[], Tensor]


def networks(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """torchvision's and our network with the same random weights: of full width, on a CPU the narrow one."""
    torch.manual_seed(0)
    peer = torchvision.models.mobilenet_v2(weights=None, width_mult=0.35 if device.type == "cpu" else 1.0)
    peer.to(device, memory_format=torch.channels_last)
    norms = [module for module in peer.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
        peer.train()(torch.randn(CALIBRATION, 3, *[64 if device.type == "cpu" else 224] * 2, device=device))
        for norm in norms:
            norm.momentum = 0.1
    ours = mbv2.create_model("mobilenet_v2_0.35_96" if device.type == "cpu" else "mobilenet_v2_1.0_224")
    ours.load_state_dict(peer.state_dict())
    return peer, ours.to(device, memory_format=torch.channels_last)


def folded(peer: nn.Module) -> nn.Module:
    """torchvision's network in evaluation mode with every BatchNorm in the convolution before it."""
    net = copy.deepcopy(peer).eval()
    for module in list(net.modules()):
        if isinstance(module, nn.Sequential):
            for name, after in itertools.pairwise(list(module._modules)):
                conv, norm = module._modules[name], module._modules[after]
                if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                    module._modules[name] = fuse_conv_bn_eval(conv, norm)
                    module._modules[after] = nn.Identity()
    return net.to(memory_format=torch.channels_last)


def inference(
    peer: nn.Module, ours: nn.Module, x: Tensor, dtype: torch.dtype, dry_run: bool
) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways to predict x in `dtype`, and those that are not here."""
    x = x.to(dtype)
    ways: dict[str, Way] = {}
    left_out: dict[str, str] = {}

    def run(net: Callable[[Tensor], Tensor]) -> Way:
        def predict() -> Tensor:
            with torch.inference_mode():
                return net(x)

        return predict

    # channels_last stays what it is through a conversion.
    plain, whole = copy.deepcopy(peer).eval().to(dtype), folded(peer).to(dtype)
    operators = copy.deepcopy(ours).eval().to(dtype)
    optimized = OptimizedCudaMobileNetV2(operators)
    ways["torchvision"] = run(plain)
    ways["torchvision, BatchNorm folded"] = run(whole)
    ways["mbv2 operators"] = run(operators)
    ways["mbv2 optimized"] = run(optimized)
    if dry_run:
        left_out |= dict.fromkeys(("torch.compile", "torch.compile max-autotune", "CUDA graph", "TensorRT"), "dry run")
        return ways, left_out
    # Shapes of an earlier batch would make the later ones dynamic, and too many of them end compilation.
    torch.compiler.reset()
    ways["folded torch.compile"] = run(torch.compile(whole, dynamic=False))
    ways["folded torch.compile max-autotune"] = run(torch.compile(whole, dynamic=False, mode="max-autotune"))
    ways["mbv2 optimized torch.compile"] = run(torch.compile(optimized, dynamic=False))
    for name, net in (("torchvision, BatchNorm folded", whole), ("mbv2 optimized", optimized)):
        _add(ways, left_out, f"{name}, CUDA graph", lambda net=net: _captured(run(net)))
    if importlib.util.find_spec("torch_tensorrt") is None:
        left_out["TensorRT"] = "torch_tensorrt is not installed"
    else:
        _add(ways, left_out, "TensorRT", lambda: run(_tensorrt(whole, x)))
    return ways, left_out


def training(
    peer: nn.Module, ours: nn.Module, x: Tensor, dtype: torch.dtype, dry_run: bool
) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways to make a training step (SGD, cross-entropy) on x, and those that are not here."""
    labels = torch.arange(x.shape[0], device=x.device) % 1000

    def step(net: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def make() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
                loss = nn.functional.cross_entropy(call(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        return make

    def fresh(model: nn.Module, mode: str | None = None) -> Way:
        net = copy.deepcopy(model).train()
        return step(net, net if mode is None else torch.compile(net, dynamic=False, mode=mode))

    ways = {"torchvision": fresh(peer), "mbv2": fresh(ours)}
    if dry_run:
        return ways, dict.fromkeys(("torch.compile", "torch.compile max-autotune"), "dry run")
    torch.compiler.reset()
    ways["torchvision torch.compile"] = fresh(peer, "default")
    ways["torchvision torch.compile max-autotune"] = fresh(peer, "max-autotune")
    ways["mbv2 torch.compile"] = fresh(ours, "default")
    return ways, {}


def measure(
    ways: dict[str, Way], exact: Tensor | None, batch: int, dtype: torch.dtype, device: torch.device, runs: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each way whose result is finite and, if `exact` is given, near it; the others with the reason."""
    rows, left_out = [], {}
    for name, run in ways.items():
        try:
            result = run().float()
            error = float("nan") if exact is None else float((result - exact).norm() / exact.norm())
            if not torch.isfinite(result).all() or (exact is not None and not error <= MOST_ERROR[dtype]):
                left_out[name] = f"wrong: error {error:.2e}"
                continue
            times = gpu_timing.seconds(run, device, runs)
        except Exception as failure:  # a compiler's errors have no common type, and the other ways are still wanted
            left_out[name] = f"failed: {type(failure).__name__}: {str(failure).splitlines()[0] if str(failure) else ''}"
            continue
        row = {"way": name, "images_per_s": batch / times["median_s"], **times}
        rows.append(row if exact is None else row | {"error": error})
        print(f"{name}: {1e3 * times['median_s']:.3f} ms", flush=True)
    return rows, left_out


def as_markdown(document: dict[str, Any]) -> str:
    """The figures as tables."""
    note = ["A REHEARSAL ON THE CPU: no time below means anything.", ""] if document["dry_run"] else []
    lines = [f"# The network on {document['machine'].get('gpu', 'the CPU')}", "", *note]
    for part in document["parts"]:
        head = f"## {part['phase']}, {part['dtype']}, batch {part['batch']}"
        lines += [head, "", "| way | ms | images/s |", "|---|---|---|"]
        lines += [f"| {r['way']} | {1e3 * r['median_s']:.3f} | {r['images_per_s']:.0f} |" for r in part["rows"]]
        lines += ["", *(f"* not timed: {name}: {reason}" for name, reason in part["left_out"].items()), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description="time the whole network on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.json and model.md")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; rehearse with --dry-run")
    gpu_timing.exact_float32()
    dtypes = ["bfloat16"] if options.dry_run else options.dtype
    side, runs = (32, 2) if options.dry_run else (224, gpu_timing.RUNS)
    batches = (2,) if options.dry_run else (*(n for n in (1, 8, 64) if n < options.batch), options.batch)
    peer, ours = networks(device)
    document: dict[str, Any] = {
        "bench": "gpu_model", "dry_run": options.dry_run, "machine": gpu_timing.machine(device),
        "settings": {"resolution": side}, "parts": [],
    }  # fmt: skip
    options.out.mkdir(parents=True, exist_ok=True)

    def note(phase: str, dtype: str, batch: int, rows: list[dict[str, Any]], left_out: dict[str, str]) -> None:
        part = {"phase": phase, "dtype": dtype, "batch": batch, "rows": rows, "left_out": left_out}
        document["parts"].append(part)
        # After every part, so that a run that is cut off leaves what it has.
        write_atomic(options.out / "model.json", (json.dumps(document, indent=1) + "\n").encode())
        write_atomic(options.out / "model.md", as_markdown(document).encode())

    for name in dtypes:
        dtype = getattr(torch, name)
        for batch in batches:
            x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
            with torch.inference_mode():
                exact = copy.deepcopy(peer).eval()(x)
            with _rehearsed() if options.dry_run else nullcontext():
                ways, missing = inference(peer, ours, x, dtype, options.dry_run)
                rows, left_out = measure(ways, exact, batch, dtype, device, runs)
            note("inference", name, batch, rows, missing | left_out)
        ways, missing = training(peer, ours, x, dtype, options.dry_run)
        rows, left_out = measure(ways, None, batch, dtype, device, runs)
        note("training", name, batch, rows, missing | left_out)
    faults = [
        f"{part['phase']} {part['dtype']} batch {part['batch']}: {name}: {reason}"
        for part in document["parts"]
        for name, reason in part["left_out"].items()
        if name.startswith("mbv2")
    ]
    print(*faults, sep="\n", end="\n" * bool(faults), file=sys.stderr)
    return 1 if faults else 0


def _rehearsed() -> Any:
    """The operators' kernels on the CPU, those in CUDA C++ where they can be compiled."""
    cuda = gpu_rehearsal.missing() is None
    stack = ExitStack()
    stack.enter_context(gpu_rehearsal.gpu(cuda))
    if cuda:
        stack.enter_context(dispatch.backend("cuda"))
    return stack


def _add(ways: dict[str, Any], left_out: dict[str, str], name: str, make: Callable[[], Any]) -> None:
    try:
        ways[name] = make()
    except Exception as failure:  # as in measure
        left_out[name] = f"failed: {type(failure).__name__}: {failure}"


def _captured(run: Way) -> Way:
    """`run` as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Tensor:
        graph.replay()
        return out

    return replay


def _tensorrt(net: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor]:
    import torch_tensorrt

    # The types are those of the weights; a set of allowed ones is refused together with that.
    return torch_tensorrt.compile(net, ir="dynamo", inputs=[x], use_explicit_typing=True)


if __name__ == "__main__":
    from mbv2.cli import run_guarded

    sys.exit(run_guarded(main))
