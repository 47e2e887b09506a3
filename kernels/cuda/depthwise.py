"""Training's depthwise stages in CUDA C++ (csrc/cuda/depthwise_*.cu): how they are cut, and their launchers.

A block owns 16 channels and walks down a strip of rows of a few groups: a group is up to `columns` neighbouring
columns of the output, of one image, counted through all images. In 16-bit types a row of them lies in shared memory; in
float32 a thread owns a group. As in the Triton kernels the cut depends on the shape only, so that equal shapes give
equal bits on every GPU.
"""

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from mbv2.kernels import layout

# Channels of a block.
SLAB = 16
# Pixels of a row that a block holds in shared memory, halo columns included, by stride; 16-bit types.
FORWARD_PIXELS = {1: 128, 2: 128}
BACKWARD_PIXELS = {1: 128, 2: 64}
# Columns of a group and groups of a block in float32: kColumns and kGroups of csrc/cuda/depthwise_single.cu.
SINGLE_COLUMNS, SINGLE_GROUPS = 4, 16
# About three waves of four blocks on each of a hundred multiprocessors; a constant, since the number of parts that
# statistics are merged from must not depend on the device.
BLOCKS = 1536
# Fewer rows would fetch and activate more than a quarter of the input again as halo of the strips at stride 1.
ROWS_AT_LEAST = 7
# What the statistics of one block lose grows with the values it adds up.
ROWS_AT_MOST = 56
# Offsets inside a block are 32-bit numbers of elements.
_MOST = 2**31
_TYPES = (torch.float16, torch.bfloat16, torch.float32)


class Cut(NamedTuple):
    """How a launch is cut, see `DepthwiseCut` in csrc/cuda/depthwise_params.h."""

    columns: int
    groups: int
    chunks: int
    rows: int
    strips: int

    def parts(self, n: int) -> int:
        """Blocks that share a slab of channels."""
        return -(-n * self.chunks // self.groups) * self.strips


_POINTER, _INT = ctypes.c_uint64, ctypes.c_int32
_SIZES = (*((name, _INT) for name in ("n", "c", "h", "w", "ho", "wo")), ("cut", _INT * 5))


class ForwardParams(ctypes.Structure):
    """`DepthwiseParams` of csrc/cuda/depthwise_params.h."""

    _fields_ = (*((name, _POINTER) for name in ("x", "bn", "weight", "y", "moments")), *_SIZES)


class BackwardParams(ctypes.Structure):
    """`DepthwiseBackwardParams` of the same file."""

    _fields_ = (
        *((name, _POINTER) for name in ("dz2", "y2", "coef", "y1", "bn", "weight", "dz1", "sums", "dweight")),
        *_SIZES,
    )


@lru_cache(maxsize=4096)
def cut(n: int, c: int, h: int, w: int, stride: int, itemsize: int, backward: bool = False) -> Cut:
    """The cut of images of h x w (the convolution's input).

    The width of a group and their number are those for which the fewest values are fetched and computed in vain.
    """
    rows, width = (h - 1) // stride + 1, (w - 1) // stride + 1
    if itemsize == 4:
        columns, groups, chunks = SINGLE_COLUMNS, SINGLE_GROUPS, -(-width // SINGLE_COLUMNS)
    else:
        columns, groups, chunks = _row(n, c, h, w, stride, backward)
    blocks = max(1, -(-n * chunks // groups) * -(-c // SLAB))
    strips = min(max(BLOCKS // blocks, -(-rows // ROWS_AT_MOST), 1), -(-rows // ROWS_AT_LEAST))
    strip = -(-rows // strips)
    return Cut(columns, groups, chunks, strip, -(-rows // strip))


def _row(n: int, c: int, h: int, w: int, stride: int, backward: bool) -> tuple[int, int, int]:
    """Columns of a group, groups of a block and groups of an image where rows lie in shared memory."""
    width = (w - 1) // stride + 1
    pixels = BACKWARD_PIXELS[stride] if backward else FORWARD_PIXELS[stride]
    # The backward pass goes over positions of the output's gradient, of which at stride 2 it needs the next one too.
    step, around = (1, 3 - stride) if backward else (stride, 3 - stride)
    outputs = pixels // step
    best = None
    for columns in range(1, min(width, outputs) + 1):
        chunks = -(-width // columns)
        halo = columns * step + around
        # Of 16 neighbouring columns one must be there: its value is the origin of the statistics.
        if -(-width // chunks) != columns or halo > pixels or chunks * columns - width >= 16:
            continue
        most = max(1, min(pixels // halo, outputs // columns, n * chunks)) if n * h * w * c < _MOST else 1
        for groups in range(1, most + 1):
            tiles = -(-groups * columns // 16)
            # Tiles are dealt to four warps, which wait for each other at every row.
            computed = 16 * (tiles + 4 * -(-tiles // 4)) / 2
            price = (groups * halo * step + computed) * chunks * columns / (groups * columns * width)
            key = (price, -groups * columns)
            if best is None or key < best[0]:
                best = key, columns, groups, chunks
    assert best is not None
    return best[1:]


def refusal(x: Tensor) -> str | None:
    """Why the kernels cannot take an input [N, C, H, W], or None."""
    if x.dtype not in _TYPES:
        return f"{x.dtype} has no kernel, only {', '.join(str(t).removeprefix('torch.') for t in _TYPES)} have"
    if x.shape[1] % 8:
        return f"{x.shape[1]} channels are no multiple of 8"
    if x.shape[1] * x.shape[3] >= _MOST:
        return "a row of the image has too many values"
    return None


def depthwise(y1: Tensor, bn1: Tensor | None, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """See `mbv2.kernels.aten.depthwise`.

    Raises:
        ValueError: `refusal` has a reason.
    """
    _check(y1)
    x = y1 if bn1 is not None else layout.channels_last(y1)
    n, c, h, w = x.shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    plan = cut(n, c, h, w, stride, x.dtype.itemsize)
    y2 = layout.new_channels_last(x, (n, c, ho, wo))
    moments = x.new_empty((plan.parts(n), 3, c), dtype=torch.float32)
    _forward(x, bn1, weight, y2, moments, stride, plan)
    return y2, moments


def depthwise_backward(
    dz2: Tensor,
    y2: Tensor,
    coef2: Tensor,
    y1: Tensor,
    bn1: Tensor | None,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `mbv2.kernels.aten.depthwise_backward`.

    Raises:
        ValueError: `refusal` has a reason.
    """
    _check(y1)
    if not (need_input or need_weight):
        return None, None, None
    if bn1 is None:
        y1 = layout.channels_last(y1)
    n, c, h, w = y1.shape
    plan = cut(n, c, h, w, stride, y1.dtype.itemsize, backward=True)
    parts = plan.parts(n)
    dz1 = layout.new_channels_last(y1, (n, c, h, w)) if need_input else None
    sums = y1.new_empty((parts, 2, c), dtype=torch.float32) if need_input and bn1 is not None else None
    dweight = y1.new_empty((parts, c, 9), dtype=torch.float32) if need_weight else None
    _backward(dz2, y2, coef2, y1, bn1, weight, dz1, sums, dweight, stride, plan)
    return dz1, sums, None if dweight is None else _added(dweight, weight)


def _added(parts: Tensor, like: Tensor) -> Tensor:
    """parts [G, C, 9] added in a fixed order, with `like`'s shape, strides and type."""
    if find_spec("triton") is not None:
        from mbv2.kernels.triton.reduce import sum_parts

        return sum_parts(parts, like)
    out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    return out.copy_(parts.sum(0).view(like.shape))


def _check(x: Tensor) -> None:
    reason = refusal(x)
    if reason is not None:
        raise ValueError(f"the CUDA depthwise kernels cannot take this input: {reason}")


def _forward(x: Tensor, bn: Tensor | None, weight: Tensor, y: Tensor, moments: Tensor, stride: int, plan: Cut) -> None:
    arrays = {"x": x, "bn": bn, "weight": weight.contiguous(), "y": y, "moments": moments}
    _launch("depthwise", ForwardParams(), arrays, x, y, stride, plan)


def _backward(
    dz2: Tensor,
    y2: Tensor,
    coef: Tensor,
    y1: Tensor,
    bn: Tensor | None,
    weight: Tensor,
    dz1: Tensor | None,
    sums: Tensor | None,
    dweight: Tensor | None,
    stride: int,
    plan: Cut,
) -> None:
    arrays = {
        "dz2": dz2, "y2": y2, "coef": coef, "y1": y1, "bn": bn, "weight": weight.contiguous(), "dz1": dz1, "sums": sums,
        "dweight": dweight,
    }  # fmt: skip
    _launch("depthwise_backward", BackwardParams(), arrays, y1, y2, stride, plan)


def _launch(
    stage: str,
    params: ForwardParams | BackwardParams,
    arrays: dict[str, Tensor | None],
    x: Tensor,
    y: Tensor,
    stride: int,
    plan: Cut,
) -> None:
    """Fill in `params` and hand the launch over; x is the convolution's input and y its output."""
    for name, array in arrays.items():
        setattr(params, name, 0 if array is None else array.data_ptr())
    params.n, params.c, params.h, params.w = x.shape
    params.ho, params.wo = y.shape[2:]
    params.cut = (_INT * 5)(*plan)
    submit(stage, params, arrays, x, stride, plan)


def submit(
    stage: str,
    params: ForwardParams | BackwardParams,
    arrays: dict[str, Tensor | None],
    x: Tensor,
    stride: int,
    plan: Cut,
) -> None:
    """Launch on the current stream of x's device. `arrays`, which hold the memory, outlive the call by stream order."""
    from mbv2 import _cuda

    stream = torch.cuda.current_stream(x.device).cuda_stream
    getattr(_cuda, f"launch_{stage}")(bytes(params), _TYPES.index(x.dtype), stride, stream)
