"""The 1x1 convolutions as matrix products over NHWC rows: expand and project with statistics, and the folded one.

Activations are matrices [rows, channels] with rows = N * H * W; a program owns one tile of output channels and walks
over tiles of rows. Channel counts are compile-time constants: every network's are multiples of 8, and only a constant
tells the compiler so (rows of 24 half-precision channels are then moved 16 bytes at a time).
"""

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import SCALE, SHIFT, new_channels_last, wide
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import arithmetic, relu6

# Programs of a launch with statistics: about five waves on the largest GPUs, and few enough that the moments stay
# small against the activations. A constant, so that equal shapes add up in equal order on every GPU.
PROGRAMS = 2048

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "expand": (
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
    "project": (
        {"BLOCK_M": 128, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
    ),
    "pointwise_folded": (
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ),
}

# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _matrix(ptr, offs, mask, start, LENGTH: tl.constexpr, BLOCK: tl.constexpr):
    """[len(offs), BLOCK] of a row-major matrix of rows of LENGTH values, from column `start`; zeros outside."""
    columns = start + tl.arange(0, BLOCK)
    inside = mask[:, None]
    if LENGTH % BLOCK != 0:
        inside = inside & (columns < LENGTH)[None, :]
    return tl.load(ptr + offs[:, None] * LENGTH + columns[None, :], mask=inside, other=0.0)


@triton.jit
def _product(
    x_ptr,
    w_ptr,
    w_whole,
    scale_ptr,
    shift_ptr,
    offs_m,
    mask_m,
    offs_n,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile of x W^T; x becomes relu6(scale * x + shift) first if ACTIVATE. K <= BLOCK_K: W's tile is w_whole."""
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), ACC)
    if K <= BLOCK_K and not ACTIVATE:
        x = _matrix(x_ptr, offs_m, mask_m, 0, K, BLOCK_K)
        acc = tl.dot(x, w_whole, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, K, BLOCK_K):
            x = _matrix(x_ptr, offs_m, mask_m, start, K, BLOCK_K)
            w = tl.trans(_matrix(w_ptr, offs_n, offs_n < N, start, K, BLOCK_K))
            if ACTIVATE:
                offs_k = start + tl.arange(0, BLOCK_K)
                scale = tl.load(scale_ptr + offs_k, mask=offs_k < K, other=0.0)[None, :]
                shift = tl.load(shift_ptr + offs_k, mask=offs_k < K, other=0.0)[None, :]
                x = relu6(x.to(ACC) * scale + shift, 6.0).to(w_ptr.dtype.element_ty)
            acc = tl.dot(x, w, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit
def _rows_with_moments(
    x_ptr,
    w_ptr,
    scale_ptr,
    shift_ptr,
    y_ptr,
    moments_ptr,
    rows,
    parts,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACTIVATE: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """Every parts-th tile of rows: store the rounded product, keep (count, mean, M2) of it, store that as one part."""
    # Neighbouring programs take the channel tiles of the same rows, so that x comes from DRAM once.
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    part = tl.program_id(0) // n_tiles
    offs_n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    w_whole = tl.trans(_matrix(w_ptr, offs_n, mask_n, 0, K, BLOCK_K))
    count = tl.full((), 0, ACC)
    mean = tl.zeros((BLOCK_N,), ACC)
    m2 = tl.zeros((BLOCK_N,), ACC)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), parts):
        first = tl.cast(tile, tl.int64) * BLOCK_M
        here = tl.minimum(rows - first, BLOCK_M).to(tl.int32)
        offs_m = tl.arange(0, BLOCK_M)
        mask_m = offs_m < here
        acc = _product(
            x_ptr + first * K, w_ptr, w_whole, scale_ptr, shift_ptr, offs_m, mask_m, offs_n,
            K, N, BLOCK_K, ACTIVATE, PRECISION, ACC,
        )  # fmt: skip
        y = acc.to(y_ptr.dtype.element_ty)
        mask = mask_m[:, None] & mask_n[None, :]
        tl.store(y_ptr + first * N + offs_m[:, None] * N + offs_n[None, :], y, mask=mask)

        size = here.to(ACC)
        values = y.to(ACC)
        if ACTIVATE:  # without it, rows outside are rows of zeros already
            values = tl.where(mask_m[:, None], values, 0.0)
        tile_mean = tl.sum(values, 0) / size
        centred = tl.where(mask_m[:, None], values - tile_mean[None, :], 0.0)
        delta = tile_mean - mean
        share = size / (count + size)
        m2 += tl.sum(centred * centred, 0) + delta * delta * (count * share)
        mean += delta * share
        count += size
    moments_ptr += part.to(tl.int64) * 3 * N
    tl.store(moments_ptr + offs_n, tl.zeros((BLOCK_N,), ACC) + count, mask=mask_n)
    tl.store(moments_ptr + N + offs_n, mean, mask=mask_n)
    tl.store(moments_ptr + 2 * N + offs_n, m2, mask=mask_n)


@triton.jit(do_not_specialize=["rows", "parts"])
def expand_kernel(
    x_ptr,
    w_ptr,
    y_ptr,
    moments_ptr,
    rows,
    parts,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = x W^T with the moments of the rounded y.

    Reads x once from DRAM (K values a row; the other channel tiles find it in L2: cdiv(N, BLOCK_N) * K values a row
    from there) and W once a program; writes y (N values a row) and 12 bytes a channel and part. Bound by DRAM where
    N is a multiple of the tile, by the issue rate else (idle lanes of the last channel tile are issued too).
    Grid: parts x channel tiles, channel tiles fastest. K <= BLOCK_K: W stays in registers over all rows.
    """
    _rows_with_moments(
        x_ptr, w_ptr, x_ptr, x_ptr, y_ptr, moments_ptr, rows, parts,
        K, N, BLOCK_M, BLOCK_N, BLOCK_K, False, PRECISION, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "parts"])
def project_kernel(
    x_ptr,
    scale_ptr,
    shift_ptr,
    w_ptr,
    y_ptr,
    moments_ptr,
    rows,
    parts,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = relu6(scale * x + shift) W^T with the moments of the rounded y.

    Reads x (K values a row) once where one tile covers all N, writes y (N values a row) and 12 bytes a channel and
    part. Where N takes t tiles, x is read t times (once from DRAM, then from L2) and normalised t times, 5
    instructions an element each. A wide tile saves no instructions: its warps stand side by side along N, and each of
    them normalises all it multiplies (sm_80, half precision, N = 160: 50 instructions an element with one tile of
    256, 35 to 40 with tiles of 32 or 64). Bound by DRAM for N <= 32, by the issue rate beyond.
    Grid: parts x channel tiles, the latter fastest.
    """
    _rows_with_moments(
        x_ptr, w_ptr, scale_ptr, shift_ptr, y_ptr, moments_ptr, rows, parts,
        K, N, BLOCK_M, BLOCK_N, BLOCK_K, True, PRECISION, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def pointwise_folded_kernel(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    rows,
    K: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RELU6: tl.constexpr,
    RESIDUAL: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """y = x W^T + bias, then ReLU6 and the residual where asked, rounded once.

    Reads x (K values a row; once from DRAM, once a channel tile from L2) and the residual (N values a row), writes y
    (N values a row). Bound by DRAM. Grid: tiles of rows x channel tiles, the latter fastest.
    """
    n_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first = (tl.program_id(0) // n_tiles).to(tl.int64) * BLOCK_M
    offs_n = (tl.program_id(0) % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    mask_n = offs_n < N
    mask_m = offs_m < rows - first
    w_whole = tl.trans(_matrix(w_ptr, offs_n, mask_n, 0, K, BLOCK_K))
    acc = _product(
        x_ptr + first * K, w_ptr, w_whole, x_ptr, x_ptr, offs_m, mask_m, offs_n,
        K, N, BLOCK_K, False, PRECISION, ACC,
    )  # fmt: skip
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if RELU6:
        acc = relu6(acc, 6.0)
    mask = mask_m[:, None] & mask_n[None, :]
    offs = first * N + offs_m[:, None] * N + offs_n[None, :]
    if RESIDUAL:
        acc += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(y_ptr + offs, acc.to(y_ptr.dtype.element_ty), mask=mask)


# --- launchers -----------------------------------------------------------------------------------------------


def expand(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """1x1 convolution (also the head's). Returns raw y1 [N, hidden, H, W] and its moments [G, 3, hidden]."""
    n, cin, h, w = x.shape
    hidden, rows = weight.shape[0], n * h * w
    meta = tuning.tile("expand", x.dtype, rows=rows, cin=cin, hidden=hidden)
    y = new_channels_last(x, (n, hidden, h, w))
    parts, programs = _split(rows, hidden, meta)
    moments = x.new_empty((parts, 3, hidden), dtype=wide(x.dtype))
    expand_kernel[(programs,)](x, weight, y, moments, rows, parts, cin, hidden, **arithmetic(x.dtype), **meta)
    return y, moments


def project(y2: Tensor, bn2: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """relu6(bn2(y2)), then 1x1 convolution. Returns raw y3 [N, out, Ho, Wo] and its moments."""
    n, hidden, h, w = y2.shape
    cout, rows = weight.shape[0], n * h * w
    meta = tuning.tile("project", y2.dtype, rows=rows, hidden=hidden, cout=cout)
    y = new_channels_last(y2, (n, cout, h, w))
    parts, programs = _split(rows, cout, meta)
    moments = y2.new_empty((parts, 3, cout), dtype=wide(y2.dtype))
    project_kernel[(programs,)](
        y2, bn2[SCALE], bn2[SHIFT], weight, y, moments, rows, parts, hidden, cout, **arithmetic(y2.dtype), **meta
    )
    return y, moments


def pointwise_folded(x: Tensor, weight: Tensor, bias: Tensor, relu6: bool, residual: Tensor | None) -> Tensor:
    """conv1x1(x) + bias, then ReLU6 if asked, then plus residual; bias is in the wide type."""
    n, cin, h, w = x.shape
    cout, rows = weight.shape[0], n * h * w
    meta = tuning.tile("pointwise_folded", x.dtype, rows=rows, cin=cin, cout=cout)
    y = new_channels_last(x, (n, cout, h, w))
    grid = (triton.cdiv(rows, meta["BLOCK_M"]) * triton.cdiv(cout, meta["BLOCK_N"]),)
    pointwise_folded_kernel[grid](
        x,
        weight,
        bias,
        x if residual is None else residual,
        y,
        rows,
        cin,
        cout,
        RELU6=relu6,
        RESIDUAL=residual is not None,
        **arithmetic(x.dtype),
        **meta,
    )
    return y


def _split(rows: int, channels: int, meta: dict[str, int]) -> tuple[int, int]:
    """(parts of the moments, programs): from the shape and the tile alone."""
    m_tiles, n_tiles = triton.cdiv(rows, meta["BLOCK_M"]), triton.cdiv(channels, meta["BLOCK_N"])
    parts = triton.cdiv(m_tiles, triton.cdiv(m_tiles * n_tiles, PROGRAMS))
    return parts, parts * n_tiles
