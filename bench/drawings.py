"""The docs' drawings, from the model's own shapes: `python -m bench.drawings docs` writes all of them.

`network.png`: the stages of 1.0_224 with their shapes, and one block. `dataflow.png`: the training block's data flow
(bench/dataflow.py). `dataflow_inference.png`: what a block reads and writes in inference, on a GPU and on a CPU.
"""

import argparse
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from bench import dataflow, plan, plots
from bench.dataflow import KERNEL, SMALL, TENSOR
from bench.plan import Block
from mbv2.progress import track

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE = "#f6d5c3"


def network(width: float = 1.0, resolution: int = 224) -> "Figure":
    """The stages from picture to logits, a box as high as its side and as wide as its channels grow; a block below."""
    figure, axes = plots.new(12.0, 5.6, 2, 1)
    _stages(axes[0], plan.network(width, resolution), resolution)
    _block(axes[1])
    return figure


def _stages(axis: "Axes", blocks: list[Block], resolution: int) -> None:
    rows = [list(group) for _, group in groupby(blocks, key=lambda block: block.cout)]
    labels = [(3, resolution, "picture", "")]
    labels.append((blocks[0].cin, blocks[0].side, "stem", "3x3, s2"))
    for row in rows:
        expansion = row[0].hidden // row[0].cin
        times = f"{len(row)} blocks" if len(row) > 1 else "1 block"
        labels.append((row[-1].cout, row[-1].side_out, times, f"t {expansion}, s{row[0].stride}"))
    labels.append((1280, blocks[-1].side_out, "head", "1x1, mean"))
    labels.append((1000, 1, "classifier", "linear"))
    for number, (channels, side, name, how) in enumerate(labels):
        height, breadth = 1.9 * (side / resolution) ** 0.5, 0.16 + 0.5 * (channels / 1280) ** 0.5
        colour = TENSOR if name != "picture" else SMALL
        _rectangle(axis, number, 0, breadth, height, colour)
        axis.text(
            number, height / 2 + 0.12, f"{channels} x {side}²" if side > 1 else f"{channels}", ha="center", fontsize=8
        )
        axis.text(number, -1.2, name, ha="center", fontsize=8.5, color=plots.INK, fontweight="bold")
        axis.text(number, -1.5, how, ha="center", fontsize=8, color=plots.INK)
        if number:
            _arrow(axis, (number - 0.62, 0), (number - 0.4, 0))
    axis.set_xlim(-0.6, len(labels) - 0.4)
    axis.set_ylim(-1.65, 1.45)
    axis.axis("off")
    axis.set_title(f"MobileNetV2 1.0_{resolution}: channels x side² after each stage", loc="left", fontsize=11)


def _block(axis: "Axes") -> None:
    parts = [
        ("x", "C", 0.8, TENSOR),
        ("expand 1x1\nBN, ReLU6", "", 0.0, KERNEL),
        ("", "t C", 2.2, WIDE),
        ("depthwise 3x3, stride s\nBN, ReLU6", "", 0.0, KERNEL),
        ("", "t C", 2.2, WIDE),
        ("project 1x1\nBN (linear)", "", 0.0, KERNEL),
        ("out", "C'", 0.8, TENSOR),
    ]
    for number, (name, channels, height, colour) in enumerate(parts):
        if colour == KERNEL:
            _rectangle(axis, number, 0, 0.86, 0.62, colour)
            axis.text(number, 0, name, ha="center", va="center", fontsize=7.5, color="white")
        else:
            _rectangle(axis, number, 0, 0.2, height, colour)
            axis.text(number, -height / 2 - 0.22, f"{channels} channels", ha="center", fontsize=8)
            axis.text(number, 0, name, ha="center", va="center", fontsize=8)
        if number:
            left, right = (0.43, 0.12) if colour != KERNEL else (0.12, 0.45)
            _arrow(axis, (number - 1 + left + 0.04, 0), (number - right - 0.02, 0))
    axis.plot([0, 0, 6], [0.42, 1.32, 1.32], color=plots.OURS, linewidth=1.4)
    arrow = {"arrowstyle": "-|>", "color": plots.OURS, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", (6, 0.4), (6, 1.34), arrowprops=arrow)
    axis.text(3, 1.42, "+ x where the stride is 1 and C = C'", ha="center", fontsize=8.5, color=plots.OURS)
    axis.set_xlim(-0.6, 6.6)
    axis.set_ylim(-1.5, 1.9)
    axis.axis("off")
    axis.set_title("One inverted residual block (t = 6, first block t = 1)", loc="left", fontsize=11)


def inference(block: Block, itemsize: int = 2) -> "Figure":
    """What a block of the folded network stores, way by way, with the megabytes per picture of `block`."""
    figure, (axis,) = plots.new(11.0, 4.9)
    size = {kind: count * itemsize / 1e6 for kind, count in block.elements.items()}
    x, e1, e2, out = size["X"], size["E1"], size["E2"], size["O"]
    past = x if block.residual else 0.0
    eager = [("x", x), "conv", ("e1", e1), "bn | relu6", ("e1", e1), "conv dw", ("e2", e2), "bn | relu6", ("e2", e2)]
    wide = 4 / itemsize  # the CPU's network is in float32
    in_cache = "expand, depthwise, project: two vectors of channels at a time, in cache"
    ways = [
        # A convolution writes, bn and relu6 read and write each, the next one reads; the sum at the end as well.
        (
            "torchvision eager",
            [*eager, "conv | bn | + x", ("out", out)],
            x + 6 * e1 + 6 * e2 + 3 * out + (2 * out + past if past else 0),
        ),
        (
            "GPU, depthwise in one kernel with expand",
            [("x", x), "expand_depthwise_folded", ("e2", e2), "pointwise_folded", ("out", out)],
            x + 2 * e2 + out + past,
        ),
        (
            "GPU, depthwise in one kernel with project",
            [("x", x), "pointwise_folded", ("e1", e1), "depthwise_project_folded", ("out", out)],
            x + 2 * e1 + out + past,
        ),
        (
            "CPU, the whole network in one call (float32)",
            [("x", wide * x), in_cache, ("out", wide * out)],
            wide * (x + out),
        ),
    ]
    for number, (title, steps, moved) in enumerate(ways):
        y = -1.35 * number
        axis.text(0, y + 0.52, title, fontsize=9, fontweight="bold", color=plots.INK)
        axis.text(12, y + 0.52, f"{moved:.2f} MB through memory", fontsize=9, ha="right", color=plots.OURS)
        _lane(axis, y, steps)
    axis.set_xlim(-0.1, 12.1)
    axis.set_ylim(-1.35 * len(ways) + 0.75, 0.9)
    axis.axis("off")
    text = f"Inference of block {block}: what is stored between kernels (blue), MB per picture in {8 * itemsize} bit"
    axis.set_title(text, loc="left", fontsize=10)
    note = "By formula: a stored tensor is written once and read once by each kernel that needs it; nothing was timed."
    figure.supxlabel(note, fontsize=7.5, color=plots.INK, x=0.01, ha="left")
    return figure


def _lane(axis: "Axes", y: float, steps: Sequence[str | tuple[str, float]]) -> None:
    """Tensors (name, MB) and kernels (name) from left to right, kernels sharing what room the tensors leave."""
    tensors = sum(not isinstance(step, str) for step in steps)
    each, gap = 0.95, 0.16
    room = (12 - tensors * each - (len(steps) - 1) * gap) / (len(steps) - tensors)
    at = 0.0
    for number, step in enumerate(steps):
        breadth = room if isinstance(step, str) else each
        middle = at + breadth / 2
        if isinstance(step, str):
            _rectangle(axis, middle, y, breadth, 0.62, KERNEL)
            axis.text(middle, y, step, ha="center", va="center", fontsize=7.5, color="white")
        else:
            _rectangle(axis, middle, y, breadth, 0.62, TENSOR)
            axis.text(middle, y, f"{step[0]}\n{step[1]:.2f} MB", ha="center", va="center", fontsize=7.5)
        if number:
            _arrow(axis, (at - gap, y), (at, y))
        at += breadth + gap


def _rectangle(axis: "Axes", x: float, y: float, breadth: float, height: float, colour: str) -> None:
    from matplotlib.patches import Rectangle

    corner = (x - breadth / 2, y - height / 2)
    axis.add_patch(Rectangle(corner, breadth, height, facecolor=colour, edgecolor=KERNEL, linewidth=0.8))


def _arrow(axis: "Axes", start: tuple[float, float], end: tuple[float, float]) -> None:
    style = {"arrowstyle": "-|>", "color": "#555555", "shrinkA": 0, "shrinkB": 0, "mutation_scale": 7}
    axis.annotate("", end, start, arrowprops=style)


def main(argv: Sequence[str] | None = None) -> None:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.drawings", description="draw the docs' pictures")
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    block = plan.network()[2]
    drawings = {"network": network(), "dataflow": dataflow.draw(block, 2), "dataflow_inference": inference(block)}
    for name, figure in track(drawings.items(), len(drawings), "drawings", "pictures"):
        plots.save(figure, folder / f"{name}.png")


if __name__ == "__main__":
    main()
