"""The network's head after its 1x1 convolution: BatchNorm, ReLU6 and the mean over positions, without storing more."""

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels import layout
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import relu6
from mbv2.kernels.triton.batch_norm import MEAN, PROGRAMS, SCALE, SHIFT

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "bn_relu6_pool": (
        {"BLOCK_M": 16, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 8, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 2, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
    ),
    "pool_backward": (
        {"BLOCK_M": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 16, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
    ),
    "head_folded": (
        {"IMAGES": 2, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_warps": 4, "num_stages": 2},
        {"IMAGES": 1, "BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4},
    ),
}

# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["positions"])
def bn_relu6_pool_kernel(
    y_ptr, bn_ptr, out_ptr, positions, CHANNELS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out[n, c] = mean over positions of relu6(scale * y + shift).

    Reads one activation per element of y, writes one per image and channel. Bound by DRAM: about 8 issued
    instructions for 2 bytes in half precision. Grid: (images, channel tiles).
    """
    dtype = bn_ptr.dtype.element_ty
    image = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    scale = tl.load(bn_ptr + SCALE * CHANNELS + offs_c, mask=mask_c, other=0.0)[None, :]
    shift = tl.load(bn_ptr + SHIFT * CHANNELS + offs_c, mask=mask_c, other=0.0)[None, :]
    y_ptr += image.to(tl.int64) * positions * CHANNELS
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    for first in range(0, positions, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        inside = (offs_m < positions)[:, None]
        offs = offs_m[:, None] * CHANNELS + offs_c[None, :]
        y = tl.load(y_ptr + offs, mask=inside & mask_c[None, :], other=0.0).to(dtype)
        total += tl.where(inside, relu6(y * scale + shift, 6.0), 0.0)
    mean = tl.sum(total, 0) / positions
    tl.store(out_ptr + image.to(tl.int64) * CHANNELS + offs_c, mean.to(out_ptr.dtype.element_ty), mask=mask_c)


@triton.jit(do_not_specialize=["rows", "positions"])
def pool_backward_kernel(
    grad_ptr,
    y_ptr,
    bn_ptr,
    dz_ptr,
    sums_ptr,
    rows,
    positions,
    CHANNELS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dz = grad / positions where 0 < scale * y + shift < 6, and the sums of dz and of dz * (y - mean).

    Reads one activation per element of y and writes one of dz; grad [N, C] comes from the cache. Bound by DRAM: about
    19 issued instructions for 4 bytes in half precision. Grid: (parts, channel tiles); a program takes every
    parts-th tile of BLOCK_M of the `rows` = images * positions.
    """
    dtype = bn_ptr.dtype.element_ty
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < CHANNELS
    mean = tl.load(bn_ptr + MEAN * CHANNELS + offs_c, mask=mask_c, other=0.0)[None, :]
    scale = tl.load(bn_ptr + SCALE * CHANNELS + offs_c, mask=mask_c, other=0.0)[None, :]
    shift = tl.load(bn_ptr + SHIFT * CHANNELS + offs_c, mask=mask_c, other=0.0)[None, :]
    share = tl.full((), 1, dtype) / positions
    total = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    centred = tl.zeros((BLOCK_M, BLOCK_C), dtype)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask = (offs_m < rows)[:, None] & mask_c[None, :]
        offs = offs_m.to(tl.int64)[:, None] * CHANNELS + offs_c[None, :]
        image = (offs_m // positions)[:, None]
        grad = tl.load(grad_ptr + image.to(tl.int64) * CHANNELS + offs_c[None, :], mask=mask, other=0.0)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(dtype)
        z = y * scale + shift
        dz = tl.where((z <= 0) | (z >= 6), 0.0, grad.to(dtype) * share).to(dz_ptr.dtype.element_ty)
        tl.store(dz_ptr + offs, dz, mask=mask)
        total += dz.to(dtype)
        centred += dz.to(dtype) * (y - mean)
    row = sums_ptr + part * 2 * CHANNELS + offs_c
    tl.store(row, tl.sum(total, 0), mask=mask_c)
    tl.store(row + CHANNELS, tl.sum(centred, 0), mask=mask_c)


@triton.jit(do_not_specialize=["images", "positions"])
def head_folded_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    images,
    positions,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    PRECISION: tl.constexpr,
    IMAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[n, o] = mean over positions of relu6(x W^T + bias), the [N, COUT, H, W] tensor never in memory.

    Reads each element of x from DRAM once and of the weight once per launch, both again from the cache (x for each of
    the channel tiles, the weight for every IMAGES images); writes one activation per image and output channel. Bound
    by tensor cores and the cache's bandwidth. Grid: image tiles times channel tiles, channel tiles of the same images
    side by side. A tile of the product has BLOCK_M positions of each of IMAGES images.
    """
    acc_type: tl.constexpr = bias_ptr.dtype.element_ty
    n_tiles: tl.constexpr = (COUT + BLOCK_N - 1) // BLOCK_N
    first_image = tl.program_id(0) // n_tiles * IMAGES
    offs_n = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COUT
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    row = tl.arange(0, IMAGES * BLOCK_M)
    image = first_image + row // BLOCK_M
    pooled = tl.zeros((IMAGES, BLOCK_N), acc_type)
    for first in range(0, positions, BLOCK_M):
        place = first + row % BLOCK_M
        mask_m = (image < images) & (place < positions)
        x_rows = x_ptr + (image.to(tl.int64) * positions + place)[:, None] * CIN
        acc = tl.zeros((IMAGES * BLOCK_M, BLOCK_N), acc_type)
        for start in range(0, CIN, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mask_k = offs_k < CIN
            x = tl.load(x_rows + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            weight = tl.load(
                weight_ptr + offs_n[None, :] * CIN + offs_k[:, None], mask=mask_k[:, None] & mask_n[None, :], other=0.0
            )
            acc = tl.dot(x, weight, acc, input_precision=PRECISION, out_dtype=acc_type)
        activated = tl.where((place < positions)[:, None], relu6(acc + bias, 6.0), 0.0)
        pooled += tl.sum(tl.reshape(activated, (IMAGES, BLOCK_M, BLOCK_N)), 1)
    out_image = first_image + tl.arange(0, IMAGES)
    out = out_ptr + out_image.to(tl.int64)[:, None] * COUT + offs_n[None, :]
    mean = (pooled / positions).to(out_ptr.dtype.element_ty)
    tl.store(out, mean, mask=(out_image < images)[:, None] & mask_n[None, :])


# --- launchers -----------------------------------------------------------------------------------------------


def bn_relu6_pool(y: Tensor, bn: Tensor) -> Tensor:
    """Mean over H and W of relu6(bn(y)), [N, C] in y's type."""
    n, channels, h, w = y.shape
    out = y.new_empty((n, channels))
    meta = tuning.tile("bn_relu6_pool", y.dtype, channels=channels, positions=h * w)
    bn_relu6_pool_kernel[(n, triton.cdiv(channels, meta["BLOCK_C"]))](y, bn, out, h * w, CHANNELS=channels, **meta)
    return out


def pool_backward(grad: Tensor, y: Tensor, bn: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient [N, C] at the pooled output: (dz at bn's output [N, C, H, W], its sums)."""
    n, channels, h, w = y.shape
    rows = n * h * w
    meta = tuning.tile("pool_backward", y.dtype, channels=channels)
    columns = triton.cdiv(channels, meta["BLOCK_C"])
    parts = min(triton.cdiv(rows, meta["BLOCK_M"]), max(1, PROGRAMS // columns))
    dz, sums = layout.new_channels_last(y, y.shape), bn.new_empty((parts, 2, channels))
    pool_backward_kernel[(parts, columns)](grad.contiguous(), y, bn, dz, sums, rows, h * w, CHANNELS=channels, **meta)
    return dz, sums


def head_folded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Mean over H and W of relu6(conv1x1(x) + bias), [N, out]; bias is in the wide type."""
    x = layout.channels_last(x)
    n, cin, h, w = x.shape
    cout = weight.shape[0]
    out = x.new_empty((n, cout))
    meta = tuning.tile("head_folded", x.dtype, images=n)
    grid = (triton.cdiv(n, meta["IMAGES"]) * triton.cdiv(cout, meta["BLOCK_N"]),)
    head_folded_kernel[grid](
        x,
        weight,
        bias,
        out,
        n,
        h * w,
        CIN=cin,
        COUT=cout,
        PRECISION=tuning.dot_precision(x.dtype),
        **meta,
    )
    return out
