"""Bars: how often faster than the baseline each runner is, with the quartiles of the rounds as whiskers."""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from bench import plots
from bench.schema import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Bar(NamedTuple):
    """One bar: its name, length, quartiles (or None), and what is written at its end."""

    name: str
    value: float
    low: float | None
    high: float | None
    note: str


def figures(result: Result) -> "dict[str, Figure]":
    """The picture of a result of any benchmark in _DRAW, under the suffix ''."""
    return {"": _DRAW[result.bench](result)}


def bars(axis: "Axes", entries: list[Bar], baseline: str) -> None:
    """Horizontal bars from top to bottom, the baseline grey, ours orange."""
    for number, bar in enumerate(entries):
        colour = plots.BASE if bar.name == baseline else plots.OURS if "mbv2" in bar.name else plots.PEER
        axis.barh(number, bar.value, color=colour, height=0.72)
        end = bar.value
        if bar.low is not None and bar.high is not None:
            axis.plot([bar.low, bar.high], [number, number], color=plots.INK, linewidth=1.2, solid_capstyle="butt")
            end = max(end, bar.high)
        axis.annotate(bar.note, (end, number), (5, 0), textcoords="offset points", va="center", fontsize=8)
    axis.set_yticks(range(len(entries)), [bar.name for bar in entries], fontsize=8)
    axis.set_ylim(len(entries) - 0.5, -0.5)
    axis.set_xlim(0, 1.3 * max(max(bar.value, bar.high or 0) for bar in entries))
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=plots.FAINT, linewidth=0.8)


def _speed(result: Result) -> "Figure":
    """One panel per case of model or train."""
    cases = list(_grouped(result.rows, lambda row: (row["model"], row["batch"], row.get("threads"))))
    heights = [len(rows) for _, rows in cases]
    on_gpu = result.settings["device"] == "cuda"
    figure, axes = plots.new(8.0, sum(0.26 * height + 0.5 for height in heights) + 0.6, len(cases))
    for axis, ((model, batch, threads), rows) in zip(axes, cases, strict=True):
        baseline = rows[0].get("baseline", "torchvision eager")
        entries = [
            Bar(
                row["runner"],
                row["faster"],
                row["faster_low"],
                row["faster_high"],
                _note(row, on_gpu),
            )
            for row in sorted(rows, key=lambda row: -row["faster"])
        ]
        bars(axis, entries, baseline)
        count = f", {threads} thread{'s' * (threads > 1)}" if threads else ""
        title = f"{model}, batch {batch}{count}: times as fast as {baseline}"
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=plots.INK)
    plots.footnote(figure, result, _HOW)
    return figure


def _note(row: Row, on_gpu: bool) -> str:
    """Ratio and images/s; on a CPU the time on its cores, which others that run there do not change."""
    if on_gpu:
        return f"{row['faster']:.2f}x, {row['images_per_s']:.0f} images/s"
    return f"{row['faster']:.2f}x, {row['cpu_median_ms']:.1f} ms"


def _kernels(result: Result) -> "Figure":
    """One panel per pass, one group of bars per operator."""
    cases = list(_grouped(result.rows, lambda row: row["pass"]))
    most = max(len(rows) for _, rows in cases)
    figure, axes = plots.new(4.6 * len(cases), 0.2 * most + 1.2, 1, len(cases))
    for axis, (which, rows) in zip(axes, cases, strict=True):
        entries = [
            Bar(
                f"{row['operator']}, {'mbv2 ' * (row['backend'] != 'aten')}{row['backend']}",
                row["gflop_per_s"],
                None,
                None,
                f"{row['gflop_per_s']:.1f}" + (f" ({row['faster']:.2f}x)" if row["backend"] != "aten" else ""),
            )
            for row in rows
        ]
        bars(axis, entries, "")
        axis.set_title(f"{which}: GFLOP/s", loc="left", fontsize=9, fontweight="bold", color=plots.INK)
    plots.footnote(figure, result, "In brackets: times as fast as aten. " + _HOW)
    return figure


def _loader(result: Result) -> "Figure":
    """Pictures per second of time on the cores: what a busy machine leaves comparable."""
    figure, (left, right) = plots.new(9.0, 0.3 * len(result.rows) + 1.5, 1, 2)
    rows = sorted(result.rows, key=lambda row: row["cpu_ms_per_image"])
    baseline = "ImageFolder (PIL)"
    bars(
        left,
        [
            Bar(
                row["loader"],
                row["less_cpu"],
                row["less_cpu_low"],
                row["less_cpu_high"],
                f"{row['less_cpu']:.2f}x, {row['cpu_ms_per_image']:.2f} ms",
            )
            for row in rows
        ],
        baseline,
    )
    bars(
        right,
        [
            Bar(
                row["loader"],
                row["images_per_s"],
                row["p25_images_per_s"],
                row["p75_images_per_s"],
                f"{row['images_per_s']:.0f}",
            )
            for row in rows
        ],
        baseline,
    )
    style = {"loc": "left", "fontsize": 9, "fontweight": "bold", "color": plots.INK}
    left.set_title("pictures per second on a core, ImageFolder = 1", **style)
    right.set_title(f"images/s, {result.rows[0]['workers']} workers", **style)
    settings = result.settings
    text = f"{settings['pictures']} pictures ({settings['data']}), random crops to {settings['resolution']} pixels. "
    plots.footnote(figure, result, text + "Whiskers: quartiles of the rounds.")
    return figure


def _memory(result: Result) -> "Figure":
    """Megabytes saved for backward, and the process's peak."""
    figure, axes = plots.new(10.0, 2.2, 1, 2)
    titles = ("MB saved for backward per picture (17 blocks)", "MB at the peak of a training step")
    for axis, key, title in zip(axes, ("saved_mb", "peak_mb"), titles, strict=True):
        rows = [row for row in result.rows if row.get(key) is not None]
        entries = [Bar(row["runner"], row[key], None, None, f"{row[key]:.1f}") for row in rows]
        if entries:
            bars(axis, entries, "torchvision eager")
        else:
            axis.set_axis_off()
        axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=plots.INK)
    settings = result.settings
    plots.footnote(
        figure,
        result,
        f"{settings['model']}. Left: {settings['saved_dtype']}, counted. Right: {settings['step_dtype']} on the CPU, "
        f"batch {settings['step_batch']}, what the process grew by.",
    )
    return figure


def _cold(result: Result) -> "Figure":
    """Milliseconds on the cores of a fresh process, with the extremes of the processes."""
    figure, (axis,) = plots.new(8.0, 2.4)
    entries = [
        Bar(row["runner"], row["cpu_ms"], row["cpu_min_ms"], row["cpu_max_ms"], f"{row['cpu_ms']:.0f}")
        for row in result.rows
    ]
    bars(axis, entries, "torchvision eager")
    title = "ms on the cores from imported torch to the first logits"
    axis.set_title(title, loc="left", fontsize=9, fontweight="bold", color=plots.INK)
    plots.footnote(figure, result, "Medians of fresh processes, whiskers their extremes.")
    return figure


def _grouped(rows: list[Row], key: Callable[[Row], object]) -> "Iterator[tuple[object, list[Row]]]":
    """Rows of equal key together, in the order in which keys come first."""
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    yield from groups.items()


_HOW = "Ratios are medians over interleaved rounds, whiskers their quartiles; on a CPU of time on the cores."
_DRAW = {
    "kernels": _kernels,
    "model": _speed,
    "train": _speed,
    "accelerate": _speed,
    "cpu_training": _speed,
    "cpu_bfloat16": _speed,
    "cpu_int8": _speed,
    "loader": _loader,
    "memory": _memory,
    "cold": _cold,
}
