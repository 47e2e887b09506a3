"""`mbv2 doctor`: what will be used on this machine, and why, on one screen."""

import argparse
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from typing import Any

from mbv2.errors import UserError


def examine() -> dict[str, Any]:
    """What is here and what the product will use of it; values are text, numbers, or lists and dicts of them.

    The backends are found by running two small pictures through the network on the device that would be used.
    """
    import torch

    import mbv2
    from mbv2.data import choose_loader

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    loader, why = choose_loader("auto", device)
    return {
        "mbv2": mbv2.__version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "system": platform.platform(),
        "torch": torch.__version__,
        "torchvision": _version("torchvision"),
        "device": device.type.upper(),
        "device_why": _device_why(cuda),
        "cuda": torch.version.cuda,
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "cpu": {
            "model": _cpu_model(),
            "features": torch.backends.cpu.get_cpu_capability(),
            "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
        },
        "dali": _dali_version(),
        "loader": loader,
        "loader_why": why,
        "kernels": _kernels(device),
    }


def main(argv: Sequence[str]) -> int:
    """Print the report, or with --json the same as an object.

    Raises:
        UserError: an unknown option.
    """
    parser = argparse.ArgumentParser(prog="mbv2 doctor", description=__doc__)
    parser.add_argument("--json", action="store_true", help="as JSON on stdout")
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"unrecognized arguments: {' '.join(unknown)} (see mbv2 doctor --help)")
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = _rows(found)
    if sys.stdout.isatty():
        _print_table(rows)
    else:
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"{name:<{width}}  {text}")
    return 0


def _rows(found: dict[str, Any]) -> list[tuple[str, str]]:
    cpu, kernels = found["cpu"], found["kernels"]
    calls = ", ".join(f"{name} x{count}" for name, count in kernels["calls"].items())
    return [
        ("mbv2", found["mbv2"]),
        ("python", found["python"]),
        ("system", found["system"]),
        ("torch", f"{found['torch']}, torchvision {found['torchvision'] or 'not installed'}"),
        ("device", f"{found['device']}: {found['device_why']}"),
        ("CUDA", f"{found['cuda'] or 'torch is built without it'}"),
        *[(f"GPU {number}", gpu) for number, gpu in enumerate(found["gpus"])],
        (
            "CPU",
            f"{cpu['model']}, {cpu['features']}, {cpu['cores_usable']} cores usable, {cpu['torch_threads']} threads",
        ),
        ("DALI", found["dali"] or "not installed (pip install 'mbv2[dali]')"),
        ("loader", f"{found['loader']}: {found['loader_why']}"),
        ("extension", kernels["extension"]),
        ("extension (GPU)", kernels["extension_gpu"]),
        ("kernels", f"{', '.join(kernels['used']) or 'none'}: {kernels['why']}"),
        ("calls", calls or "none"),
        *[("FAILED CHECK", f"{stage}: {why}; plain torch runs it") for stage, why in kernels["failed_checks"].items()],
    ]


def _print_table(rows: list[tuple[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(name, Text(text))
    Console().print(table)


def _kernels(device: Any) -> dict[str, Any]:
    """Which backend serves each operator on `device`, told from the counters of one inference and one training step."""
    import torch

    from mbv2 import kernels
    from mbv2.kernels.cuda import support
    from mbv2.model import MobileNetV2

    model = MobileNetV2(10, 0.35).to(device, memory_format=torch.channels_last)
    before = kernels.report()["calls"]
    pictures = torch.zeros(2, 3, 32, 32, device=device)
    try:
        with torch.no_grad():
            model.eval()(pictures)
        model.train()(pictures).sum().backward()
    except kernels.BackendError as error:
        after, why = kernels.report(), str(error)
    else:
        after, why = kernels.report(), ""
    calls = {name: count - before.get(name, 0) for name, count in after["calls"].items()}
    calls = {name: count for name, count in calls.items() if count}
    used = sorted({name.rsplit("/", 1)[1] for name in calls})
    if not why and after["asked"] != "auto":
        why = f"asked for by MBV2_BACKEND={after['asked']}"
    elif not why:
        why = f"the first of {', '.join(after['available'])} that takes the call"
        if after["available"] == ["aten"]:
            why = "the only backend of this build (plain torch operators)"
    return {
        "used": used,
        "why": why,
        "available": after["available"],
        "asked": after["asked"],
        "calls": calls,
        "failed_checks": after["failed_checks"],
        "extension": f"mbv2._C, for mbv2.optimize_for_inference, eval and infer on a CPU: {after['cpu_network']}",
        "extension_gpu": f"mbv2._cuda, the CUDA C++ kernels: {support.missing() or 'compiled'}",
    }


def _device_why(cuda: bool) -> str:
    import torch

    if cuda:
        return f"torch sees {torch.cuda.device_count()} GPU(s)"
    if torch.version.cuda is None:
        return "this torch is built for the CPU only"
    return f"torch is built for CUDA {torch.version.cuda} but sees no GPU or driver"


def _gpu(index: int) -> str:
    import torch

    properties = torch.cuda.get_device_properties(index)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, {memory:.0f} GiB, compute capability {properties.major}.{properties.minor}"


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        return platform.processor() or platform.machine()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _dali_version() -> str | None:
    for distribution in importlib.metadata.packages_distributions().get("nvidia", []):
        if distribution.lower().startswith("nvidia-dali"):
            return f"{_version(distribution)} ({distribution})"
    return None
