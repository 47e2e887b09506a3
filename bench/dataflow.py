"""Draws the training block's data flow with the plan's bytes: `python -m bench.dataflow docs/dataflow.png`."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from bench import plan
from bench.plan import Block

TENSOR, KERNEL, SMALL = "#dceaf7", "#2b4c6f", "#f3e3c3"
WIDTH, HEIGHT = 1.4, 0.62


def box(axes: Axes, x: float, y: float, text: str, color: str) -> FancyBboxPatch:
    """A box centred on (x, y)."""
    corner = x - WIDTH / 2, y - HEIGHT / 2
    shape = FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0.04", fc=color, ec=KERNEL)
    axes.add_patch(shape)
    axes.text(x, y, text, ha="center", va="center", fontsize=7.5, color="white" if color == KERNEL else "black")
    return shape


def centre(shape: FancyBboxPatch) -> tuple[float, float]:
    return shape.get_x() + WIDTH / 2, shape.get_y() + HEIGHT / 2


def arrow(axes: Axes, start: FancyBboxPatch, end: FancyBboxPatch) -> None:
    """From edge to edge."""
    line = FancyArrowPatch(
        centre(start), centre(end), patchA=start, patchB=end, arrowstyle="-|>", mutation_scale=10, color="#555555"
    )
    axes.add_patch(line)


def draw(block: Block, itemsize: int) -> plt.Figure:
    """Forward on top, backward below; blue boxes lie in DRAM, with their MB per image, dark ones are kernels."""
    figure, axes = plt.subplots(figsize=(13, 6.4))
    megabytes = {kind: count * itemsize / 1e6 for kind, count in block.elements.items()}
    moved = {stage: count / 1e6 for stage, count in plan.planned(block, itemsize).items()}

    def tensor(x: float, y: float, name: str, kind: str) -> FancyBboxPatch:
        return box(axes, x, y, f"{name}\n{megabytes[kind]:.2f} MB", TENSOR)

    def kernel(x: float, y: float, stage: str, note: str) -> FancyBboxPatch:
        return box(axes, x, y, f"{stage}\n{note}", KERNEL)

    top, low, mid = 5.2, 1.2, 3.9
    x = tensor(0, top, "x", "X")
    expand = kernel(1.8, top, "expand", "1x1")
    y1 = tensor(3.6, top, "y1 (raw)", "E1")
    depthwise = kernel(5.4, top, "depthwise", "bn, relu6, 3x3")
    y2 = tensor(7.2, top, "y2 (raw)", "E2")
    project = kernel(9.0, top, "project", "bn, relu6, 1x1")
    y3 = tensor(10.8, top, "y3 (raw)", "O")
    apply = kernel(12.6, top, "bn_apply", "bn (+ x)")
    out = tensor(14.4, top, "out", "O")
    for a, b in ((x, expand), (expand, y1), (y1, depthwise), (depthwise, y2), (y2, project), (project, y3)):
        arrow(axes, a, b)
    arrow(axes, y3, apply)
    arrow(axes, apply, out)
    for source, target, label in ((expand, depthwise, "bn1"), (depthwise, project, "bn2"), (project, apply, "bn3")):
        middle = box(axes, (centre(source)[0] + centre(target)[0]) / 2, mid, f"moments\n-> {label} [6, C]", SMALL)
        arrow(axes, source, middle)
        arrow(axes, middle, target)

    grad = tensor(14.4, low, "grad", "O")
    sums = kernel(12.6, low + 1.0, "bn_sums", "reads grad, y3")
    back3 = kernel(10.8, low, "project_backward", "dy3, mask, dW3")
    dz2 = tensor(9.0, low, "dz2", "E2")
    back2 = kernel(7.2, low, "depthwise_backward", "dy2, mask, dWd")
    dz1 = tensor(5.4, low, "dz1", "E1")
    back1 = kernel(3.6, low, "expand_backward", "dy1, dW1 (+ grad)")
    dx = tensor(1.8, low, "dx", "X")
    for a, b in ((grad, sums), (sums, back3), (grad, back3), (back3, dz2), (dz2, back2), (back2, dz1), (dz1, back1)):
        arrow(axes, a, b)
    arrow(axes, back1, dx)
    for number, (where, reads) in enumerate(((10.8, "y3, y2, W3"), (7.2, "y2, y1, Wd"), (3.6, "y1, x, W1"))):
        axes.text(where, low - 0.62, f"also reads {reads}; coef{3 - number} from sums", ha="center", fontsize=7.5)

    forward = sum(count for stage, count in moved.items() if stage in plan.FORWARD)
    backward = sum(count for stage, count in moved.items() if stage in plan.BACKWARD)
    axes.text(-0.6, 6.0, f"Forward: {forward:.2f} MB per image through DRAM (plan). Saved: x, y1, y2, y3.", fontsize=10)
    axes.text(
        -0.6, 2.75, f"Backward: {backward:.2f} MB per image (plan). Normalise + ReLU6 is recomputed.", fontsize=10
    )
    axes.set_xlim(-0.8, 15.2)
    axes.set_ylim(0.2, 6.3)
    axes.axis("off")
    figure.tight_layout()
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--block", type=int, default=3, help="which of the 17 blocks of 1.0_224 the bytes are for")
    given = parser.parse_args()
    figure = draw(plan.network()[given.block - 1], itemsize=2)
    figure.savefig(given.picture, dpi=110)


if __name__ == "__main__":
    main()
