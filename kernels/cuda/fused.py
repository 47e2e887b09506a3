"""A whole inverted residual block for inference in one launch, or in two: csrc/cuda/fused_block.cuh, product.cuh.

In one launch the hidden activations never leave the SM; a pair writes the depthwise results to memory and projects them
in a second launch. A planner in C++ (csrc/cuda/plan*.cpp, through `mbv2._C`) chooses and cuts the work by the block's
shape and the GPU's limits; `mbv2._cuda` launches it. What the kernels cannot take falls to the next backend.
"""

import functools
import importlib
from collections.abc import Sequence
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
    """How a launch is cut that makes a whole block, or a pair's expand and depthwise.

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


class Product(NamedTuple):
    """How the launch is cut that projects a pair's hidden tensor.

    Attributes:
        element: index of the activations' type in `ELEMENTS`.
        tile: index of the compiled tile shape (MBV2_PRODUCT_TILES in csrc/cuda/product_params.h).
        blocks, threads, shared_bytes, microseconds, instructions, params: as those of `Plan`.
    """

    element: int
    tile: int
    blocks: int
    threads: int
    shared_bytes: int
    microseconds: float
    instructions: float
    params: bytes


class Pair(NamedTuple):
    """Two launches for a block, with the depthwise results in memory between them.

    Attributes:
        front: expand and depthwise.
        product: project.
        microseconds: the planner's estimate for both.
    """

    front: Plan
    product: Product
    microseconds: float


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

    One launch, two where the planner splits the hidden channels or takes a pair. float16 and bfloat16 on tensor cores
    with float32 sums; float32 as three products of tf32 each, whose error is float32's. Channels must be multiples of
    8, at most 448 of the projection; anything else runs through the next backend.
    """
    weights = [None if t is None else t.contiguous() for t in (w1, wd, w3, b1, bd, b3)]
    plan = choice_for(shape_of(x, w1, wd, w3, stride, residual), gpu_of(x.device))
    if isinstance(plan, str) or any(t is not None and t.data_ptr() % 16 for t in (x, *weights)):
        from mbv2.kernels.cuda.stages import next_best

        return next_best().inverted_residual_folded(x, w1, b1, wd, bd, w3, b3, stride, residual)
    return run(plan, x, weights, stride, residual)


def run(plan: Plan | Pair, x: Tensor, weights: Sequence[Tensor | None], stride: int, residual: bool) -> Tensor:
    """The block as planned; weights: w1, wd, w3, b1, bd, b3, contiguous and 16-byte aligned as x is."""
    w1, wd, w3, b1, bd, b3 = weights
    assert wd is not None and w3 is not None
    n, _, h, w = x.shape
    size = (h - 1) // stride + 1, (w - 1) // stride + 1
    out = new_channels_last(x, (n, w3.shape[0], *size))
    if isinstance(plan, Pair):
        hidden = new_channels_last(x, (n, wd.shape[0], *size))
        launch(plan.front, (x, w1, wd, None, b1, bd, None, hidden, None))
        launch_product(plan.product, (hidden, w3, b3, x if residual else None, out))
        return out
    partial = x.new_empty(plan.partial_bytes // 4, dtype=torch.float32) if plan.partial_bytes else None
    launch(plan, (x, *weights, out, partial))
    return out


def shape_of(x: Tensor, w1: Tensor | None, wd: Tensor, w3: Tensor, stride: int, residual: bool) -> Shape:
    """A call's sizes."""
    n, cin, h, w = x.shape
    return Shape(ELEMENTS[x.dtype], n, h, w, cin, wd.shape[0], w3.shape[0], stride, w1 is not None, residual)


@functools.lru_cache(maxsize=4096)
def choice_for(shape: Shape, gpu: Gpu, **wish: int) -> Plan | Pair | str:
    """The planner's choice for a block, or why there is none.

    Args:
        shape: of the block.
        gpu: it runs on.
        wish: cut (0: one launch, 1: a pair), tile, tile_images, tile_height, tile_width, splits, product (a pair's tile
            of its second launch), where the choice is not the planner's.
    """
    planner: Any = importlib.import_module("mbv2._C")
    try:
        found = planner.plan_block(*shape, *gpu, **wish)
    except ValueError as error:
        return str(error)
    if found is None:
        pair = wish.get("cut") == 1 and not shape.expands
        return "a block without expansion is one launch" if pair else "no tile fits the GPU's shared memory"
    block = Plan(shape.element, *(found["block"][name] for name in Plan._fields[1:]))
    if found["product"] is None:
        return block
    product = Product(shape.element, *(found["product"][name] for name in Product._fields[1:]))
    return Pair(block, product, found["microseconds"])


def plan_for(shape: Shape, gpu: Gpu, **wish: int) -> Plan | str:
    """The best plan in one launch, or why there is none; arguments as those of `choice_for`, without `cut`."""
    found = choice_for(shape, gpu, cut=0, **wish)
    assert not isinstance(found, Pair)
    return found


def pair_for(shape: Shape, gpu: Gpu, **wish: int) -> Pair | str:
    """The best pair, or why there is none; arguments as those of `choice_for`, without `cut`."""
    found = choice_for(shape, gpu, cut=1, **wish)
    assert not isinstance(found, Plan)
    return found


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


def launch_product(plan: Product, tensors: tuple[Tensor | None, ...]) -> None:
    """Put a pair's second launch on the current stream; tensors: x, w, bias, shortcut, out."""
    compiled: Any = importlib.import_module("mbv2._cuda")
    stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
    addresses = tuple(0 if t is None else t.data_ptr() for t in tensors)
    compiled.launch_product(plan.element, plan.tile, plan.blocks, plan.shared_bytes, plan.params, stream, addresses)
