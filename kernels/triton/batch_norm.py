"""BatchNorm beside the convolutions: merging moments, what to apply, applying it, and its backward's sums.

Tensors named moments, bn, sums and coef are described in `kernels/layout.py`. Every sum is taken in an order that
depends on shapes only.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels import layout
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import chan_merge, divide, relu6

MEAN = tl.constexpr(layout.MEAN)
RSTD = tl.constexpr(layout.RSTD)
SCALE = tl.constexpr(layout.SCALE)
SHIFT = tl.constexpr(layout.SHIFT)
COUNT = tl.constexpr(layout.COUNT)

# One wave of about eight programs on each of 108 to 148 multiprocessors: more parts would only be more to merge.
PROGRAMS = 1024

# A few programs wait for memory and for one another's sums: what counts is how much each has in flight.
_PARTS_TILES = (
    {"BLOCK_G": 1024, "BLOCK_C": 4, "num_warps": 16, "num_stages": 1},
    {"BLOCK_G": 256, "BLOCK_C": 4, "num_warps": 4, "num_stages": 1},
    {"BLOCK_G": 32, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1},
)
CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "merge_moments": _PARTS_TILES,
    "bn_finalize": _PARTS_TILES,
    "bn_constant": ({"BLOCK_C": 128, "num_warps": 4, "num_stages": 1},),
    "bn_apply": (
        {"BLOCK_V": 128, "num_warps": 4, "num_stages": 1},
        {"BLOCK_V": 256, "num_warps": 4, "num_stages": 1},
        {"BLOCK_V": 512, "num_warps": 8, "num_stages": 1},
    ),
    "bn_sums": (
        {"BLOCK_M": 128, "BLOCK_C": 16, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
    ),
    "bn_backward": _PARTS_TILES,
}


@triton.jit
def _merge_parts(moments_ptr, parts, channels, offs_c, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    dtype = moments_ptr.dtype.element_ty
    count = tl.zeros((BLOCK_C,), dtype)
    mean = tl.zeros((BLOCK_C,), dtype)
    m2 = tl.zeros((BLOCK_C,), dtype)
    for first in range(0, parts, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask = (offs_g < parts)[:, None] & (offs_c < channels)[None, :]
        rows = moments_ptr + offs_g.to(tl.int64)[:, None] * (3 * channels) + offs_c[None, :]
        n = tl.load(rows, mask=mask, other=0.0)
        means = tl.load(rows + channels, mask=mask, other=0.0)
        squares = tl.load(rows + 2 * channels, mask=mask, other=0.0)
        # An empty part may hold anything.
        means = tl.where(n > 0, means, 0.0)
        squares = tl.where(n > 0, squares, 0.0)
        tile_count = tl.sum(n, 0)
        tile_mean = divide(tl.sum(n * means, 0), tl.maximum(tile_count, 1.0))
        delta = means - tile_mean[None, :]
        tile_m2 = tl.sum(squares + n * delta * delta, 0)
        count, mean, m2 = chan_merge(count, mean, m2, tile_count, tile_mean, tile_m2)
    return count, mean, m2


@triton.jit
def _store_bn(
    bn_ptr,
    gamma_ptr,
    beta_ptr,
    mean,
    var,
    count,
    channels,
    offs_c,
    EPS: tl.constexpr,
):
    dtype = bn_ptr.dtype.element_ty
    mask = offs_c < channels
    # tl.sqrt and tl.rsqrt are approximate in float32.
    root = tl.sqrt(var + EPS) if dtype == tl.float64 else tl.sqrt_rn(var + EPS)
    rstd = divide(1.0, root)
    scale = rstd
    if gamma_ptr is not None:
        scale = rstd * tl.load(gamma_ptr + offs_c, mask=mask, other=0.0).to(dtype)
    shift = -mean * scale
    if beta_ptr is not None:
        shift += tl.load(beta_ptr + offs_c, mask=mask, other=0.0).to(dtype)
    row = bn_ptr + offs_c
    tl.store(row, mean, mask=mask)
    tl.store(row + channels, var, mask=mask)
    tl.store(row + 2 * channels, rstd, mask=mask)
    tl.store(row + 3 * channels, scale, mask=mask)
    tl.store(row + 4 * channels, shift, mask=mask)
    tl.store(row + 5 * channels, count, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def merge_moments_kernel(moments_ptr, out_ptr, parts, channels, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr):
    """All parts' (count, mean, M2) merged into one by Chan's formula, BLOCK_G parts at a time.

    Reads 12 bytes per part and channel, writes 12 per channel (float32). Bound by latency. Grid: (channel tiles,).
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count, mean, m2 = _merge_parts(moments_ptr, parts, channels, offs_c, BLOCK_G, BLOCK_C)
    row = out_ptr + offs_c
    tl.store(row, count, mask=offs_c < channels)
    tl.store(row + channels, mean, mask=offs_c < channels)
    tl.store(row + 2 * channels, m2, mask=offs_c < channels)


@triton.jit(do_not_specialize=["parts"])
def bn_finalize_kernel(
    moments_ptr,
    gamma_ptr,
    beta_ptr,
    bn_ptr,
    parts,
    channels,
    EPS: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """merge_moments and, in the same launch, what the BatchNorm applies.

    Reads 12 bytes per part and channel, writes 24 per channel (float32). Bound by latency. Grid: (channel tiles,).
    """
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    count, mean, m2 = _merge_parts(moments_ptr, parts, channels, offs_c, BLOCK_G, BLOCK_C)
    _store_bn(bn_ptr, gamma_ptr, beta_ptr, mean, divide(m2, count), count, channels, offs_c, EPS)


@triton.jit
def bn_constant_kernel(
    mean_ptr,
    var_ptr,
    gamma_ptr,
    beta_ptr,
    bn_ptr,
    channels,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """What a BatchNorm with running statistics applies; reads 16 bytes and writes 24 per channel.

    Bound by the launch. Grid: (channel tiles,).
    """
    dtype = bn_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean = tl.load(mean_ptr + offs_c, mask=offs_c < channels, other=0.0).to(dtype)
    var = tl.load(var_ptr + offs_c, mask=offs_c < channels, other=0.0).to(dtype)
    count = tl.zeros((BLOCK_C,), dtype)
    _store_bn(bn_ptr, gamma_ptr, beta_ptr, mean, var, count, channels, offs_c, EPS)


@triton.jit(do_not_specialize=["vectors"])
def bn_apply_kernel(
    y_ptr,
    bn_ptr,
    residual_ptr,
    out_ptr,
    vectors,
    channels,
    RELU6: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out = scale * y + shift, ReLU6, plus residual, in one rounding.

    The dense NHWC memory is cut into `vectors` of WIDTH channels, whatever C is, so that no lane idles and a vector's
    channels are found by one division. Reads and writes one activation per element of y (two reads with a residual);
    bn stays in the cache. Bound by DRAM: about 11 issued instructions for 4 (6) bytes in half precision.
    Grid: (tiles of BLOCK_V vectors,).
    """
    dtype = bn_ptr.dtype.element_ty
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    lane = tl.arange(0, WIDTH)
    mask = (offs_v < vectors)[:, None]
    offs_c = (offs_v % (channels // WIDTH) * WIDTH)[:, None] + lane[None, :]
    offs = offs_v.to(tl.int64)[:, None] * WIDTH + lane[None, :]
    scale = tl.load(bn_ptr + SCALE * channels + offs_c)
    shift = tl.load(bn_ptr + SHIFT * channels + offs_c)
    z = tl.load(y_ptr + offs, mask=mask, other=0.0).to(dtype) * scale + shift
    if RELU6:
        z = relu6(z, 6.0)
    if residual_ptr is not None:
        z += tl.load(residual_ptr + offs, mask=mask, other=0.0).to(dtype)
    tl.store(out_ptr + offs, z.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["positions"])
def bn_sums_kernel(
    grad_ptr,
    y_ptr,
    bn_ptr,
    sums_ptr,
    positions,
    channels,
    RELU6: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and of dz * (y - mean) over positions, dz = grad where 0 < z < 6 (RELU6) or everywhere.

    Reads one activation per element of grad and of y, writes 8 bytes per channel and program. Bound by DRAM: about 13
    (8 without RELU6) issued instructions for 4 bytes in half precision. Grid: (parts, channel tiles); a program takes
    every parts-th tile of BLOCK_M positions.
    """
    dtype = bn_ptr.dtype.element_ty
    # Says that rows begin at multiples of WIDTH; without it C = 24 is loaded in single elements.
    channels = channels // WIDTH * WIDTH
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    mean = tl.load(bn_ptr + MEAN * channels + offs_c, mask=mask_c, other=0.0)[None, :]
    scale = tl.load(bn_ptr + SCALE * channels + offs_c, mask=mask_c, other=0.0)[None, :]
    shift = tl.load(bn_ptr + SHIFT * channels + offs_c, mask=mask_c, other=0.0)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    centred = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    for tile in range(part, tl.cdiv(positions, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < positions)[:, None] & mask_c[None, :]
        offs = offs_m.to(tl.int64)[:, None] * channels + offs_c[None, :]
        dz = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(dtype)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(dtype)
        if RELU6:
            z = y * scale + shift
            dz = tl.where((z <= 0) | (z >= 6), 0.0, dz)
        total += dz
        centred += dz * (y - mean)
    row = sums_ptr + part * 2 * channels + offs_c
    tl.store(row, tl.sum(total, 0), mask=mask_c)
    tl.store(row + channels, tl.sum(centred, 0), mask=mask_c)


@triton.jit(do_not_specialize=["parts"])
def bn_backward_kernel(
    sums_ptr, bn_ptr, totals_ptr, coef_ptr, parts, channels, BLOCK_G: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Totals (dbeta, dgamma) of all parts' sums, and the affine coefficients of BatchNorm's backward.

    Reads 8 bytes per part and channel, writes 20 per channel (float32). Bound by latency. Grid: (channel tiles,).
    """
    dtype = bn_ptr.dtype.element_ty
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < channels
    plain = tl.zeros((BLOCK_G, BLOCK_C), dtype)
    centred = tl.zeros((BLOCK_G, BLOCK_C), dtype)
    for first in range(0, parts, BLOCK_G):
        offs_g = first + tl.arange(0, BLOCK_G)
        mask = (offs_g < parts)[:, None] & mask_c[None, :]
        rows = sums_ptr + offs_g.to(tl.int64)[:, None] * (2 * channels) + offs_c[None, :]
        plain += tl.load(rows, mask=mask, other=0.0)
        centred += tl.load(rows + channels, mask=mask, other=0.0)
    mean = tl.load(bn_ptr + MEAN * channels + offs_c, mask=mask_c, other=0.0)
    rstd = tl.load(bn_ptr + RSTD * channels + offs_c, mask=mask_c, other=0.0)
    scale = tl.load(bn_ptr + SCALE * channels + offs_c, mask=mask_c, other=0.0)
    count = tl.load(bn_ptr + COUNT * channels + offs_c, mask=mask_c, other=0.0)
    dbeta = tl.sum(plain, 0)
    dgamma = tl.sum(centred, 0) * rstd
    at_least_one = tl.maximum(count, 1.0)
    # Constant statistics (count 0): no gradient flows through them.
    per_value = tl.where(count > 0, divide(1.0, at_least_one), 0.0)
    b = -scale * rstd * dgamma * per_value
    c = -scale * dbeta * per_value - b * mean
    tl.store(totals_ptr + offs_c, dbeta, mask=mask_c)
    tl.store(totals_ptr + channels + offs_c, dgamma, mask=mask_c)
    tl.store(coef_ptr + offs_c, scale, mask=mask_c)
    tl.store(coef_ptr + channels + offs_c, b, mask=mask_c)
    tl.store(coef_ptr + 2 * channels + offs_c, c, mask=mask_c)


def merge_moments(moments: Tensor) -> Tensor:
    """[G, 3, C] -> [3, C]: parts merged by Chan's formula; parts of count 0 change nothing."""
    parts, _, channels = moments.shape
    out = moments.new_empty((3, channels))
    meta = tuning.tile("merge_moments", moments.dtype, parts=parts, channels=channels)
    merge_moments_kernel[(triton.cdiv(channels, meta["BLOCK_C"]),)](moments.contiguous(), out, parts, channels, **meta)
    return out


def bn_finalize(moments: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float) -> Tensor:
    """bn [6, C] from moments [G, 3, C]: biased variance, scale = gamma * rstd, shift = beta - mean * scale."""
    parts, _, channels = moments.shape
    bn = moments.new_empty((6, channels))
    meta = tuning.tile("bn_finalize", moments.dtype, parts=parts, channels=channels)
    bn_finalize_kernel[(triton.cdiv(channels, meta["BLOCK_C"]),)](
        moments.contiguous(),
        gamma,
        beta,
        bn,
        parts,
        channels,
        EPS=float(eps),
        **meta,
    )
    return bn


def bn_constant(
    mean: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, eps: float, dtype: torch.dtype
) -> Tensor:
    """bn [6, C] of the running statistics, with COUNT 0; `dtype` is the activations'."""
    channels = mean.shape[0]
    bn = mean.new_empty((6, channels), dtype=layout.wide(dtype))
    meta = tuning.tile("bn_constant", bn.dtype, channels=channels)
    bn_constant_kernel[(triton.cdiv(channels, meta["BLOCK_C"]),)](
        mean,
        var,
        gamma,
        beta,
        bn,
        channels,
        EPS=float(eps),
        **meta,
    )
    return bn


def bn_apply(y: Tensor, bn: Tensor, residual: Tensor | None, relu6: bool) -> Tensor:
    """scale * y + shift, then ReLU6 if asked, then plus residual; rounded once, to y's type."""
    channels = y.shape[1]
    width = math.gcd(channels, 8)
    vectors = y.numel() // width
    out = layout.new_channels_last(y, y.shape)
    meta = tuning.tile("bn_apply", y.dtype, vectors=vectors)
    bn_apply_kernel[(triton.cdiv(vectors, meta["BLOCK_V"]),)](
        y,
        bn,
        None if residual is None else layout.channels_last(residual),
        out,
        vectors,
        channels,
        RELU6=relu6,
        WIDTH=width,
        **meta,
    )
    return out


def bn_sums(grad: Tensor, y: Tensor, bn: Tensor, relu6: bool) -> Tensor:
    """sums [G, 2, C] of dz = grad (masked by ReLU6 if asked) and of dz * (y - mean)."""
    channels = y.shape[1]
    positions = y.numel() // channels
    meta = tuning.tile("bn_sums", y.dtype, channels=channels, positions=positions)
    columns = triton.cdiv(channels, meta["BLOCK_C"])
    parts = min(triton.cdiv(positions, meta["BLOCK_M"]), max(1, PROGRAMS // columns))
    sums = bn.new_empty((parts, 2, channels))
    bn_sums_kernel[(parts, columns)](
        layout.channels_last(grad), y, bn, sums, positions, channels, RELU6=relu6, WIDTH=math.gcd(channels, 8), **meta
    )
    return sums


def bn_backward(sums: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """Parts [G, 2, C] added in a fixed order -> (totals [2, C] = (dbeta, dgamma), coef [3, C])."""
    parts, _, channels = sums.shape
    totals, coef = bn.new_empty((2, channels)), bn.new_empty((3, channels))
    meta = tuning.tile("bn_backward", bn.dtype, parts=parts, channels=channels)
    bn_backward_kernel[(triton.cdiv(channels, meta["BLOCK_C"]),)](
        sums.contiguous(), bn, totals, coef, parts, channels, **meta
    )
    return totals, coef
