"""Predicted ceilings of the kernels on each GPU, from counts of their machine code and of the bytes they move.

    python -m bench.roofline                 table; results/roofline.json and results/roofline.png
    python -m bench.roofline --batch 1 256   these batches (default 256)

NOTHING HERE IS TIMED: every time is a prediction. A kernel takes as long as the slower of DRAM (its bytes) and issue
(its instructions), each at the share of its peak that well-written kernels reach (`bench.occupancy`), plus a
microsecond to launch. Bytes of training kernels are the sectors that `bench.traffic` counted, instructions those of
`bench.resources` and `bench.gpu_static` (the row of the same kernel, stride and nearest number of channels). L2 is
taken to keep nothing between kernels, for everybody. The instructions of the fused block and of the pairs in CUDA C++
are those of their machine code times how often the planner's cut runs them (`bench.fused_counts`), dealt to SMs in
whole thread blocks; their bytes are inputs, outputs and weights, once, a pair's hidden tensor written and read. Peers
are models: only their least bytes and their launches count, as if their kernels were perfect; a peer whose kernels are
worse is slower than predicted.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import fused_counts, gpu_static, plan
from bench.occupancy import ARCHITECTURES, DRAM_SHARE, ISSUE_SHARE, Architecture
from bench.pairs import limits, shape_of
from bench.plan import Block
from mbv2.errors import UserError
from mbv2.files import write_atomic
from mbv2.kernels.cuda import fused as cuda_fused

RESULTS = Path(__file__).parent / "results"
FUSED = RESULTS / "cuda_fused.json"
LAUNCH = 1e-6
ITEM = 2  # float16
# What the design wants of whole-block inference at batch 256.
TARGET_EAGER, TARGET_ACT_FUSED = 3.0, 1.7
BUILT = ("as planned (built)", "one launch a block (built)", "Triton pairs (built)")
# Launches a block of the peers: forward and backward.
EAGER_LAUNCHES, COMPILED_LAUNCHES = 30, 18
_A = ARCHITECTURES
GPUS: tuple[Architecture, ...] = (
    _A[80],
    replace(_A[80], gpu="A100-80GB", bandwidth=2.039e12),
    _A[89],
    replace(_A[89], gpu="L4", processors=58, clock=2.04e9, bandwidth=0.300e12),
    _A[90],
    replace(_A[90], gpu="H200", bandwidth=4.8e12),
    _A[100],
)
# Older than the kernels: cp.async and bfloat16 products begin with sm_80, so a T4 runs plain torch.
WITHOUT_KERNELS = ("T4",)


@dataclass(frozen=True)
class Kernel:
    """One launch on a batch of one picture: bytes of DRAM, instructions, and whose count they are."""

    name: str
    bytes: float
    instructions: float
    source: str
    launches: int = 1

    def seconds(self, gpu: Architecture, batch: int) -> float:
        """Predicted for `batch` pictures."""
        return batch * max(self.bytes / _bandwidth(gpu), self.instructions / _issue(gpu)) + self.launches * LAUNCH

    def bound(self, gpu: Architecture) -> str:
        """What limits it there."""
        return "issue" if self.instructions / _issue(gpu) > self.bytes / _bandwidth(gpu) else "DRAM"


class Counts:
    """The committed counts of one architecture."""

    def __init__(self, arch: str) -> None:
        budget = json.loads((RESULTS / "resources.json").read_text())
        self._rows = budget[arch]["float16"]
        self._cuda = json.loads(gpu_static.RESULTS.read_text()).get(arch, {})
        self._choice = json.loads(gpu_static.CHOICE.read_text()).get(arch, {})

    def per_byte(self, kernel: str, channels: int, stride: int) -> float:
        """Instructions a byte of the Triton kernel, on the shape nearest in stride and channels."""
        found = []
        for key, row in self._rows.items():
            name, _, call = key.partition(": ")
            if name == kernel:
                sizes = [int(shape.split("x")[1]) for shape in re.findall(r"\d+x\d+x\d+x\d+", call)]
                strides = re.findall(r" ([12])(?: |$)", call)
                other = bool(strides) and int(strides[-1]) != stride
                found.append((other, min(abs(size - channels) for size in sizes), row["instructions_per_byte"]))
        if not found:
            raise KeyError(f"results/resources.json has no row of {kernel}; run `python -m bench.resources report`")
        return min(found)[2]

    def depthwise(self, stage: str, stride: int) -> float | None:
        """Instructions a byte of the CUDA C++ kernel, where it is chosen."""
        if not self._choice.get(f"{stage} {ITEM} s{stride}", False):
            return None
        row = self._cuda[f"mbv2_{stage}_float16_s{stride}_bn"]
        outputs = 1 / stride**2  # for an element of the input
        values = 1 + outputs if stage == "depthwise" else 2 + 2 * outputs
        return row["instructions_per_element"] / (ITEM * values)


def training(gpu: Architecture, blocks: list[Block]) -> list[Kernel]:
    """The kernels of a step of all blocks as they are built; small ones, of statistics, count as launches only."""
    counts = Counts(gpu.name)
    moved = json.loads((RESULTS / "traffic.json").read_text())["bytes_per_image"]
    out = []
    for block in blocks:
        planned = [*plan.forward(block), *plan.backward(block)]
        for stage in moved[str(block)]:
            name, kernels = stage["stage"], list(stage["kernels"])
            parts = [k for k in planned if k.stage == name]
            # Those that go over activations, in the plan's order; the rest add up parts.
            large = [k for k in kernels if k not in ("sum_parts_kernel",)][: len(parts)] if parts else []
            total = sum(k.bytes(block, ITEM) for k in parts)
            for kernel, part in zip(large, parts, strict=False):
                share = (stage["activations"] + stage["small"]) * part.bytes(block, ITEM) / total
                per_byte = counts.depthwise(name, block.stride)
                source = "CUDA C++" if per_byte is not None else "Triton"
                if per_byte is None:
                    per_byte = counts.per_byte(
                        kernel, block.hidden if "bn_" not in kernel else block.cout, block.stride
                    )
                out.append(Kernel(f"{block} {kernel}", share, share * per_byte, source))
            out += [
                Kernel(f"{block} {kernel}", 0 if large else stage["small"], 0, "Triton")
                for kernel in kernels[len(large) :]
            ]
    return out


def pairs(gpu: Architecture, blocks: list[Block]) -> list[Kernel]:
    """Inference by the two Triton launches a block that are built."""
    counts, out = Counts(gpu.name), []
    for block in blocks:
        e = block.elements
        end = e["O"] + (e["X"] if block.residual else 0)
        first = [("expand_depthwise_folded_kernel", e["X"] + e["E2"]), ("pointwise_folded_kernel", e["E2"] + end)]
        last = [("pointwise_folded_kernel", e["X"] + e["E1"]), ("depthwise_project_folded_kernel", e["E1"] + end)]
        if not block.expands:
            cut = [("depthwise_project_folded_kernel", e["X"] + end)]
        else:
            cut = min(first, last, key=lambda kernels: sum(elements for _, elements in kernels))
        for kernel, elements in cut:
            size = float(elements * ITEM)
            per_byte = counts.per_byte(kernel, block.hidden, block.stride)
            out.append(Kernel(f"{block} {kernel}", size, size * per_byte, "Triton"))
    return out


def fused(gpu: Architecture, blocks: list[Block], batch: int) -> list[Kernel]:
    """Inference by one CUDA C++ launch a block, two where the planner splits hidden channels."""
    return [
        kernel
        for block in blocks
        for kernel in _launches(gpu, block, batch, cuda_fused.plan_for(shape_of(block, batch), limits(gpu)))
    ]


def planned(gpu: Architecture, blocks: list[Block], batch: int) -> list[Kernel]:
    """Inference by CUDA C++ as it runs: by a pair of launches where the planner takes one."""
    return [
        kernel
        for block in blocks
        for kernel in _launches(gpu, block, batch, cuda_fused.choice_for(shape_of(block, batch), limits(gpu)))
    ]


def _launches(
    gpu: Architecture, block: Block, batch: int, plan: cuda_fused.Plan | cuda_fused.Pair | str
) -> list[Kernel]:
    if isinstance(plan, str):
        raise UserError(f"the block {block} cannot be planned for {gpu.gpu}: {plan}")
    known = json.loads(FUSED.read_text())[gpu.name]["float16"]
    counts = {tile: row["counts"] for tile, row in known.items()}
    shape, e = shape_of(block, batch), block.elements

    def kernel(name: str, elements: float, weights: int, instructions: float, blocks: int, launches: int) -> Kernel:
        # The busiest SM has that many times the average; what is left over of a wave keeps others idle.
        uneven = -(-blocks // gpu.processors) * gpu.processors / blocks
        size = ITEM * elements + ITEM * weights / batch
        return Kernel(f"{block} {name}", size, uneven * instructions / batch, "CUDA C++", launches)

    expand, project = block.hidden * (block.cin if block.expands else 0), block.hidden * block.cout
    if isinstance(plan, cuda_fused.Pair):
        first, second = fused_counts.pair_executed(shape, plan, counts)
        results = e["E2"] + e["O"] + (e["X"] if block.residual else 0)
        return [
            kernel("expand+depthwise", e["X"] + e["E2"], expand + 9 * block.hidden, first, plan.front.blocks, 1),
            kernel("project", results, project, second, plan.product.blocks, 1),
        ]
    instructions = fused_counts.executed(shape, plan, counts)
    weights = expand + 9 * block.hidden + project
    return [kernel("fused", e["X"] + e["O"], weights, instructions, plan.blocks, 1 + (plan.splits > 1))]


def peers(blocks: list[Block]) -> dict[str, list[Kernel]]:
    """Inference of torch with BatchNorm folded, and of convolutions that clamp and add (TensorRT-like); bytes only."""
    out: dict[str, list[Kernel]] = {"BN-folded eager": [], "act-fused": []}
    for block in blocks:
        e = block.elements
        x, e1, e2, o = (ITEM * e[kind] for kind in ("X", "E1", "E2", "O"))
        convolutions = ([x + e1] if block.expands else []) + [e1 + e2, e2 + o]
        clamps = ([2 * e1] if block.expands else []) + [2 * e2] + ([x + 2 * o] if block.residual else [])
        out["BN-folded eager"] += [Kernel(str(block), size, 0, "model") for size in convolutions + clamps]
        convolutions[-1] += x if block.residual else 0
        out["act-fused"] += [Kernel(str(block), size, 0, "model") for size in convolutions]
    return out


def predict(gpu: Architecture, batch: int) -> dict[str, Any]:
    """Microseconds a picture of the 17 blocks of the full-width network at 224, and how much faster than the peers."""
    blocks = plan.network()
    step = training(gpu, blocks)
    eager = [Kernel("eager AMP", 1e6 * sum(plan.EAGER), 0, "model")]
    compiled = [Kernel("torch.compile", 1e6 * sum(plan.COMPILED), 0, "model")]
    ways = {
        "as planned (built)": planned(gpu, blocks, batch),
        "one launch a block (built)": fused(gpu, blocks, batch),
        "Triton pairs (built)": pairs(gpu, blocks),
        **peers(blocks),
    }
    train = {
        "built": _total(step, gpu, batch),
        "eager AMP": _total(eager, gpu, batch) + (EAGER_LAUNCHES * len(blocks) - 1) * LAUNCH,
        "torch.compile": _total(compiled, gpu, batch) + (COMPILED_LAUNCHES * len(blocks) - 1) * LAUNCH,
    }
    infer = {name: _total(kernels, gpu, batch) for name, kernels in ways.items()}
    issue = sum(k.seconds(gpu, batch) for k in step if k.bytes and k.bound(gpu) == "issue")
    return {
        "gpu": gpu.gpu,
        "arch": gpu.name,
        "batch": batch,
        "predicted_training_us_per_image": {k: round(1e6 * v / batch, 2) for k, v in train.items()},
        "predicted_inference_us_per_image": {k: round(1e6 * v / batch, 2) for k, v in infer.items()},
        "predicted_training_share_bound_by_issue": round(issue / train["built"], 3),
        "misses": misses(gpu, batch, infer),
    }


def misses(gpu: Architecture, batch: int, infer: dict[str, float]) -> list[str]:
    """Where inference is predicted to stay below the design's target, a sentence each."""
    out = []
    for way in BUILT:
        for peer, target in (("BN-folded eager", TARGET_EAGER), ("act-fused", TARGET_ACT_FUSED)):
            ratio = infer[peer] / infer[way]
            if ratio < target:
                out.append(f"{gpu.gpu} batch {batch}: {way} {ratio:.2f} times {peer}, the target is {target}")
    return out


def table(predictions: list[dict[str, Any]]) -> str:
    """The report as text."""
    lines = ["PREDICTED microseconds a picture, 17 blocks of 1.0_224 in float16; nothing was timed", ""]
    for phase in ("training", "inference"):
        key = f"predicted_{phase}_us_per_image"
        names = list(predictions[0][key])
        lines.append(f"{phase:10}{'batch':>6}" + "".join(f"{name:>31}" for name in names))
        for row in predictions:
            best = row[key][names[0]]
            cells = (f"{us:.2f} ({us / best:.2f}x)" for us in row[key].values())
            lines.append(f"{row['gpu']:10}{row['batch']:6}" + "".join(f"{cell:>31}" for cell in cells))
        lines.append("")
    lines += [f"{name}: no kernels (they need sm_80), plain torch runs" for name in WITHOUT_KERNELS]
    missed = [sentence for row in predictions for sentence in row["misses"]]
    lines += ["", "Where the counts do not reach the design's target:", *(missed or ["nowhere"])]
    return "\n".join(lines)


def draw(path: Path, gpus: Sequence[Architecture]) -> None:
    """Every training and inference kernel on the roofline of each GPU: predicted bytes/s over instructions a byte."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    blocks = plan.network()
    figure, axes = pyplot.subplots(2, -(-len(gpus) // 2), figsize=(4 * -(-len(gpus) // 2), 7), squeeze=False)
    for axis, gpu in zip(axes.flat, gpus, strict=False):
        roof = [0.5 * 1.15**i for i in range(40)]
        axis.plot(roof, [min(_bandwidth(gpu), _issue(gpu) / x) / 1e9 for x in roof], color="black", linewidth=1)
        kinds = {
            "training": training(gpu, blocks),
            "inference, Triton": pairs(gpu, blocks),
            "inference, CUDA C++": planned(gpu, blocks, 256),
        }
        for (label, kernels), marker in zip(kinds.items(), "o^s", strict=True):
            points = [
                (k.instructions / k.bytes, k.bytes / (k.seconds(gpu, 1) - LAUNCH) / 1e9)
                for k in kernels
                if k.instructions
            ]
            axis.scatter(*zip(*points, strict=True), s=14, marker=marker, label=label, alpha=0.7)
        axis.set(
            xscale="log", yscale="log", title=f"{gpu.gpu} (predicted)", xlabel="instructions a byte", ylabel="GB/s"
        )
    for axis in axes.flat[len(gpus) :]:
        axis.axis("off")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    write_atomic(path, lambda file: figure.savefig(file, format="png", dpi=95))
    pyplot.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m bench.roofline", description="predicted ceilings on each GPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[256])
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder of roofline.json and roofline.png (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    predictions = [predict(gpu, batch) for batch in arguments.batch for gpu in GPUS]
    print(table(predictions))
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = {"note": "predicted from counts, nothing was timed", "rows": predictions}
    write_atomic(arguments.out / "roofline.json", (json.dumps(document, indent=1) + "\n").encode())
    draw(arguments.out / "roofline.png", GPUS)
    return 0


def _bandwidth(gpu: Architecture) -> float:
    return gpu.bandwidth * DRAM_SHARE


def _issue(gpu: Architecture) -> float:
    return gpu.issue_per_second * ISSUE_SHARE


def _total(kernels: list[Kernel], gpu: Architecture, batch: int) -> float:
    return sum(kernel.seconds(gpu, batch) for kernel in kernels)


if __name__ == "__main__":
    sys.exit(main())
