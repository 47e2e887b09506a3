"""Inference, BatchNorm folded: two stages of a block in one kernel, and which pair of a block to fuse.

The expanded tensor is the largest of a block. One kernel here ends with the depthwise convolution and never stores
its input, the other begins with it and never stores its output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import new_channels_last
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import arithmetic, relu6
from mbv2.kernels.triton.depthwise import add_taps, depthwise_folded, load_taps, zero_columns
from mbv2.kernels.triton.pointwise import pointwise_folded

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "expand_depthwise_folded": (
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 16, "COLS": 7, "num_warps": 4, "num_stages": 2},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 32, "COLS": 7, "num_warps": 4, "num_stages": 2},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 64, "COLS": 7, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 16, "BLOCK_C": 64, "BLOCK_K": 32, "COLS": 4, "num_warps": 4, "num_stages": 2},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 16, "COLS": 5, "num_warps": 4, "num_stages": 2},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 32, "COLS": 5, "num_warps": 4, "num_stages": 2},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 64, "COLS": 5, "num_warps": 4, "num_stages": 1},
        {"BLOCK_P": 16, "BLOCK_C": 32, "BLOCK_K": 16, "COLS": 4, "num_warps": 4, "num_stages": 1},
    ),
    "depthwise_project_folded": (
        {"BLOCK_Q": 32, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 256, "BLOCK_K": 32, "num_warps": 8, "num_stages": 1},
        {"BLOCK_Q": 16, "BLOCK_N": 256, "BLOCK_K": 16, "num_warps": 8, "num_stages": 1},
    ),
}

# About five waves on the largest GPUs; more programs mean shorter strips of rows, each with two rows of overlap.
_PROGRAMS = 2048
_ROWS_AT_LEAST = 4

# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _load_w1(w1_ptr, offs_c, start, C: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """[BLOCK_K, BLOCK_C] of W1^T from input channel `start`."""
    offs_k = start + tl.arange(0, BLOCK_K)
    inside = (offs_c < C)[None, :] & (offs_k < K)[:, None]
    return tl.load(w1_ptr + offs_c[None, :] * K + offs_k[:, None], inside, 0.0)


@triton.jit
def _add_products(
    sums, x_ptrs, w1, start, first, width, row_inside,
    K: tl.constexpr, BLOCK_K: tl.constexpr, COUNT: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sums + x W1^T over input channels start ... start + BLOCK_K - 1, one entry an input column."""
    offs_k = start + tl.arange(0, BLOCK_K)[None, :]
    added = ()
    for j in tl.static_range(COUNT):
        inside = row_inside & (first + j >= 0) & (first + j < width) & (offs_k < K)
        x = tl.load(x_ptrs + j * K + offs_k, inside, 0.0)
        added = added + (tl.dot(x, w1, sums[j], input_precision=PRECISION, out_dtype=ACC),)
    return added


@triton.jit
def _expanded_row(
    x_ptrs, w1_ptr, w1_whole, bias, offs_c, first, width, row_inside,
    K: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):  # fmt: skip
    """relu6(x W1^T + bias) at input columns first ... first + COUNT - 1 of a row, zero outside the image."""
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.broadcast_to(bias, (first.shape[0], offs_c.shape[0])),)
    # One loop either way: with one pass its bounds are constants, and the compiler keeps W1 outside all loops.
    for start in range(0, K, BLOCK_K):
        w1 = w1_whole if K <= BLOCK_K else _load_w1(w1_ptr, offs_c, start, C, K, BLOCK_K)
        sums = _add_products(sums, x_ptrs, w1, start, first, width, row_inside, K, BLOCK_K, COUNT, PRECISION, ACC)
    row = ()
    for j in tl.static_range(COUNT):
        inside = row_inside & (first + j >= 0) & (first + j < width)
        row = row + (relu6(sums[j], tl.where(inside, 6.0, 0.0).to(ACC)),)
    return row


@triton.jit(do_not_specialize=["total", "groups", "strips", "rows", "h", "w", "ho", "wo"])
def expand_depthwise_folded_kernel(
    x_ptr, w1_ptr, b1_ptr, wd_ptr, bd_ptr, y_ptr, total, groups, strips, rows, h, w, ho, wo,
    K: tl.constexpr, C: tl.constexpr, STRIDE: tl.constexpr, PRECISION: tl.constexpr, ACC: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """y = relu6(depthwise3x3(relu6(x W1^T + b1)) + bd), the expanded tensor only in registers.

    A program owns BLOCK_P groups of COLS neighbouring output columns and BLOCK_C hidden channels, and walks down a
    strip of output rows. Column j of all its groups is one small matrix product, so that a column and its neighbours
    are different tensors in the same threads: no shift of values between threads, unlike a product over whole rows.
    Price: columns between groups are expanded twice, COLS + 2 for COLS outputs at stride 1, 2 COLS + 1 at stride 2.

    Reads x (K values a position) once from DRAM and once a channel tile from L2; writes y (C values a position).
    Bound by the issue rate: 23 instructions an element of y at stride 1 and 44 at stride 2 (fp16, 24 to 144 channels,
    sm_80), in float32 without tf32 by the arithmetic of the product.
    Grid: channel tiles x strips x position tiles, channel tiles fastest.
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
    # A group past the last repeats it, so that loads need no mask for it; nothing of it is stored.
    image = (tl.minimum(offs_p, total - 1) // groups).to(tl.int64)[:, None]
    column = (tl.minimum(offs_p, total - 1) % groups)[:, None] * COLS
    mask = (offs_p < total)[:, None] & mask_c[None, :]

    taps = load_taps(wd_ptr, offs_c, mask_c, ACC)
    b1 = tl.load(b1_ptr + offs_c, mask_c, 0.0)[None, :]
    bd = tl.load(bd_ptr + offs_c, mask_c, 0.0)[None, :]
    w1 = _load_w1(w1_ptr, offs_c, 0, C, K, BLOCK_K)

    first = column * STRIDE - 1
    # Each pass takes in the STRIDE input rows that complete output row oh. The passes before `top` only collect
    # what the rows above it give.
    begin = top - 3 + STRIDE
    last = begin * STRIDE + 2 - STRIDE
    x_ptrs = x_ptr + (image * h + last) * w * K + first * K
    y_ptrs = y_ptr + (image * ho + begin) * wo * C + column * C + offs_c[None, :]
    upper = zero_columns(COLS, BLOCK_P, BLOCK_C, ACC)
    lower = zero_columns(COLS, BLOCK_P, BLOCK_C, ACC)
    for oh in range(begin, bottom):
        if STRIDE == 2:
            inside = (oh >= 0) & (oh * 2 < h)
            row = _expanded_row(x_ptrs, w1_ptr, w1, b1, offs_c, first, w, inside, K, C, WIDE, BLOCK_K, PRECISION, ACC)
            upper = add_taps(upper, row, taps, 1, STRIDE, COLS)
            x_ptrs += w * K
        inside = (oh * STRIDE + 1 >= 0) & (oh * STRIDE + 1 < h)
        row = _expanded_row(x_ptrs, w1_ptr, w1, b1, offs_c, first, w, inside, K, C, WIDE, BLOCK_K, PRECISION, ACC)
        x_ptrs += w * K
        done = add_taps(upper, row, taps, 2, STRIDE, COLS)
        if STRIDE == 1:
            upper = add_taps(lower, row, taps, 1, STRIDE, COLS)
            lower = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
        else:
            upper = add_taps(zero_columns(COLS, BLOCK_P, BLOCK_C, ACC), row, taps, 0, STRIDE, COLS)
        for j in tl.static_range(COLS):
            y = relu6(done[j] + bd, 6.0).to(y_ptr.dtype.element_ty)
            tl.store(y_ptrs + j * C, y, mask & (column + j < wo) & (oh >= top))
        y_ptrs += wo * C


@triton.jit
def _add_input(sums, value, taps, R: tl.constexpr, S: tl.constexpr, STRIDE: tl.constexpr):
    """sums of a square of 2 x 2 outputs + the input at row R and column S under it, times its taps."""
    added = ()
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            total = sums[2 * i + j]
            if R - STRIDE * i >= 0 and R - STRIDE * i < 3 and S - STRIDE * j >= 0 and S - STRIDE * j < 3:
                total += value * taps[3 * (R - STRIDE * i) + S - STRIDE * j]
            added = added + (total,)
    return added


@triton.jit(do_not_specialize=["total", "h", "w", "ho", "wo"])
def depthwise_project_folded_kernel(
    x_ptr, wd_ptr, bd_ptr, w3_ptr, b3_ptr, residual_ptr, y_ptr, total, h, w, ho, wo,
    C: tl.constexpr, N: tl.constexpr, STRIDE: tl.constexpr, RESIDUAL: tl.constexpr, PRECISION: tl.constexpr,
    ACC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """y = relu6(depthwise3x3(x) + bd) W3^T + b3, plus the residual where asked; the depthwise result is not stored.

    A program owns BLOCK_Q squares of 2 x 2 outputs and BLOCK_N output channels. For each chunk of hidden channels the
    (STRIDE + 3)^2 inputs under a square are loaded once and become four rows of the product's left operand: 4 loads
    an output at stride 1 and 6 at 2, where one output at a time would need 9. One tile of channels covers N where it
    fits, since every further one repeats the depthwise convolution.

    Reads x (C values an input position) once from DRAM, the rows under two squares once more from L2, and the residual;
    writes y (N values a position). Bound by the issue rate: 30 to 33 instructions an element of the depthwise result
    (fp16, sm_80, N <= 64), 56 with a tile of 256. Grid: tiles of squares x channel tiles, the latter fastest.
    """
    SIDE: tl.constexpr = STRIDE + 3
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    across = (wo + 1) // 2
    down = (ho + 1) // 2
    tile = tl.program_id(0) // n_tiles
    offs_n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_q = tl.minimum(tile * BLOCK_Q + tl.arange(0, BLOCK_Q), total - 1)
    image = (offs_q // (across * down)).to(tl.int64)[:, None]
    top = ((offs_q // across) % down)[:, None] * 2 * STRIDE - 1
    left = (offs_q % across)[:, None] * 2 * STRIDE - 1
    x_ptrs = x_ptr + (image * h + top) * w * C + left * C
    acc = tl.zeros((4 * BLOCK_Q, BLOCK_N), ACC)
    for start in range(0, C, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mask_k = offs_k < C
        taps = load_taps(wd_ptr, offs_k, mask_k, ACC)
        bias = tl.load(bd_ptr + offs_k, mask_k, 0.0)[None, :]
        sums = ()
        for _ in tl.static_range(4):
            sums = sums + (tl.broadcast_to(bias, (BLOCK_Q, BLOCK_K)),)
        for r in tl.static_range(SIDE):
            for s in tl.static_range(SIDE):
                inside = (top + r >= 0) & (top + r < h) & (left + s >= 0) & (left + s < w)
                value = tl.load(x_ptrs + r * w * C + s * C + offs_k[None, :], inside & mask_k[None, :], 0.0).to(ACC)
                sums = _add_input(sums, value, taps, r, s, STRIDE)
        # Joined, the four outputs of a square are rows of one operand, which the warps share.
        upper = tl.join(relu6(sums[0], 6.0), relu6(sums[1], 6.0))
        lower = tl.join(relu6(sums[2], 6.0), relu6(sums[3], 6.0))
        squares = tl.join(upper, lower).to(w3_ptr.dtype.element_ty)
        a = tl.reshape(tl.permute(squares, (0, 3, 2, 1)), (4 * BLOCK_Q, BLOCK_K))
        w3 = tl.load(w3_ptr + offs_n[None, :] * C + offs_k[:, None], (offs_n < N)[None, :] & mask_k[:, None], 0.0)
        acc = tl.dot(a, w3, acc, input_precision=PRECISION, out_dtype=ACC)

    member = tl.arange(0, 4 * BLOCK_Q)
    offs_q = tile * BLOCK_Q + member // 4
    row = ((offs_q // across) % down) * 2 + member // 2 % 2
    col = (offs_q % across) * 2 + member % 2
    mask = ((offs_q < total) & (row < ho) & (col < wo))[:, None] & (offs_n < N)[None, :]
    position = ((offs_q // (across * down)).to(tl.int64) * ho + row) * wo + col
    offs = position[:, None] * N + offs_n[None, :]
    acc += tl.load(b3_ptr + offs_n, offs_n < N, 0.0)[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask, 0.0).to(ACC)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask)


# --- launchers -----------------------------------------------------------------------------------------------


def expand_depthwise_folded(x: Tensor, w1: Tensor, b1: Tensor, wd: Tensor, bd: Tensor, stride: int) -> Tensor:
    """See `mbv2.kernels.aten.expand_depthwise_folded`."""
    n, cin, h, w = x.shape
    hidden, ho, wo = w1.shape[0], _output(h, stride), _output(w, stride)
    meta = tuning.tile("expand_depthwise_folded", x.dtype, cin=cin, hidden=hidden, stride=stride)
    meta["COLS"] = _columns(wo, stride, meta["COLS"])
    groups, c_tiles = triton.cdiv(wo, meta["COLS"]), triton.cdiv(hidden, meta["BLOCK_C"])
    p_tiles = triton.cdiv(n * groups, meta["BLOCK_P"])
    strips = min(triton.cdiv(_PROGRAMS, p_tiles * c_tiles), triton.cdiv(ho, _ROWS_AT_LEAST))
    rows = triton.cdiv(ho, strips)
    strips = triton.cdiv(ho, rows)
    y = new_channels_last(x, (n, hidden, ho, wo))
    expand_depthwise_folded_kernel[(p_tiles * strips * c_tiles,)](
        x, w1, b1, wd, bd, y, n * groups, groups, strips, rows, h, w, ho, wo,
        K=cin, C=hidden, STRIDE=stride, **arithmetic(x.dtype), **meta,
    )  # fmt: skip
    return y


def depthwise_project_folded(
    x: Tensor, wd: Tensor, bd: Tensor, w3: Tensor, b3: Tensor, stride: int, residual: Tensor | None
) -> Tensor:
    """See `mbv2.kernels.aten.depthwise_project_folded`."""
    n, hidden, h, w = x.shape
    cout, ho, wo = w3.shape[0], _output(h, stride), _output(w, stride)
    meta = tuning.tile("depthwise_project_folded", x.dtype, hidden=hidden, cout=cout, stride=stride)
    squares = _squares(n, ho, wo)
    y = new_channels_last(x, (n, cout, ho, wo))
    grid = (triton.cdiv(squares, meta["BLOCK_Q"]) * triton.cdiv(cout, meta["BLOCK_N"]),)
    depthwise_project_folded_kernel[grid](
        x, wd, bd, w3, b3, x if residual is None else residual, y, squares, h, w, ho, wo,
        C=hidden, N=cout, STRIDE=stride, RESIDUAL=residual is not None, **arithmetic(x.dtype), **meta,
    )  # fmt: skip
    return y


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
    """A block with BatchNorm folded into weights and biases, by the route `folded_plan` names.

    Args:
        x: the block's input, dense channels_last.
        w1: weight of the expansion [hidden, C, 1, 1], or None for a block without one.
        b1: its bias [hidden] in the wide type, as bd and b3 are; None with w1.
        wd: depthwise weight [hidden, 1, 3, 3].
        bd: its bias.
        w3: weight of the projection [out, hidden, 1, 1].
        b3: its bias.
        stride: of the depthwise convolution.
        residual: add x to the result.

    Returns:
        [N, out, Ho, Wo], dense channels_last.
    """
    n, cin, h, w = x.shape
    added = x if residual else None
    if w1 is None or b1 is None:
        # Nothing to weigh: the fused pair moves all bytes of the two kernels but the depthwise result.
        if _fills_a_gpu(n, _output(h, stride), _output(w, stride)):
            return depthwise_project_folded(x, wd, bd, w3, b3, stride, added)
        return pointwise_folded(depthwise_folded(x, wd, bd, stride), w3, b3, False, added)
    route = folded_plan(n, cin, w1.shape[0], w3.shape[0], h, w, stride, x.dtype)
    if route == "expand_depthwise+project":
        return pointwise_folded(expand_depthwise_folded(x, w1, b1, wd, bd, stride), w3, b3, False, added)
    expanded = pointwise_folded(x, w1, b1, True, None)
    if route == "expand+depthwise_project":
        return depthwise_project_folded(expanded, wd, bd, w3, b3, stride, added)
    return pointwise_folded(depthwise_folded(expanded, wd, bd, stride), w3, b3, False, added)


# --- which pair ----------------------------------------------------------------------------------------------


def folded_plan(n: int, cin: int, hidden: int, cout: int, h: int, w: int, stride: int, dtype: torch.dtype) -> str:
    """The route of a block: "expand_depthwise+project", "expand+depthwise_project" or "three".

    The one of least `folded_bytes`. The pair that ends in the projection is left out where its squares of outputs
    make fewer than 128 programs: each of those goes through all hidden channels one chunk after the other, and on an
    idle GPU three short kernels are over sooner.
    """
    costs = folded_bytes(n, cin, hidden, cout, h, w, stride, dtype)
    if not _fills_a_gpu(n, _output(h, stride), _output(w, stride)):
        del costs["expand+depthwise_project"]
    return min(costs, key=costs.__getitem__)


def folded_bytes(
    n: int, cin: int, hidden: int, cout: int, h: int, w: int, stride: int, dtype: torch.dtype
) -> dict[str, float]:
    """Bytes each route moves: of DRAM, plus a quarter of what is read again from L2, which is about four times as fast.

    With X, E1, E2, O the bytes of the input, the expanded, the depthwise and the projected tensor:

    * expand_depthwise+project: X + 2 E2 + O; again: X per tile of 32 hidden channels, with the columns between groups
      of 7 twice ((7 stride + 2) / (7 stride)), and E2 per tile of 64 outputs but the first;
    * expand+depthwise_project: X + 2 E1 + O; again: X per tile of 64 hidden channels but the first, and E1 as often as
      rows of squares overlap, (stride + 3) / (2 stride) per tile of 256 outputs, but once;
    * three: X + 2 E1 + 2 E2 + O; again: X and E2 as above.

    A residual costs every route the same.
    """
    ho, wo = _output(h, stride), _output(w, stride)
    x, e1 = (n * h * w * c * dtype.itemsize for c in (cin, hidden))
    e2, out = (n * ho * wo * c * dtype.itemsize for c in (hidden, cout))
    columns = (7 * stride + 2) / (7 * stride)
    expand = x + x * (triton.cdiv(hidden, 64) - 1) / 4 + e1
    project = e2 + e2 * (triton.cdiv(cout, 64) - 1) / 4 + out
    squares = triton.cdiv(cout, 256) * (stride + 3) / (2 * stride)
    return {
        "expand_depthwise+project": x + x * triton.cdiv(hidden, 32) * columns / 4 + e2 + project,
        "expand+depthwise_project": expand + e1 + e1 * (squares - 1) / 4 + out,
        "three": expand + e1 + e2 + project,
    }


def _output(size: int, stride: int) -> int:
    return (size - 1) // stride + 1


def _columns(wo: int, stride: int, most: int) -> int:
    """Columns of a group, at most `most`, so that a row's groups expand the fewest input columns."""
    return min(range(1, most + 1), key=lambda cols: triton.cdiv(wo, cols) * (stride * (cols - 1) + 3))


def _squares(n: int, ho: int, wo: int) -> int:
    return n * triton.cdiv(ho, 2) * triton.cdiv(wo, 2)


def _fills_a_gpu(n: int, ho: int, wo: int) -> bool:
    return _squares(n, ho, wo) >= 128 * 16
