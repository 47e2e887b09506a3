"""Backward of the depthwise 3x3 stage: gradients of its input and of its weight in one pass over the activations.

Cut like the forward (see `depthwise`): a program owns `BLOCK_P` groups of COLS neighbouring columns of the output's
gradient and `BLOCK_C` channels, and walks down a strip of rows. It goes over input positions: the gradients dy that
reach one are the same ones that its activation meets in the weight's gradient, so each dy is computed once a thread,
and activations are needed at the thread's own positions only. At stride 2 an output position stands for a 2x2 quad of
input positions, which 1, 2, 2 and 4 of the nine taps reach; none is wasted.
"""

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels import layout
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.depthwise import SCALE, SHIFT, activate, cut, load_column, load_taps, zero_columns
from mbv2.kernels.triton.reduce import sum_parts

MEAN = tl.constexpr(layout.MEAN)

# At stride 1 the compiler takes 170 registers for two channels a thread, and 168 are the most with which three programs
# fit in a multiprocessor; at stride 2 it needs 142, and would use up the limit where one is given.
CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "depthwise_backward": (
        {"BLOCK_P": 4, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 168},
        {"BLOCK_P": 8, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1, "maxnreg": 168},
        {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1, "maxnreg": 168},
        {"BLOCK_P": 4, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 8, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 16, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 4, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1},
        {"BLOCK_P": 8, "BLOCK_C": 32, "num_warps": 8, "num_stages": 1},
    )
}


# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _load_dy(dz_ptrs, y_ptrs, first, width, mask_c, coef, C: tl.constexpr, LEFT: tl.constexpr, COLS: tl.constexpr,
             EXACT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """dy = a dz + b y + c at columns first ... first + LEFT + COLS of a row, zero outside the image."""
    row = ()
    for j in tl.static_range(LEFT + COLS + 1):
        # Where the groups cut a row exactly, only the columns of the neighbouring groups can lie outside.
        dz = load_column(dz_ptrs + j * C, first + j, width, mask_c, EXACT and j >= LEFT and j < LEFT + COLS, ACC)
        y = load_column(y_ptrs + j * C, first + j, width, mask_c, EXACT and j >= LEFT and j < LEFT + COLS, ACC)
        dy = coef[0] * dz + (coef[1] * y + coef[2])
        if not (EXACT and j >= LEFT and j < LEFT + COLS):
            dy = tl.where((first + j >= 0) & (first + j < width), dy, 0.0)
        row = row + (dy,)
    return row


@triton.jit
def _dy_at(dy_rows, ROW: tl.constexpr, COLUMN: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, STRIDE: tl.constexpr):
    """dy at the output position that tap (KH, KW) connects to an input position, None where there is none.

    ROW, COLUMN: the input position, counted from where the tap (1, 1) of the group's first output position lies.
    """
    if (ROW + 1 - KH) % STRIDE == 0 and (COLUMN + 1 - KW) % STRIDE == 0:
        # The row after comes first in dy_rows; at stride 1 a column of the left neighbour comes first in a row.
        dy = dy_rows[1 - (ROW + 1 - KH) // STRIDE][2 - STRIDE + (COLUMN + 1 - KW) // STRIDE]
    else:
        dy = None
    return dy


@triton.jit
def _add_weight_gradient(dweight, a, dy_rows, ROW: tl.constexpr, COLUMN: tl.constexpr, STRIDE: tl.constexpr):
    """dweight with what the activation `a` of one input position adds to each of the nine taps."""
    added = ()
    for tap in tl.static_range(9):
        dy = _dy_at(dy_rows, ROW, COLUMN, tap // 3, tap % 3, STRIDE)
        added = added + (dweight[tap] if dy is None else dweight[tap] + a * dy,)
    return added


@triton.jit
def _input_row(y1_ptrs, dz1_ptrs, first, width, mask_store, mask_c, bn, taps, dy_rows, dweight, sum_1, sum_2,
               ROW: tl.constexpr, NEED_INPUT: tl.constexpr, NEED_WEIGHT: tl.constexpr, C: tl.constexpr,
               STRIDE: tl.constexpr, COLS: tl.constexpr, EXACT: tl.constexpr, ACC: tl.constexpr):  # fmt: skip
    """The gradients at one row of input positions.

    dy_rows: the output's rows of dy after, at and (stride 1) before the row's; ROW: the row's number modulo STRIDE.
    Returns dweight, sum_1 and sum_2 with the row added.
    """
    for i in tl.static_range(STRIDE * COLS):
        column = first + i
        if NEED_WEIGHT or bn is not None:
            y1 = load_column(y1_ptrs + i * C, column, width, mask_c, EXACT and i <= STRIDE * (COLS - 1), ACC)
            a = y1
            if bn is not None:
                z = y1 * bn[0] + bn[1]
                a = activate(z, column, width, EXACT and i <= STRIDE * (COLS - 1), ACC)
        if NEED_WEIGHT:
            dweight = _add_weight_gradient(dweight, a, dy_rows, ROW, i, STRIDE)
        if NEED_INPUT:
            da = tl.zeros_like(sum_1)
            for tap in tl.static_range(9):
                dy = _dy_at(dy_rows, ROW, i, tap // 3, tap % 3, STRIDE)
                if dy is not None:
                    da += dy * taps[tap]
            if bn is not None:
                da = tl.where((z <= 0.0) | (z >= 6.0), 0.0, da)
            dz1 = da.to(dz1_ptrs.dtype.element_ty)
            inside = column < width
            tl.store(dz1_ptrs + i * C, dz1, mask_store & inside)
            if bn is not None:
                dz1 = dz1.to(ACC)
                if not (EXACT and i <= STRIDE * (COLS - 1)):
                    dz1 = tl.where(inside, dz1, 0.0)
                sum_1 += dz1
                sum_2 += dz1 * (y1 - bn[2])
    return dweight, sum_1, sum_2


@triton.jit(do_not_specialize=["total", "groups", "strips", "rows", "h", "w", "ho", "wo"])
def _depthwise_backward_kernel(
    dz2_ptr,
    y2_ptr,
    coef_ptr,
    y1_ptr,
    bn_ptr,
    weight_ptr,
    dz1_ptr,
    sums_ptr,
    dweight_ptr,
    total,
    groups,
    strips,
    rows,
    h,
    w,
    ho,
    wo,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    C: tl.constexpr,
    STRIDE: tl.constexpr,
    COLS: tl.constexpr,
    EXACT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dy2 = A dz2 + B y2 + C; dz1 = relu6'(bn1(y1)) depthwise3x3^T(dy2) with its sums; parts of the weight's gradient.

    bn_ptr None: nothing is masked or summed. Without NEED_INPUT nothing is written but the weight's gradient, without
    NEED_WEIGHT no part of it; y1 is not read where neither needs it.
    Per element of y1, 2-byte types: reads 2 B of y1 and 4 / stride^2 B of dz2 and y2, writes 2 B. Halo columns come
    from L1, halo rows of a strip (2 of rows + 2 at stride 1, 1 of rows + 1 at stride 2) from L2.
    About 45 instructions per element of y1 at stride 1 and 90 per quad at stride 2 (fp16, sm_80): bound by DRAM up to
    A100 and H100, by issue on faster memory.
    Grid: (channel tiles x strips x position tiles), channel tiles fastest so that rows of memory are read together.
    """
    LEFT: tl.constexpr = 1 if STRIDE == 1 else 0
    c_tiles: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    offs_c = (pid % c_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    part = pid // c_tiles
    top = (part % strips) * rows
    bottom = tl.minimum(top + rows, ho)
    offs_p = (part // strips) * BLOCK_P + tl.arange(0, BLOCK_P)
    # A group past the last repeats it, so that loads need no mask for it; nothing of it is stored or counted.
    image = (tl.minimum(offs_p, total - 1) // groups).to(tl.int64)[:, None]
    column = (tl.minimum(offs_p, total - 1) % groups)[:, None] * COLS
    mask_p = (offs_p < total)[:, None]
    mask_store = mask_p & mask_c[None, :]
    mask_load_c = None if C % BLOCK_C == 0 else mask_c[None, :]

    taps = load_taps(weight_ptr, offs_c, mask_c, ACC)
    coef_a = tl.load(coef_ptr + offs_c, mask_c, 0.0)[None, :]
    coef_b = tl.load(coef_ptr + C + offs_c, mask_c, 0.0)[None, :]
    coef_c = tl.load(coef_ptr + 2 * C + offs_c, mask_c, 0.0)[None, :]
    coef = (coef_a, coef_b, coef_c)
    bn = None
    if bn_ptr is not None:
        scale = tl.load(bn_ptr + SCALE * C + offs_c, mask_c, 0.0)[None, :]
        shift = tl.load(bn_ptr + SHIFT * C + offs_c, mask_c, 0.0)[None, :]
        mean = tl.load(bn_ptr + MEAN * C + offs_c, mask_c, 0.0)[None, :]
        bn = (scale, shift, mean)

    first = column - LEFT
    offs_2 = (image * ho + top) * wo * C + first * C + offs_c[None, :]
    dz2_ptrs = dz2_ptr + offs_2
    y2_ptrs = y2_ptr + offs_2
    step_2 = wo * C
    offs_1 = (image * h + top * STRIDE) * w * C + column * STRIDE * C + offs_c[None, :]
    y1_ptrs = y1_ptr + offs_1
    dz1_ptrs = dz1_ptr + offs_1
    step_1 = w * C

    # Three rows of dy, each with a tensor of its own before the loop: the compiler loses rotated ones that share one.
    above = zero_columns(LEFT + COLS + 1, BLOCK_P, BLOCK_C, ACC)
    if STRIDE == 1 and top > 0:
        above = _load_dy(dz2_ptrs - step_2, y2_ptrs - step_2, first, wo, mask_load_c, coef, C, LEFT, COLS, EXACT, ACC)
    level = _load_dy(dz2_ptrs, y2_ptrs, first, wo, mask_load_c, coef, C, LEFT, COLS, EXACT, ACC)
    dweight = zero_columns(9, BLOCK_P, BLOCK_C, ACC)
    sum_1 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    sum_2 = tl.zeros((BLOCK_P, BLOCK_C), ACC)
    for oh in range(top, bottom):
        dz2_ptrs += step_2
        y2_ptrs += step_2
        if oh + 1 < ho:
            below = _load_dy(dz2_ptrs, y2_ptrs, first, wo, mask_load_c, coef, C, LEFT, COLS, EXACT, ACC)
        else:
            below = zero_columns(LEFT + COLS + 1, BLOCK_P, BLOCK_C, ACC)
        dy_rows = (below, level, above)
        dweight, sum_1, sum_2 = _input_row(
            y1_ptrs, dz1_ptrs, column * STRIDE, w, mask_store, mask_load_c, bn, taps, dy_rows, dweight, sum_1, sum_2,
            0, NEED_INPUT, NEED_WEIGHT, C, STRIDE, COLS, EXACT, ACC,
        )  # fmt: skip
        y1_ptrs += step_1
        dz1_ptrs += step_1
        if STRIDE == 2:
            if 2 * oh + 1 < h:
                dweight, sum_1, sum_2 = _input_row(
                    y1_ptrs, dz1_ptrs, column * STRIDE, w, mask_store, mask_load_c, bn, taps, dy_rows, dweight, sum_1,
                    sum_2, 1, NEED_INPUT, NEED_WEIGHT, C, STRIDE, COLS, EXACT, ACC,
                )  # fmt: skip
            y1_ptrs += step_1
            dz1_ptrs += step_1
        if STRIDE == 1:
            above = level
        level = below

    if sums_ptr is not None:
        sums_ptrs = sums_ptr + part.to(tl.int64) * 2 * C + offs_c
        tl.store(sums_ptrs, tl.sum(tl.where(mask_p, sum_1, 0.0), 0), mask_c)
        tl.store(sums_ptrs + C, tl.sum(tl.where(mask_p, sum_2, 0.0), 0), mask_c)
    if NEED_WEIGHT:
        dweight_ptrs = dweight_ptr + (part.to(tl.int64) * C + offs_c) * 9
        for tap in tl.static_range(9):
            tl.store(dweight_ptrs + tap, tl.sum(tl.where(mask_p, dweight[tap], 0.0), 0), mask_c)


# --- launcher ------------------------------------------------------------------------------------------------


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
    """See `mbv2.kernels.aten.depthwise_backward`."""
    if not (need_input or need_weight):
        return None, None, None
    if bn1 is None:
        y1 = layout.channels_last(y1)
    n, c, h, w = y1.shape
    ho, wo = y2.shape[2:]
    meta = tuning.tile("depthwise_backward", y1.dtype, c=c, stride=stride)
    c_tiles = triton.cdiv(c, meta["BLOCK_C"])
    cols, rows, strips = cut(n, ho, wo, c_tiles, meta["BLOCK_P"])
    groups = triton.cdiv(wo, cols)
    parts = triton.cdiv(n * groups, meta["BLOCK_P"]) * strips
    wide = layout.wide(y1.dtype)
    dz1 = layout.new_channels_last(y1, (n, c, h, w)) if need_input else None
    sums = y1.new_empty((parts, 2, c), dtype=wide) if need_input and bn1 is not None else None
    dweight = y1.new_empty((parts, c, 9), dtype=wide) if need_weight else None
    _depthwise_backward_kernel[(parts * c_tiles,)](
        dz2, y2, coef2, y1, bn1, weight, y1 if dz1 is None else dz1, sums, dweight,
        n * groups, groups, strips, rows, h, w, ho, wo,
        NEED_INPUT=need_input, NEED_WEIGHT=need_weight, C=c, STRIDE=stride, COLS=cols, EXACT=wo % cols == 0,
        ACC=tl.float64 if wide.itemsize == 8 else tl.float32, **meta,
    )  # fmt: skip
    return dz1, sums, None if dweight is None else sum_parts(dweight, weight)
