"""Every block shape of the full-width network through the fused kernel's PTX, with the tile its planner chooses.

Pictures are cut down to two tiles a direction, the second one ragged, or to the whole of a small picture; channels,
tile, warps and chunks are those of a batch of 256 at 224. Any fault of ptxcpu fails a test. The error against float64
is held to 1.3 times that of plain torch in the same type.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from emulated_cuda import A100, GPUS, block, launched
from ptxcpu.nvcc import find_nvcc
from stage_check import activations, relative_error
from test_cuda_plan import blocks
from torch import Tensor

from mbv2.kernels import aten, layout
from mbv2.kernels.cuda import fused

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
pytestmark = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")

MOST_RATIO = 1.3
# In float32 errors are of the last bits and go by the order of the sums; the floor is that of stage_check's policy.
FLOOR = {torch.float16: 0.0, torch.bfloat16: 0.0, torch.float32: 1e-6}


class Case(NamedTuple):
    """A launch: the block with its small picture, and the cut of the large one."""

    shape: fused.Shape
    tile: int
    height: int
    width: int

    def __str__(self) -> str:
        s = self.shape
        kind = list(fused.ELEMENTS)[s.element]
        cut = f"tile {self.tile} {self.height}x{self.width}"
        return f"{s.inputs}-{s.hidden}-{s.outputs} s{s.stride} {s.height}x{s.width} {kind} {cut}"


def cases(gpu: fused.Gpu, element: int) -> Iterator[Case]:
    """The distinct blocks of the full-width network as planned for `gpu`, each on a small picture."""
    for shape in dict.fromkeys(blocks(1.0, 224, 256, element)):
        plan = fused.plan_for(shape, gpu)
        assert isinstance(plan, fused.Plan) and plan.splits == 1
        height = min(shape.height, plan.height * shape.stride + 3)
        width = min(shape.width, plan.width * shape.stride + 3)
        yield Case(shape._replace(images=1, height=height, width=width), plan.tile, plan.height, plan.width)


def errors(mode: str, case: Case, all_tiles: bool = True) -> tuple[float, float]:
    """Run a case where --device says; its relative error against float64 and plain torch's."""
    shape = case.shape
    dtype = list(fused.ELEMENTS)[shape.element]
    wish = {"tile": case.tile, "tile_height": case.height, "tile_width": case.width, "splits": 1}
    # Any of the GPUs' plans fits ptxcpu.
    limits = GPUS["H100"] if mode != "cuda" else fused.gpu_of(torch.device("cuda"))
    plan = fused.plan_for(shape, limits, **wish)
    if mode == "cuda" and isinstance(plan, str):
        pytest.skip(f"another GPU's plan: {plan}")
    assert isinstance(plan, fused.Plan) and (plan.tile, plan.height, plan.width) == case[1:], plan
    weights = block(shape.inputs, shape.hidden, shape.outputs, dtype, shape.expands)
    x = activations(shape.images, shape.inputs, shape.height, shape.width, dtype)
    size = [(side - 1) // shape.stride + 1 for side in (shape.height, shape.width)]
    out = layout.new_channels_last(x, (shape.images, shape.outputs, *size))
    w1, b1, wd, bd, w3, b3 = weights
    tensors = (x, w1, wd, w3, b1, bd, b3, _dense(out), None)
    stats = launched(mode, plan, tensors, **({} if mode == "cuda" else {"all_tiles": all_tiles}))
    assert stats is None or (stats.mma > 0 and stats.atomics == 0)
    doubled = [t if t is None else t.double() for t in weights]
    exact = aten.inverted_residual_folded(x.double(), *doubled, shape.stride, shape.residual)
    eager = aten.inverted_residual_folded(x, *weights, shape.stride, shape.residual)
    assert torch.isfinite(out).all(), f"{case}: not finite (unwritten?)"
    return relative_error(out, exact), relative_error(eager, exact)


def check(mode: str, case: Case, all_tiles: bool = True) -> None:
    """The case's error is within the policy; pytest -rA shows it."""
    error, eager = errors(mode, case, all_tiles)
    print(f"error {error:.2e}, plain torch's {eager:.2e}, {error / eager:.2f} times")
    allowed = MOST_RATIO * eager + FLOOR[list(fused.ELEMENTS)[case.shape.element]]
    assert error <= allowed, f"{case}: error {error:.2e} against float64, plain torch's {eager:.2e}"


def ragged(element: int) -> Iterator[Case]:
    """Every compiled tile at both strides on pictures, tiles and channels that are no multiples of anything but 8."""
    for tile, (inputs, hidden, outputs) in enumerate(
        ((24, 40, 24), (16, 72, 32), (40, 56, 64), (88, 40, 88), (88, 72, 136), (56, 104, 312), (8, 40, 448))
    ):
        for stride in (1, 2):
            residual = stride == 1 and inputs == outputs
            shape = fused.Shape(element, 2, 9, 11, inputs, hidden, outputs, stride, True, residual)
            yield Case(shape, tile, 4, 3)


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    """Where kernels run: see --device."""
    found = request.config.getoption("--device")
    if found == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda, but torch sees no GPU")
    return found


A100_HALF = [case for case in cases(A100, 0) if case.tile == 0]
PLANNED = [dict.fromkeys(case for gpu in GPUS.values() for case in cases(gpu, element)) for element in range(3)]


@pytest.mark.parametrize("case", A100_HALF, ids=str)
def test_blocks_of_the_largest_tile_are_as_exact_as_plain_torch(mode: str, case: Case) -> None:
    check(mode, case, all_tiles=False)


@pytest.mark.parametrize("element", range(3), ids=[str(dtype) for dtype in fused.ELEMENTS])
def test_every_block_shape_of_the_network_is_among_the_cases(element: int) -> None:
    kinds = {shape._replace(height=0, width=0, images=0) for shape in blocks(1.0, 224, 256, element)}
    assert {case.shape._replace(height=0, width=0, images=0) for case in PLANNED[element]} == kinds
    assert len(kinds) == 12


# The first case of a tile compiles it, which takes minutes on a busy machine.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [case for planned in PLANNED for case in planned], ids=str)
def test_every_block_is_as_exact_as_plain_torch_on_every_gpus_plan(mode: str, case: Case) -> None:
    check(mode, case)


# The first case of a tile compiles it, which takes minutes on a busy machine.
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("case", [case for element in range(3) for case in ragged(element)], ids=str)
def test_every_tile_is_as_exact_as_plain_torch_on_ragged_shapes(mode: str, case: Case) -> None:
    check(mode, case)


def _dense(out: Tensor) -> Tensor:
    """The same memory in the order in which it lies."""
    return out.permute(0, 2, 3, 1)
