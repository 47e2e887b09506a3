"""A whole inverted residual block for inference in one launch: what csrc/cuda/fused_block.cuh computes.

The hidden activations never leave the SM. A planner in C++ (csrc/cuda/plan.cpp, through `mbv2._C`) cuts the work by the
block's shape and the GPU's limits; `mbv2._cuda` launches it. What the kernel cannot take falls to the next backend.
"""

import functools
import importlib
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mbv2.kernels.layout import new_channels_last

ELEMENTS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}


class Gpu(NamedTuple):
    """What the planner is told of a GPU: 80 for compute capability 8.0, SMs, bytes of shared memory."""

    arch: int
    processors: int
    shared_per_block: int
    shared_per_processor: int


class Shape(NamedTuple):
    """A block's sizes, as the planner takes them."""

    element: int
    images: int
    height: int
    width: int
    inputs: int
    hidden: int
    outputs: int
    stride: int
    expands: bool
    residual: bool


class Plan(NamedTuple):
    """How a launch is cut.

    Attributes:
        element: index of the activations' type in `ELEMENTS`.
        tile: index of the compiled tile shape (MBV2_FUSED_TILES in csrc/cuda/fused_params.h).
        images, height, width: outputs of a thread block.
        splits: thread blocks that share a tile's hidden channels; more than one: a second kernel adds their sums.
        blocks: of the grid.
        threads: of a thread block.
        shared_bytes: of dynamic shared memory.
        partial_bytes: of the tensor of partial sums.
        microseconds: the planner's estimate, for comparing plans.
        instructions: the planner's estimate of those of all threads, the second kernel's left out.
        params: the kernel's parameter struct, without addresses.
    """

    element: int
    tile: int
    images: int
    height: int
    width: int
    splits: int
    blocks: int
    threads: int
    shared_bytes: int
    partial_bytes: int
    microseconds: float
    instructions: float
    params: bytes


def inverted_residual_folded(
    x: Tensor,
    w1: Tensor | None,
    b1: Tensor | None,
    wd: Tensor,
    bd: Tensor,
    w3: Tensor,
    b3: Tensor,
    stride: int,
    residual: bool,
) -> Tensor:
    """See `mbv2.kernels.aten.inverted_residual_folded`.

    One launch, two where the planner splits the hidden channels. float16 and bfloat16 on tensor cores with float32
    sums; float32 as three products of tf32 each, whose error is float32's. Channels must be multiples of 8, at most
    448 of the projection; anything else runs through the next backend.
    """
    n, _, h, w = x.shape
    weights = [None if t is None else t.contiguous() for t in (w1, wd, w3, b1, bd, b3)]
    plan = plan_for(shape_of(x, w1, wd, w3, stride, residual), gpu_of(x.device))
    if not isinstance(plan, Plan) or any(t is not None and t.data_ptr() % 16 for t in (x, *weights)):
        from mbv2.kernels.cuda.stages import next_best

        return next_best().inverted_residual_folded(x, w1, b1, wd, bd, w3, b3, stride, residual)
    out = new_channels_last(x, (n, w3.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1))
    partial = x.new_empty(plan.partial_bytes // 4, dtype=torch.float32) if plan.partial_bytes else None
    launch(plan, (x, *weights, out, partial))
    return out


def shape_of(x: Tensor, w1: Tensor | None, wd: Tensor, w3: Tensor, stride: int, residual: bool) -> Shape:
    """A call's sizes."""
    n, cin, h, w = x.shape
    return Shape(ELEMENTS[x.dtype], n, h, w, cin, wd.shape[0], w3.shape[0], stride, w1 is not None, residual)


@functools.lru_cache(maxsize=4096)
def plan_for(shape: Shape, gpu: Gpu, **wish: int) -> Plan | str:
    """The planner's choice for a block, or why there is none.

    Args:
        shape: of the block.
        gpu: it runs on.
        wish: tile, tile_images, tile_height, tile_width or splits, where the choice is not the planner's.
    """
    planner: Any = importlib.import_module("mbv2._C")
    try:
        found = planner.plan_block(*shape, *gpu, **wish)
    except ValueError as error:
        return str(error)
    if found is None:
        return "no tile fits the GPU's shared memory"
    return Plan(shape.element, *(found[name] for name in Plan._fields[1:]))


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The limits of `device`."""
    found = torch.cuda.get_device_properties(device)
    return Gpu(
        found.major * 10 + found.minor,
        found.multi_processor_count,
        found.shared_memory_per_block_optin,
        found.shared_memory_per_multiprocessor,
    )


def launch(plan: Plan, tensors: tuple[Tensor | None, ...]) -> None:
    """Put a plan on the current stream; tensors: x, w1, wd, w3, b1, bd, b3, out, partial."""
    compiled: Any = importlib.import_module("mbv2._cuda")
    stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    compiled.launch_block(plan.element, plan.tile, plan.blocks, plan.shared_bytes, plan.params, stream, addresses)
