"""The line chart of top-1 over the 22 variants, and accuracy against latency; whose figure is whose is told apart."""

import math
from typing import TYPE_CHECKING

from bench import plots
from bench.schema import Result, Row
from mbv2.zoo import VARIANTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LINES = {"MindSpore": ("#3b6fb6", "o"), "TensorFlow": ("#2f9e77", "s")}
_POINTS = {"torchvision": ("#7b4ea3", "^"), "timm": ("#b8860b", "D")}
_WIDTHS = {1.4: "#7f1d1d", 1.3: "#b91c1c", 1.0: "#d9622b", 0.75: "#e0a030", 0.5: "#2f9e77", 0.35: "#3b6fb6"}


def figures(result: Result) -> "dict[str, Figure]":
    """`_top1`: everybody's top-1 by variant; `_latency`: top-1 against time, when that was measured."""
    found = {"_top1": _top1(result)}
    if any(row["source"] == "latency" for row in result.rows):
        found["_latency"] = _latency(result)
    return found


def _top1(result: Result) -> "Figure":
    names = list(VARIANTS)
    figure, (axis,) = plots.new(10.0, 5.0)
    for source, (colour, marker) in _LINES.items():
        rows = _of(result, source)
        for alpha in _WIDTHS:
            # One line per width: a line from one width to the next would say something that nobody measured.
            part = [row for row in rows if VARIANTS[row["model"]].alpha == alpha]
            axis.plot(
                [names.index(row["model"]) for row in part],
                [row["top1_percent"] for row in part],
                color=colour,
                marker=marker,
                markersize=4.5,
                linewidth=1.6,
                label=f"{source}, published" if alpha == 1.4 else None,
            )
    for source, (colour, marker) in _POINTS.items():
        rows = _of(result, source)
        x = [names.index(row["model"]) for row in rows]
        axis.scatter(
            x,
            [row["top1_percent"] for row in rows],
            color=colour,
            marker=marker,
            s=42,
            zorder=3,
            label=f"{source}, published",
        )
    _measured(axis, _of(result, "measured here"), names)
    axis.set_xticks(range(len(names)), [name.removeprefix("mobilenet_v2_") for name in names], rotation=60, fontsize=8)
    axis.set_ylabel("ImageNet top-1 (%)")
    axis.grid(axis="y", color=plots.FAINT, linewidth=0.8)
    axis.legend(frameon=False, fontsize=8, loc="lower left")
    axis.set_title("Top-1 of the 22 variants", loc="left", fontweight="bold", color=plots.INK, fontsize=11)
    plots.footnote(figure, result, "Filled marks: figures that others published, whole validation set; not ours.")
    return figure


def _measured(axis: "Axes", rows: list[Row], names: list[str]) -> None:
    """Hollow stars with 95 % intervals: what we measured, on fewer pictures than the published figures."""
    if not rows:
        return
    errors = [
        196 * math.sqrt(row["top1_percent"] / 100 * (1 - row["top1_percent"] / 100) / row["pictures"]) for row in rows
    ]
    row = rows[0]
    axis.errorbar(
        [names.index(row["model"]) for row in rows],
        [row["top1_percent"] for row in rows],
        yerr=errors,
        color=plots.OURS,
        marker="*",
        markersize=12,
        markerfacecolor="white",
        linestyle=":",
        linewidth=1.0,
        capsize=2.5,
        label=f"measured here: one file of weights trained at 224,\n{row['pictures']:,} pictures that are easier than "
        "the whole set; bars: 95 %",
    )


def _latency(result: Result) -> "Figure":
    published = {row["model"]: row["top1_percent"] for row in _of(result, "MindSpore")}
    rows = _of(result, "latency")
    ours = [row for row in rows if row["runner"] == "mbv2"]
    shown = ours or rows
    figure, (axis,) = plots.new(8.0, 5.0)
    for alpha, colour in _WIDTHS.items():
        part = [row for row in shown if VARIANTS[row["model"]].alpha == alpha]
        part.sort(key=lambda row: row["cpu_median_ms"])
        times = [row["cpu_median_ms"] for row in part]
        top1 = [published[row["model"]] for row in part]
        axis.plot(times, top1, color=colour, marker="o", markersize=5, linewidth=1.4, label=f"width {alpha}")
        low, high = ([row[key] for row in part] for key in ("cpu_p25_ms", "cpu_p75_ms"))
        axis.hlines(top1, low, high, color=colour, alpha=0.6)
        for row, time, accuracy in zip(part, times, top1, strict=True):
            label = str(VARIANTS[row["model"]].resolution)
            axis.annotate(label, (time, accuracy), (4, -9), textcoords="offset points", fontsize=7, color=colour)
    if ours:
        eager = [row for row in rows if row["runner"] != "mbv2"]
        axis.scatter(
            [row["cpu_median_ms"] for row in eager],
            [published[row["model"]] for row in eager],
            color=plots.BASE,
            marker="x",
            s=22,
            label="the same, torchvision eager",
        )
    axis.set_xscale("log")
    ticks = [t for t in (0.5, 1, 2, 5, 10, 20, 50, 100, 200) if _within(t, rows)]
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    count = rows[0]["threads"]
    axis.set_xlabel(
        f"milliseconds on the cores per picture (batch 1, {count} thread{'s' * (count > 1)}), measured here"
    )
    axis.set_ylabel("ImageNet top-1 (%), as MindSpore published it")
    axis.grid(color=plots.FAINT, linewidth=0.8)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    what = "mbv2.optimize_for_inference" if ours else rows[0]["runner"]
    axis.set_title(f"Accuracy against latency, {what}", loc="left", fontweight="bold", color=plots.INK, fontsize=11)
    plots.footnote(figure, result, "Numbers at the points: resolution. Median of interleaved rounds, lines: quartiles.")
    return figure


def _within(tick: float, rows: list[Row]) -> bool:
    times = [row["cpu_median_ms"] for row in rows]
    return min(times) * 0.7 <= tick <= max(times) * 1.4


def _of(result: Result, source: str) -> list[Row]:
    return [row for row in result.rows if row["source"] == source]
