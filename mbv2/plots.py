"""Pictures of results: loss and accuracy curves of a run, and a confusion matrix."""

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mbv2.errors import UserError
from mbv2.files import write_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_CONFUSION_CLASSES = 60
_TRAIN, _VALIDATION, _TOP5 = "#3b6fb6", "#d9622b", "#2f9e77"
_INK, _FAINT = "#333333", "#dddddd"
_LONGEST_NAME = 24


def draw_curves(metrics_csv: Path | str, png: Path | str) -> None:
    """Draw a run's training and validation loss, and its top-1 and top-5 accuracy, by epoch.

    Args:
        metrics_csv: the run's `metrics.csv`; empty and non-finite values are left out of the curves.
        png: the picture to write, 1500 x 600 pixels.

    Raises:
        UserError: `metrics_csv` is missing or is not a metrics file.
    """
    rows = _read_metrics(Path(metrics_csv))
    figure = _figure(10.0, 4.0)
    left, right = figure.subplots(1, 2)
    drawn = _curve(left, rows, "train_loss", "training", _TRAIN)
    drawn += _curve(left, rows, "val_loss", "validation", _VALIDATION)
    _style(left, "Loss", "loss", drawn)
    drawn = _curve(right, rows, "top1", "top-1", _VALIDATION, percent=True)
    drawn += _curve(right, rows, "top5", "top-5", _TOP5, percent=True)
    _style(right, "Validation accuracy", "images right (%)", drawn)
    if drawn:
        right.set_ylim(top=min(right.get_ylim()[1], 101.0))
    _write(figure, Path(png))


def draw_confusion(matrix: Any, class_names: Sequence[str], png: Path | str) -> None:
    """Draw a confusion matrix; colours show each row's share, numbers (up to 20 classes) show counts.

    Args:
        matrix: [n, n] counts as a tensor, array or nested lists; rows are true classes, columns predictions.
        class_names: n names, in the matrix's order.
        png: the picture to write.

    Raises:
        UserError: more than 60 classes, where a picture could not be read.
        ValueError: the matrix is not [n, n] for n names.
    """
    import numpy as np

    counts = np.asarray(matrix.cpu() if hasattr(matrix, "cpu") else matrix, dtype=np.float64)
    number = len(class_names)
    if counts.shape != (number, number) or number == 0:
        raise ValueError(f"confusion matrix of shape {list(counts.shape)} for {number} class names")
    if number > MAX_CONFUSION_CLASSES:
        raise UserError(f"a confusion picture of {number} classes is unreadable; at most {MAX_CONFUSION_CLASSES}")
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    side = min(3.5 + 0.45 * number, 3.5 + 0.22 * number + 4.0)
    figure = _figure(side + 1.0, side)
    axes = figure.subplots()
    image = axes.imshow(shares * 100.0, cmap="Blues", vmin=0.0, vmax=100.0)
    size = 10 if number <= 15 else 8
    names = [_label(name) for name in class_names]
    axes.set_xticks(range(number), names, rotation=90 if number > 6 else 30, fontsize=size)
    axes.set_yticks(range(number), names, fontsize=size)
    if number <= 6:
        for tick in axes.get_xticklabels():
            tick.set_horizontalalignment("right")
    axes.set_xlabel("predicted")
    axes.set_ylabel("true")
    right = float(np.trace(counts))
    axes.set_title(f"{right:.0f} of {counts.sum():.0f} right", color=_INK, fontsize=12)
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(_FAINT)
    if number <= 20:
        for row, column in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[row, column] > 0.5 else _INK
            text = f"{counts[row, column]:.0f}"
            axes.text(column, row, text, ha="center", va="center", color=colour, fontsize=size - 1)
    bar = figure.colorbar(image, ax=axes, shrink=0.8, aspect=30, fraction=0.05)
    bar.set_label("share of the true class (%)")
    bar.outline.set_visible(False)
    _write(figure, Path(png))


def _read_metrics(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
    except OSError as error:
        raise UserError(f"could not read {path}: {error.strerror}; give a run's metrics.csv") from error
    if not {"epoch", "train_loss"} <= set(reader.fieldnames or ()):
        raise UserError(f"{path} is not a run's metrics.csv: it has no columns epoch and train_loss")
    return rows


def _points(rows: list[dict[str, str]], column: str) -> tuple[list[int], list[float]]:
    epochs, values = [], []
    for row in rows:
        try:
            epoch, value = int(row["epoch"]), float(row.get(column) or "nan")
        except (TypeError, ValueError):
            continue  # the last line of a crashed run may be cut short
        if math.isfinite(value):
            epochs.append(epoch)
            values.append(value)
    return epochs, values


def _curve(
    axes: "Axes", rows: list[dict[str, str]], column: str, label: str, colour: str, percent: bool = False
) -> int:
    """Draw one column; returns how many points it has."""
    epochs, values = _points(rows, column)
    if not epochs:
        return 0
    if percent:
        values = [100.0 * value for value in values]
        label = f"{label}: {values[-1]:.1f}, best {max(values):.1f}"
    else:
        label = f"{label}: {values[-1]:.3f}, best {min(values):.3f}"
    # Points only where they stay apart; a single epoch has nothing but its point.
    marker = "o" if len(epochs) <= 40 else ""
    axes.plot(epochs, values, color=colour, label=label, linewidth=2.0, marker=marker, markersize=4.0)
    return len(epochs)


def _style(axes: "Axes", title: str, unit: str, drawn: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", color=_INK, fontsize=12, fontweight="bold")
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(color=_FAINT, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if drawn:
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", va="center", transform=axes.transAxes, color=_INK)


def _figure(width: float, height: float) -> "Figure":
    """A figure of its own with the Agg canvas, in inches; pyplot's global state and display stay untouched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _label(name: str) -> str:
    """A class name as matplotlib may draw it: not too long, and its dollars are no formulas."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return short.replace("$", r"\$")


def _write(figure: "Figure", png: Path) -> None:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # A script the font lacks is drawn as boxes; that is no reason to warn in the middle of a training run.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(buffer, format="png")
    try:
        write_atomic(png, buffer.getvalue())
    except OSError as error:
        raise UserError(f"could not write {png}: {error.strerror or error}") from error
