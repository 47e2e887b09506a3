"""The whole network on a GPU: training steps and inference, against torchvision (cuDNN), torch.compile and TensorRT.

    python -m bench.gpu_model --out folder [--batch 256] [--dry-run]

Writes model.json and model.md. Everybody runs channels_last under autocast to float16 with the same weights; inference
is checked against torchvision in float32 before it is timed. What cannot run here is named with the reason. --dry-run:
on the CPU, a narrow network on tiny pictures, bfloat16, nothing compiled.
"""

import argparse
import importlib.util
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

import mbv2
from bench import gpu_timing
from mbv2.errors import UserError
from mbv2.files import write_atomic

# Of logits, against torchvision's in float32; two correct 16-bit networks differ by a fraction of it.
MOST_ERROR = 0.05


def networks(device: torch.device) -> tuple[nn.Module, nn.Module]:
    """torchvision's and our network with the same random weights: of full width, on a CPU the narrow one."""
    torch.manual_seed(0)
    peer = torchvision.models.mobilenet_v2(weights=None, width_mult=0.35 if device.type == "cpu" else 1.0)
    ours = mbv2.create_model("mobilenet_v2_0.35_96" if device.type == "cpu" else "mobilenet_v2_1.0_224")
    ours.load_state_dict(peer.state_dict())
    return tuple(net.to(device, memory_format=torch.channels_last) for net in (peer, ours))


def inference(x: Tensor, dtype: torch.dtype, dry_run: bool) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Ways to predict x, and those that are not here."""
    peer, ours = (net.eval() for net in networks(x.device))

    def run(net: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def predict() -> Tensor:
            with torch.inference_mode(), torch.autocast(x.device.type, dtype):
                return net(x)

        return predict

    ways, left_out = {"torchvision": run(peer), "mbv2": run(ours)}, {}
    if dry_run:
        left_out |= dict.fromkeys(("torch.compile", "torch.compile max-autotune", "CUDA graph", "TensorRT"), "dry run")
        return ways, left_out
    ways["torchvision torch.compile"] = run(torch.compile(peer))
    ways["torchvision torch.compile max-autotune"] = run(torch.compile(peer, mode="max-autotune"))
    for name, net in (("torchvision", peer), ("mbv2", ours)):
        _add(ways, left_out, f"{name} CUDA graph", lambda net=net: _captured(run(net)))
    if importlib.util.find_spec("torch_tensorrt") is None:
        left_out["TensorRT"] = "torch_tensorrt is not installed"
    else:
        _add(ways, left_out, "torchvision TensorRT", lambda: run(_tensorrt(peer, x, dtype)))
    return ways, left_out


def training(x: Tensor, dtype: torch.dtype, dry_run: bool) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """Ways to make a training step (SGD, cross-entropy) on x, and those that are not here."""
    labels = torch.arange(x.shape[0], device=x.device) % 1000

    def step(net: nn.Module, call: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=0.9)

        def make() -> Tensor:
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast(x.device.type, dtype):
                loss = nn.functional.cross_entropy(call(x), labels)
            loss.backward()
            optimizer.step()
            return loss

        return make

    def fresh(which: int, **options: Any) -> Callable[[], Tensor]:
        net = networks(x.device)[which].train()
        return step(net, torch.compile(net, **options) if options else net)

    ways = {"torchvision": fresh(0), "mbv2": fresh(1)}
    if dry_run:
        return ways, dict.fromkeys(("torch.compile", "torch.compile max-autotune"), "dry run")
    ways["torchvision torch.compile"] = fresh(0, mode="default")
    ways["torchvision torch.compile max-autotune"] = fresh(0, mode="max-autotune")
    ways["mbv2 torch.compile"] = fresh(1, mode="default")
    return ways, {}


def measure(
    ways: dict[str, Callable[[], Tensor]], exact: Tensor | None, batch: int, device: torch.device, runs: int
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """A row for each way whose result is finite and, if `exact` is given, near it; the others with the reason."""
    rows, left_out = [], {}
    for name, run in ways.items():
        try:
            result = run().float()
            error = float("nan") if exact is None else float((result - exact).norm() / exact.norm())
            if not torch.isfinite(result).all() or (exact is not None and not error <= MOST_ERROR):
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
    for phase in ("inference", "training"):
        for batch, part in document[phase].items():
            lines += [f"## {phase}, batch {batch}", "", "| way | ms | images/s |", "|---|---|---|"]
            lines += [f"| {r['way']} | {1e3 * r['median_s']:.3f} | {r['images_per_s']:.0f} |" for r in part["rows"]]
            lines += ["", *(f"* not timed: {name}: {reason}" for name, reason in part["left_out"].items()), ""]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_model", description="time the whole network on a GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder for model.json and model.md")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args(argv)
    device = torch.device("cpu" if options.dry_run else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("torch sees no GPU here; rehearse with --dry-run")
    dtype = torch.bfloat16 if options.dry_run else torch.float16
    side, runs = (32, 2) if options.dry_run else (224, gpu_timing.RUNS)
    document: dict[str, Any] = {
        "bench": "gpu_model", "dry_run": options.dry_run, "machine": gpu_timing.machine(device),
        "settings": {"resolution": side, "dtype": str(dtype)}, "inference": {}, "training": {},
    }  # fmt: skip
    for batch in (2,) if options.dry_run else (1, 8, 64, options.batch):
        x = torch.randn(batch, 3, side, side, device=device).to(memory_format=torch.channels_last)
        with torch.inference_mode():
            exact = networks(device)[0].eval()(x)
        ways, missing = inference(x, dtype, options.dry_run)
        rows, left_out = measure(ways, exact, batch, device, runs)
        document["inference"][str(batch)] = {"rows": rows, "left_out": missing | left_out}
        if batch == (2 if options.dry_run else options.batch):
            ways, missing = training(x, dtype, options.dry_run)
            rows, left_out = measure(ways, None, batch, device, runs)
            document["training"][str(batch)] = {"rows": rows, "left_out": missing | left_out}
    options.out.mkdir(parents=True, exist_ok=True)
    write_atomic(options.out / "model.json", (json.dumps(document, indent=1) + "\n").encode())
    write_atomic(options.out / "model.md", as_markdown(document).encode())
    return 0


def _add(ways: dict[str, Any], left_out: dict[str, str], name: str, make: Callable[[], Any]) -> None:
    try:
        ways[name] = make()
    except Exception as failure:  # as in measure
        left_out[name] = f"failed: {type(failure).__name__}: {failure}"


def _captured(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
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


def _tensorrt(net: nn.Module, x: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    import torch_tensorrt

    return torch_tensorrt.compile(net, ir="dynamo", inputs=[x], enabled_precisions={dtype, torch.float32})


if __name__ == "__main__":
    from mbv2.cli import run_guarded

    sys.exit(run_guarded(main))
