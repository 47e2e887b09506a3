"""What a fused block moves of global memory, counted in distinct 32-byte sectors: input, output and weights, once."""

import pytest
import torch
from emulated_cuda import A100, NAMES, block, emulated_launch
from ptxcpu.nvcc import find_nvcc
from stage_check import activations
from test_cuda_plan import blocks

from mbv2.kernels.cuda import fused

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")]


def moved(shape: fused.Shape) -> tuple[int, int]:
    """Bytes of activations and of weights that one picture moves under the plan for 256."""
    whole = fused.plan_for(shape._replace(images=256), A100)
    assert isinstance(whole, fused.Plan)
    wish = {"tile": whole.tile, "tile_height": whole.height, "tile_width": whole.width, "splits": 1}
    plan = fused.plan_for(shape, A100, **wish)
    assert isinstance(plan, fused.Plan) and NAMES[plan.element] == "half"
    weights = block(shape.inputs, shape.hidden, shape.outputs, torch.float16, shape.expands)
    w1, b1, wd, bd, w3, b3 = weights
    x = activations(1, shape.inputs, shape.height, shape.width, torch.float16)
    ho, wo = (shape.height - 1) // shape.stride + 1, (shape.width - 1) // shape.stride + 1
    out = torch.empty(1, ho, wo, shape.outputs, dtype=torch.float16)
    tensors = (x, w1, wd, w3, b1, bd, b3, out, None)
    stats = emulated_launch(plan, tensors, count_sectors=True)
    given = [t for t in tensors if t is not None]
    # Memory is numbered after the kernel's one argument.
    bytes_of = {
        id(t): 32 * (s.loads + s.stores) for i, t in enumerate(given) if (s := stats.sectors.get(str(1 + i))) is not None
    }
    activations_moved = bytes_of[id(x)] + bytes_of[id(out)]
    weights_moved = sum(bytes_of[id(t)] for t in weights if t is not None)
    assert activations_moved <= 1.1 * (x.nbytes + out.nbytes), (shape, activations_moved)
    assert weights_moved <= 1.1 * sum(t.nbytes for t in weights if t is not None) + 6 * 64, (shape, weights_moved)
    assert stats.total_sectors.loads * 32 + stats.total_sectors.stores * 32 == activations_moved + weights_moved
    return activations_moved, weights_moved


def test_a_picture_moves_its_blocks_inputs_and_outputs_only() -> None:
    # Blocks of a kind move the same, so each kind is run once.
    counted = {shape: moved(shape) for shape in dict.fromkeys(blocks(1.0, 224, 1))}
    total = sum(counted[shape][0] for shape in blocks(1.0, 224, 1))
    assert total <= 5e6, f"{total / 1e6:.2f} MB"
