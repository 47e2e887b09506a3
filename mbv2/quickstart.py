"""`make quickstart`: draw pictures, train through torchrun, evaluate, run on some pictures, say where it all is.

Every step is the command a user would type, run as its own process and shown before it runs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mbv2.errors import UserError
from mbv2.files import fresh_dir

_PICTURES = 12


@dataclass(frozen=True)
class QuickstartOptions:
    """What the quickstart trains; the defaults suit the drawn pictures and two processor cores.

    Attributes:
        data_url: the user's data set folder; empty: pictures are drawn.
        output: folder for everything written; a fresh sibling is taken when it exists.
        alpha, resize, epochs, batch_size, max_lr: as in training; `batch_size` counts all processes together.
        seed: for the drawn pictures and the training.
    """

    data_url: str = ""
    output: str = "runs/quickstart"
    alpha: float = 0.35
    resize: int = 96
    epochs: int = 22
    batch_size: int = 16
    max_lr: float = 0.02
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Where a finished quickstart left its results, its accuracies (0 to 1), and the seconds it took."""

    folder: Path
    top1: float
    top5: float
    seconds: float

    @property
    def files(self) -> dict[str, Path]:
        """What a reader wants to open, by what it is."""
        training = self.folder / "training"
        return {
            "metrics by epoch": training / "metrics.csv",
            "evaluation": self.folder / "evaluation.json",
            "loss and accuracy curves": training / "curves.png",
            "annotated pictures": self.folder / "annotated",
            "weights of the best epoch": training / "best.safetensors",
            "checkpoints": training / "checkpoints",
        }


def process_plan(gpus: int, cores: int) -> tuple[int, int]:
    """(processes, threads in each): one process per GPU, or one process when there is none.

    Half the cores are left to the loader's workers: at so small a batch a second thread gains less in the
    operators than decoding needs, and much is lost when the threads wait for a core.
    """
    processes = max(1, gpus)
    return processes, max(1, cores // (2 * processes))


def train_command(options: QuickstartOptions, data: Path, folder: Path, processes: int) -> list[str]:
    """The torchrun command line of the training step."""
    training = {
        "data_url": data,
        "ckpt_save_dir": folder,
        "alpha": options.alpha,
        "resize": options.resize,
        "epoch_size": options.epochs,
        "decay_epoch": options.epochs,
        "warmup_epochs": min(2, options.epochs - 1),
        "batch_size": max(1, options.batch_size // processes),
        "max_lr": options.max_lr,
        "smooth_factor": 0.05,
        "dropout": 0.0,
        "num_parallel_workers": 1,
        "keep_checkpoint_max": 2,
        "log_interval": 60,
        "seed": options.seed,
        # The usual 8 % crops would often miss a small shape.
        "augment.area_min": 0.7,
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return [*torchrun, "-m", "mbv2.train", *(f"--{key}={value}" for key, value in training.items())]


def quickstart(options: QuickstartOptions) -> Result:
    """Run all steps; progress goes to stderr, the classes found in the pictures to stdout.

    Raises:
        UserError: the data cannot be used, or a step failed (it has said why).
    """
    started = time.perf_counter()
    if options.data_url and not Path(options.data_url).is_dir():
        raise UserError(f"{options.data_url} is no folder; give one with train/<class>/ and val/<class>/ pictures")
    folder = fresh_dir(options.output)
    data = Path(options.data_url) if options.data_url else _draw(folder / "data", options.seed)
    samples = _pick_pictures(data, folder / "pictures")

    from torch import cuda

    processes, threads = process_plan(cuda.device_count(), len(os.sched_getaffinity(0)))
    weights = folder / "training" / "best.safetensors"
    model = [f"--alpha={options.alpha}", f"--resize={options.resize}", f"--pretrained={weights}"]
    mbv2 = [sys.executable, "-m", "mbv2"]
    _step(
        f"training on {data}, processes: {processes}, threads in each: {threads}",
        train_command(options, data, folder / "training", processes),
        threads,
    )
    _step(
        "evaluating the best epoch on the validation split",
        [*mbv2, "eval", *model, f"--data_url={data}", f"--json={folder / 'evaluation.json'}"],
        threads * processes,
    )
    _step(
        f"running it on {samples} validation pictures",
        [*mbv2, "infer", *model, f"--data_url={folder / 'pictures'}", f"--output={folder / 'annotated'}"],
        threads * processes,
    )
    scores = json.loads((folder / "evaluation.json").read_text())
    return Result(folder, scores["Top_1_Accuracy"], scores["Top_5_Accuracy"], seconds=time.perf_counter() - started)


def summary(result: Result) -> str:
    """The closing table: accuracy, time, and what lies where."""
    rows = {
        "validation top-1": f"{100 * result.top1:.2f} %",
        "validation top-5": f"{100 * result.top5:.2f} %",
        "took": f"{result.seconds:.0f} s",
        **{name: str(path) for name, path in result.files.items()},
    }
    width = max(map(len, rows))
    rule = "-" * (width + 2 + max(map(len, rows.values())))
    return "\n".join([rule, *(f"{name:<{width}}  {value}" for name, value in rows.items()), rule])


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 for something the user can put right."""
    defaults = QuickstartOptions()
    parser = argparse.ArgumentParser(prog="mbv2 quickstart", description=(__doc__ or "").split("\n")[0])
    for name, text in {
        "data_url": "your data set: train/<class>/ and val/<class>/ (default: pictures are drawn)",
        "output": "folder for everything written; a fresh sibling when it exists",
        "alpha": "width multiplier",
        "resize": "side of the network's input, in pixels",
        "epochs": "passes over the training pictures",
        "batch_size": "pictures in a step, all processes together",
        "max_lr": "highest learning rate",
        "seed": "for the drawn pictures and the training",
    }.items():
        default = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} [%(default)s]")
    try:
        options = QuickstartOptions(**vars(parser.parse_args(argv)))
        if options.epochs < 1 or options.batch_size < 1:
            raise UserError("--epochs and --batch_size must be at least 1")
        result = quickstart(options)
    except UserError as error:
        print(f"mbv2: error: {error}", file=sys.stderr)
        return 2
    print(summary(result))
    return 0


def _draw(folder: Path, seed: int) -> Path:
    from mbv2.shapes import CLASS_NAMES, ShapesSpec, draw_shapes

    spec = ShapesSpec(seed=seed)
    total = len(CLASS_NAMES) * (spec.train_per_class + spec.val_per_class)
    _say(f"drawing {total} pictures of {len(CLASS_NAMES)} shapes into {folder}")
    return draw_shapes(folder, spec)


def _pick_pictures(data: Path, folder: Path) -> int:
    """Copy up to a dozen validation pictures, evenly spread over the classes, and return how many."""
    from mbv2.data.sources import open_source

    classes = open_source(str(data), "train").class_names
    source = open_source(str(data), "val", class_names=classes)
    samples = source.samples
    folder.mkdir()
    count = min(_PICTURES, len(samples))
    for number in range(count):
        sample = samples[(2 * number + 1) * len(samples) // (2 * count)]
        name = f"{number:02d}-{Path(sample.name).name}"
        (folder / name).write_bytes(source.read(sample))
    return count


def _say(text: str) -> None:
    print(f"\n== {text}", file=sys.stderr, flush=True)


def _step(title: str, command: list[str], threads: int) -> None:
    """Show and run one command; its output goes where ours goes.

    Raises:
        UserError: it failed.
    """
    _say(title)
    print(shlex.join(["python", *command[1:]]), file=sys.stderr, flush=True)
    code = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, check=False).returncode
    if code != 0:
        raise UserError(f"{title}: the command above ended with exit code {code}; its own message says why")


if __name__ == "__main__":
    sys.exit(main())
