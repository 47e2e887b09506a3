"""Pictures of results: each is drawn from its JSON alone, so `python -m bench plot FILE.json` draws it again."""

import importlib
import io
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

from bench.schema import Result, place
from mbv2.errors import UserError
from mbv2.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, PEER, BASE = "#d9622b", "#3b6fb6", "#9aa5b1"
INK, FAINT = "#333333", "#dddddd"
# Benchmark -> module with `figures(result)`, which gives every picture by what is put after the file's name.
_DRAWN_BY = {
    "kernels": "bench.plots_speed",
    "model": "bench.plots_speed",
    "train": "bench.plots_speed",
    "accelerate": "bench.plots_speed",
    "cpu_training": "bench.plots_speed",
    "cpu_bfloat16": "bench.plots_speed",
    "cpu_int8": "bench.plots_speed",
    "cpu": "bench.plots_cpu",
    "cpu_parts": "bench.plots_cpu",
    "cpu_scaling": "bench.plots_cpu",
    "cpu_blocks": "bench.plots_cpu",
    "loader": "bench.plots_speed",
    "memory": "bench.plots_speed",
    "cold": "bench.plots_speed",
    "accuracy": "bench.plots_accuracy",
}


def draw(result: Result, json: Path) -> list[Path]:
    """Write the result's pictures beside its JSON file and return their paths.

    Raises:
        UserError: a benchmark that has no picture, or a file that cannot be written.
    """
    module = _DRAWN_BY.get(result.bench)
    if module is None:
        raise UserError(f"{json}: a result of {result.bench!r} has no picture (those of {', '.join(_DRAWN_BY)} have)")
    written = []
    for suffix, figure in importlib.import_module(module).figures(result).items():
        written.append(json.with_name(f"{json.name.removesuffix('.json')}{suffix}.png"))
        save(figure, written[-1])
    return written


def new(width: float, height: float, rows: int = 1, columns: int = 1) -> "tuple[Figure, list[Axes]]":
    """A figure in inches with its axes in reading order; pyplot's global state stays untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.set_axisbelow(True)
    return figure, list(axes.flat)


def footnote(figure: "Figure", result: Result, text: str = "") -> None:
    """Where and when, and `text`, in small print below the picture."""
    letters = int(17 * figure.get_figwidth())
    lines = [line for part in (text, place(result), result.command) for line in textwrap.wrap(part, letters)]
    figure.supxlabel("\n".join(lines), fontsize=7, color=INK, x=0.01, ha="left")


def save(figure: "Figure", png: Path) -> None:
    """Write as PNG of few colours, which are enough and a quarter of the bytes, whole or not at all.

    Raises:
        UserError: what the file system refused.
    """
    from PIL import Image

    drawn, buffer = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", metadata={"Software": None})
    Image.open(drawn).convert("RGB").quantize(96).save(buffer, format="png", optimize=True)
    try:
        write_atomic(png, buffer.getvalue())
    except OSError as error:
        raise UserError(f"{png}: cannot be written ({error.strerror})") from error
