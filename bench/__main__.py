"""`python -m bench BENCH [options]`: the benchmarks, and pictures and tables of their results."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from mbv2.cli import run_guarded
from mbv2.errors import UserError

# Benchmark -> (module with `main(argv)`, what it says). Imported when asked for.
BENCHES = {
    "kernels": ("bench.kernels", "every operator, forward and backward, by each backend"),
    "model": ("bench.model", "inference of whole networks against torchvision, torch.compile and other runtimes"),
    "train": ("bench.train", "a training step against torchvision"),
    "accelerate": ("bench.accelerate", "torchvision's, timm's and Hugging Face's network as it is and accelerated"),
    "cpu": ("bench.cpu", "inference on a CPU against other runtimes, by variant, batch and threads"),
    "cpu_parts": ("bench.cpu_parts", "our network on a CPU part by part: share of the peak, GFLOP/s, GB/s"),
    "cpu_scaling": ("bench.cpu_scaling", "what a picture costs on a CPU as batches and pictures grow; odd shapes"),
    "cpu_bfloat16": ("bench.cpu_bfloat16", "inference in bfloat16 on a CPU against other runtimes"),
    "cpu_int8": ("bench.cpu_int8", "inference in int8 on a CPU against other runtimes"),
    "cpu_training": ("bench.cpu_training", "training steps on a CPU, with the saved memory, against torchvision's"),
    "cpu_blocks": ("bench.cpu_blocks", "single blocks' training steps on a CPU, down to a few positions"),
    "loader": ("bench.loader", "our loaders against torchvision's ImageFolder, on JPEG files"),
    "memory": ("bench.memory", "what training saves for the backward pass, and the peak of a step"),
    "cold": ("bench.cold_start", "a fresh process until its first logits, beyond importing torch"),
    "roofline": ("bench.roofline", "every GPU kernel against the roofline"),
    "accuracy": ("bench.accuracy", "published and measured top-1 of the 22 variants, and accuracy against latency"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, `plot` or `show`; 0 when it went well, 2 for what the user can put right."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0 if argv else 2
    return run_guarded(lambda: _run(argv[0], argv[1:]))


def _run(name: str, argv: list[str]) -> int:
    if name == "plot":
        return plot(argv)
    if name == "show":
        return show(argv)
    if name not in BENCHES:
        raise UserError(f"no benchmark {name!r}; choose {', '.join(BENCHES)}, plot or show")
    module = BENCHES[name][0]
    if importlib.util.find_spec(module) is None:
        raise UserError(f"this checkout has no {module.replace('.', '/')}.py, so {name!r} cannot run here")
    try:
        code = importlib.import_module(module).main(argv)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}, which is not installed: pip install 'mbv2[bench]'") from error
    return code or 0


def plot(argv: Sequence[str]) -> int:
    """Draw the pictures of result files again, each beside its file."""
    from bench import plots, schema

    if not argv:
        raise UserError("plot: give the JSON files of results")
    for name in argv:
        for png in plots.draw(schema.read(name), Path(name)):
            print(png)
    return 0


def show(argv: Sequence[str]) -> int:
    """Print the tables of result files; with --markdown as the docs have them."""
    from bench import schema, tables

    files = [name for name in argv if name != "--markdown"]
    if not files:
        raise UserError("show: give the JSON files of results")
    for name in files:
        result = schema.read(name)
        if result.bench not in BENCHES:
            raise UserError(f"{name}: no table is known for a result of {result.bench!r}")
        columns = importlib.import_module(BENCHES[result.bench][0]).COLUMNS
        print((tables.markdown if "--markdown" in argv else tables.text)(result, columns))
    return 0


def usage() -> str:
    """What there is."""
    lines = ["usage: python -m bench BENCH [options]", ""]
    lines += [f"  {name:<12} {about}" for name, (_, about) in BENCHES.items()]
    lines += [
        "",
        "  plot FILE.json ...               draw a result's pictures again",
        "  show [--markdown] FILE.json ...  print a result's table again",
        "",
        "`python -m bench BENCH --help` lists a benchmark's options. Peers to compare with: pip install 'mbv2[bench]'.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
