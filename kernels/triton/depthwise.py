"""Depthwise 3x3 convolution: for training (BatchNorm + ReLU6 before it, statistics after it) and for inference.

A program owns `BLOCK_P` groups of COLS neighbouring output columns and `BLOCK_C` channels, and walks down a strip of
output rows. The columns of a group are Python tuples of [BLOCK_P, BLOCK_C] tensors, that is, registers of one thread:
an input column is loaded, normalised and clamped once and serves up to three outputs, where shifted tiles would do
that work three times. Groups are counted through all rows of all images (group p is group p % groups of image
p // groups), so small pictures fill a program too. Input rows are used as they arrive: each adds its share to the
partial sums of the (up to three) output rows it is a tap of, and only those sums are carried.
"""

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels import layout
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import relu6

SCALE = tl.constexpr(layout.SCALE)
SHIFT = tl.constexpr(layout.SHIFT)

# About three waves of five programs on each of a hundred multiprocessors; a constant, since the number of parts that
# statistics are merged from must not depend on the device.
PROGRAMS = 1536
# Fewer rows would re-read more than half of the input (from L2) as halo of the strips at stride 1.
ROWS_AT_LEAST = 4
# The statistics' relative error is at most about (values per thread) x 2^-24, see _depthwise_kernel.
ROWS_AT_MOST = 56
# Widths of a group: that with the least padding of an image row is taken, the first of equals.
COLUMNS = (7, 8, 6, 5, 4)

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "depthwise": (
        {"BLOCK_P": 4, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 8, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 2, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 2, "BLOCK_C": 64, "num_warps": 2, "num_stages": 1},
        {"BLOCK_P": 8, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1},
        {"BLOCK_P": 8, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
    )
}


# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def zero_columns(COUNT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """A tuple of COUNT zero tiles, each a tensor of its own (loop-carried tuples must not share any)."""
    columns = ()
    for _ in tl.static_range(COUNT):
        columns = columns + (tl.zeros((BLOCK_P, BLOCK_C), ACC),)
    return columns


@triton.jit
def load_taps(weight_ptr, offs_c, mask_c, ACC: tl.constexpr):
    """The nine taps of each channel, a tuple of [1, BLOCK_C] in the order of the kernel's rows."""
    taps = ()
    for tap in tl.static_range(9):
        taps = taps + (tl.load(weight_ptr + offs_c * 9 + tap, mask_c, 0.0).to(ACC)[None, :],)
    return taps


@triton.jit
def load_column(ptrs, column, width, mask_c, CERTAIN: tl.constexpr, ACC: tl.constexpr):
    """One column of a row, zero where it lies outside the image.

    CERTAIN: it never does, for any group. mask_c: the channels' mask, or None where it would be all true.
    """
    if CERTAIN:
        value = tl.load(ptrs) if mask_c is None else tl.load(ptrs, mask_c, 0.0)
    else:
        inside = (column >= 0) & (column < width)
        value = tl.load(ptrs, inside if mask_c is None else inside & mask_c, 0.0)
    return value.to(ACC)


@triton.jit
def activate(z, column, width, CERTAIN: tl.constexpr, ACC: tl.constexpr):
    """relu6(z), zero where the column lies outside the image (a cap of 0 costs nothing there)."""
    return relu6(z, 6.0 if CERTAIN else tl.where((column >= 0) & (column < width), 6.0, 0.0).to(ACC))


@triton.jit
def _load_row(ptrs, first, width, mask_c, bn, C: tl.constexpr, COUNT: tl.constexpr, EXACT: tl.constexpr,
              ACC: tl.constexpr):  # fmt: skip
    """Activations of input columns first ... first + COUNT - 1 of a row, zero outside the image."""
    row = ()
    for j in tl.static_range(COUNT):
        # Where the groups cut a row exactly, only a group's outermost columns can lie outside.
        value = load_column(ptrs + j * C, first + j, width, mask_c, EXACT and j > 0 and j < COUNT - 1, ACC)
        if bn is not None:
            z = value * bn[0] + bn[1]
            value = activate(z, first + j, width, EXACT and j > 0 and j < COUNT - 1, ACC)
        row = row + (value,)
    return row


@triton.jit
def add_taps(sums, row, taps, KH: tl.constexpr, STRIDE: tl.constexpr, COLS: tl.constexpr):
    """sums + the kernel's row KH over an input row, one entry an output column."""
    added = ()
    for j in tl.static_range(COLS):
        total = sums[j]
        for kw in tl.static_range(3):
            total += row[STRIDE * j + kw] * taps[3 * KH + kw]
        added = added + (total,)
    return added


@triton.jit(do_not_specialize=["total", "groups", "strips", "rows", "h", "w", "ho", "wo"])
def _depthwise_kernel(
    x_ptr,
    bn_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    moments_ptr,
    total,
    groups,
    strips,
    rows,
    h,
    w,
    ho,
    wo,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    COLS: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """y = depthwise3x3(relu6(bn(x))) with moments (training), or relu6(depthwise3x3(x) + bias) (inference).

    bn_ptr None: x is taken as it is. moments_ptr None: no statistics. bias_ptr None: no bias and no ReLU6 after.
    Per element of y, 2-byte types: reads stride^2 x 2 B, writes 2 B; halo columns come from L1, halo rows of a strip
    (2 of rows + 2 at stride 1, 1 of 2 rows + 1 at stride 2) from L2. About 23 instructions per element at stride 1 and
    37 at stride 2 (fp16, sm_80): bound by DRAM up to A100 and H100, by issue on faster memory.
    Grid: (channel tiles x strips x position tiles), channel tiles fastest so that rows of memory are read together.

    Statistics: a thread adds up q - first and its square over all its values q of a channel, `first` being the first
    of them. That costs three instructions a value and is sound for any data: first is one of the values, so
    M2 >= (first - mean)^2, hence the sum of squares is at most (n + 1) M2 and what the subtraction at the end can lose
    is n x 2^-24 of M2, n <= COLS * rows. Threads are merged by the centred formula.
    """
    WIDE: tl.constexpr = STRIDE * (COLS - 1) + 3
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_c = (pid % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    part = pid // c_tiles
    top = (part % strips) * rows
    bottom = tl.minimum(top + rows, ho)
    offs_p = (part // strips) * BLOCK_P + tl.arange(0, BLOCK_P)
    # A group past the last repeats it, so that loads need no mask for it; nothing of it is stored or counted.
    image = tl.minimum(offs_p, total - 1) // groups
    column = (tl.minimum(offs_p, total - 1) % groups)[:, None] * COLS
    mask_p = (offs_p < total)[:, None]
    mask_load_c = None if C % BLOCK_C == 0 else mask_c[None, :]

    taps = load_taps(weight_ptr, offs_c, mask_c, ACC)
    bn = None
    if bn_ptr is not None:
        scale = tl.load(bn_ptr + SCALE * C + offs_c, mask_c, 0.0)[None, :]
        shift = tl.load(bn_ptr + SHIFT * C + offs_c, mask_c, 0.0)[None, :]
        bn = (scale, shift)

    first = column * STRIDE - 1
    image = image.to(tl.int64)[:, None]
    x_ptrs = x_ptr + (image * h + top * STRIDE - 1) * w * C + first * C + offs_c[None, :]
    y_ptrs = y_ptr + (image * ho + top) * wo * C + column * C + offs_c[None, :]
    x_step = w * C

    # `upper` is the output row that the next input row completes; at stride 1 `lower` is the one after it.
    if top > 0:
        row = _load_row(x_ptrs, first, w, mask_load_c, bn, C, WIDE, EXACT, ACC)
    else:
        row = zero_columns(WIDE, BLOCK_P, BLOCK_C, ACC)
    upper = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
    x_ptrs += x_step
    if STRIDE == 1:
        row = _load_row(x_ptrs, first, w, mask_load_c, bn, C, WIDE, EXACT, ACC)
        upper = add_taps(upper, row, taps, 1, STRIDE, COLS)
        lower = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
        x_ptrs += x_step

    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_c, mask_c, 0.0)[None, :]
    origin = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    total_1 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    total_2 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for oh in range(top, bottom):
        if STRIDE == 2:
            row = _load_row(x_ptrs, first, w, mask_load_c, bn, C, WIDE, EXACT, ACC)
            upper = add_taps(upper, row, taps, 1, STRIDE, COLS)
            x_ptrs += x_step
        if oh * STRIDE + 1 < h:
            row = _load_row(x_ptrs, first, w, mask_load_c, bn, C, WIDE, EXACT, ACC)
        else:
            row = zero_columns(WIDE, BLOCK_P, BLOCK_C, ACC)
        x_ptrs += x_step
        done = add_taps(upper, row, taps, 2, STRIDE, COLS)
        if STRIDE == 1:
            upper = add_taps(lower, row, taps, 1, STRIDE, COLS)
            lower = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
        else:
            upper = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
        for j in tl.static_range(COLS):
            value = done[j]
            if bias_ptr is not None:
                value = relu6(value + bias, 6.0)
            y = value.to(y_ptr.dtype.element_ty)
            mask = mask_p & mask_c[None, :]
            tl.store(y_ptrs + j * C, y, mask if EXACT else mask & (column + j < wo))
            if moments_ptr is not None:
                y = y.to(ACC)
                if j == 0:
                    origin = tl.where(oh == top, y, origin)
                delta = y - origin if EXACT else tl.where(column + j < wo, y - origin, 0.0)
                total_1 += delta
                total_2 += delta * delta
        y_ptrs += wo * C

    if moments_ptr is not None:
        count = tl.where(mask_p, tl.minimum(wo - column, COLS) * (bottom - top), 0).to(ACC)
        share = total_1 / tl.maximum(count, 1.0)
        counts = tl.sum(tl.broadcast_to(count, (BLOCK_P, BLOCK_C)), 0)
        mean = tl.sum((origin + share) * count, 0) / counts
        spread = origin + share - mean[None, :]
        m2 = tl.sum(tl.where(mask_p, total_2 - total_1 * share + spread * spread * count, 0.0), 0)
        moments_ptrs = moments_ptr + part.to(tl.int64) * 3 * C + offs_c
        tl.store(moments_ptrs, counts, mask_c)
        tl.store(moments_ptrs + C, mean, mask_c)
        tl.store(moments_ptrs + 2 * C, m2, mask_c)


# --- launchers -----------------------------------------------------------------------------------------------


def depthwise(y1: Tensor, bn1: Tensor | None, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """See `mbv2.kernels.aten.depthwise`."""
    y2, moments = _launch(y1 if bn1 is not None else layout.channels_last(y1), bn1, weight, None, stride)
    assert moments is not None
    return y2, moments


def depthwise_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """See `mbv2.kernels.aten.depthwise_folded`."""
    return _launch(layout.channels_last(x), None, weight, bias, stride)[0]


def cut(n: int, rows: int, columns: int, channel_tiles: int, block_p: int) -> tuple[int, int, int]:
    """How a kernel cuts n images of rows x columns: (COLS, rows of a strip, strips); of the shape only."""
    cols = min(COLUMNS, key=lambda size: -columns % size)
    tiles = max(triton.cdiv(n * triton.cdiv(columns, cols), block_p) * channel_tiles, 1)
    strips = min(max(PROGRAMS // tiles, triton.cdiv(rows, ROWS_AT_MOST), 1), triton.cdiv(rows, ROWS_AT_LEAST))
    strip = triton.cdiv(rows, strips)
    return cols, strip, triton.cdiv(rows, strip)


def _launch(
    x: Tensor, bn: Tensor | None, weight: Tensor, bias: Tensor | None, stride: int
) -> tuple[Tensor, Tensor | None]:
    n, c, h, w = x.shape
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    meta = tuning.tile("depthwise", x.dtype, c=c, stride=stride)
    c_tiles = triton.cdiv(c, meta["BLOCK_C"])
    cols, rows, strips = cut(n, ho, wo, c_tiles, meta["BLOCK_P"])
    groups = triton.cdiv(wo, cols)
    parts = triton.cdiv(n * groups, meta["BLOCK_P"]) * strips
    y = layout.new_channels_last(x, (n, c, ho, wo))
    moments = x.new_empty((parts, 3, c), dtype=layout.wide(x.dtype)) if bias is None else None
    acc = tl.float64 if x.dtype.itemsize == 8 else tl.float32
    _depthwise_kernel[(parts * c_tiles,)](
        x, bn, weight, bias, y, moments, n * groups, groups, strips, rows, h, w, ho, wo,
        C=c, STRIDE=stride, COLS=cols, EXACT=wo % cols == 0, ACC=acc, **meta,
    )  # fmt: skip
    return y, moments
