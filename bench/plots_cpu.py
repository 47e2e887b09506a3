"""Pictures of inference on a CPU: peers over ours by case, shares of the peak by part, costs as pictures grow."""

from typing import TYPE_CHECKING

from bench import plots
from bench.plots_speed import Bar, bars
from bench.schema import Result, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLE = {"loc": "left", "fontsize": 8.5, "fontweight": "bold", "color": plots.INK}


def figures(result: Result) -> "dict[str, Figure]":
    """The picture of a result of cpu, cpu_parts, cpu_scaling or cpu_blocks, under the suffix ''."""
    draw = {"cpu": _peers, "cpu_parts": _parts, "cpu_scaling": _scaling, "cpu_blocks": _blocks}[result.bench]
    return {"": draw(result)}


def _peers(result: Result) -> "Figure":
    """A panel a case, a row of panels a model: how many times longer than mbv2 each runner takes."""
    models = list(dict.fromkeys(row["model"] for row in result.rows))
    columns = list(dict.fromkeys((row["batch"], row["threads"]) for row in result.rows))
    most = max(sum(_is(row, m, c) for row in result.rows) for m in models for c in columns)
    figure, axes = plots.new(3.6 * len(columns), (0.2 * most + 0.5) * len(models) + 0.7, len(models), len(columns))
    places = [(model, column) for model in models for column in columns]
    for axis, (model, column) in zip(axes, places, strict=True):
        rows = sorted((row for row in result.rows if _is(row, model, column)), key=lambda row: row["over_ours"])
        entries = [
            Bar(
                row["runner"],
                row["over_ours"],
                row["over_ours_low"],
                row["over_ours_high"],
                f"{row['over_ours']:.2f} ({row['cpu_median_ms' if column[1] == 1 else 'median_ms']:.1f} ms)",
            )
            for row in rows
        ]
        if entries:
            bars(axis, entries, "eager NCHW")
            axis.set_xlim(0, 1.6 * max(entry.high or 0 for entry in entries))
        else:
            axis.set_axis_off()
        axis.set_title(f"{model}, batch {column[0]}, {column[1]} thread{'s' * (column[1] > 1)}", **_TITLE)
    plots.footnote(figure, result, _HOW)
    return figure


def _is(row: Row, model: str, column: tuple[int, int]) -> bool:
    return row["model"] == model and (row["batch"], row["threads"]) == column and "over_ours" in row


def _parts(result: Result) -> "Figure":
    """A panel a model and batch: the share of the multiply-add peak that each part reaches."""
    cases = list(dict.fromkeys((row["model"], row["batch"]) for row in result.rows))
    figure, axes = plots.new(4.2 * len(cases), 5.2, 1, len(cases))
    for axis, case in zip(axes, cases, strict=True):
        rows = [row for row in result.rows if (row["model"], row["batch"]) == case]
        notes = [f"{row['peak_percent']:.0f} %, {row['least_ms']:.2f} ms" for row in rows]
        names = [row["part"] for row in rows]
        entries = [
            Bar(name, row["peak_percent"], None, None, note) for name, row, note in zip(names, rows, notes, strict=True)
        ]
        bars(axis, entries, "the whole run")
        axis.set_title(f"{case[0]}, batch {case[1]}: % of the multiply-add peak", **_TITLE)
    plots.footnote(figure, result, f"One thread, peak {result.settings['peak_gflops']:.0f} GFLOP/s a core.")
    return figure


def _scaling(result: Result) -> "Figure":
    """Cost per picture by batch, cost per pixel by size, eager over ours at odd shapes."""
    figure, (left, middle, right) = plots.new(13.0, 3.4, 1, 3)
    _line(left, [row for row in result.rows if row["group"] == "batch"], "per_image_ms")
    left.set_title("ms a picture by batch", **_TITLE)
    _line(middle, [row for row in result.rows if row["group"] == "size"], "per_kilopixel_us")
    middle.set_title("us per 1,000 pixels by side", **_TITLE)
    entries = [
        Bar(
            f"{row['shape']}, width {row['width']}",
            row["eager_over_ours"],
            row["eager_over_ours_low"],
            row["eager_over_ours_high"],
            f"{row['eager_over_ours']:.1f}",
        )
        for row in result.rows
        if row["group"] == "odd shapes"
    ]
    bars(right, entries, "")
    right.set_title("channels_last eager over ours, odd shapes", **_TITLE)
    plots.footnote(figure, result, "One thread, time on the core, medians of interleaved rounds.")
    return figure


def _blocks(result: Result) -> "Figure":
    """How many times as fast as plain torch each block trains."""
    figure, (axis,) = plots.new(8.0, 0.26 * len(result.rows) + 1.1)
    entries = [
        Bar(
            f"{row['shape']} to {row['outputs']}, stride {row['stride']}",
            row["faster"],
            row["faster_low"],
            row["faster_high"],
            f"{row['faster']:.2f} ({row['cpu_min_us']:.0f} us at best)",
        )
        for row in result.rows
    ]
    bars(axis, entries, "")
    axis.axvline(1, color=plots.INK, linewidth=0.8)
    axis.set_title("Blocks in training, times as fast as plain torch in channels_last", **_TITLE)
    plots.footnote(figure, result, "One thread, time on the core, medians of interleaved rounds, whiskers quartiles.")
    return figure


def _line(axis: "Axes", rows: list[Row], key: str) -> None:
    # "batch x height x width": the batch where that changes, else the side.
    which = 0 if len({row["shape"].split(" x ")[0] for row in rows}) > 1 else 1
    labels = [row["shape"].split(" x ")[which] for row in rows]
    axis.plot(range(len(rows)), [row[key] for row in rows], color=plots.OURS, marker="o", markersize=4)
    axis.set_xticks(range(len(rows)), labels, fontsize=8)
    axis.set_ylim(0, 1.25 * max(row[key] for row in rows))
    axis.grid(axis="y", color=plots.FAINT, linewidth=0.8)


_HOW = (
    "Times as long as mbv2: medians of the ratios of interleaved rounds, whiskers their quartiles; of time on the core "
    "with one thread, of the clock with two."
)
