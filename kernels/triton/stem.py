"""The network's first convolution, dense 3x3 over few channels, as a matrix product over gathered patches.

A patch is the 9 * CIN input values under one output position, ordered (row, column, channel). Patches are gathered
transposed, [BLOCK_K, BLOCK_M]: then a thread holds whole patches, works out its position once, and the places and
masks of a patch's values are constants to the compiler (`CIN` is one).
"""

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels import aten, layout
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.arithmetic import chan_merge, divide, relu6
from mbv2.kernels.triton.batch_norm import SCALE, SHIFT
from mbv2.kernels.triton.reduce import sum_parts

# Programs of a launch that walks over positions: a few waves on the largest GPUs, whatever the GPU, so that equal
# shapes add up in equal order.
PROGRAMS = 2048

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "stem": (
        {"BLOCK_M": 256, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 256, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
    ),
    "stem_folded": (
        {"BLOCK_M": 256, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 256, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
    ),
    # More warps would only repeat the arithmetic on dy: each warp's mma then needs all of it.
    "stem_backward": (
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 2, "num_stages": 1},
        {"BLOCK_M": 128, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 2, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_N": 16, "BLOCK_K": 32, "num_warps": 2, "num_stages": 1},
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1},
    ),
}

# --- kernels -------------------------------------------------------------------------------------------------


@triton.jit
def _patches(x_ptr, offs_m, mask_m, offs_k, h, w, ho, wo, CIN: tl.constexpr, STRIDE: tl.constexpr):
    """Patches [len(offs_k), len(offs_m)], zeros outside the image and past the last position."""
    column = offs_m % wo
    row = offs_m // wo % ho
    image = offs_m // wo // ho
    tap = offs_k // CIN
    ih = (row * STRIDE - 1)[None, :] + (tap // 3)[:, None]
    iw = (column * STRIDE - 1)[None, :] + (tap % 3)[:, None]
    inside = (ih >= 0) & (ih < h) & (iw >= 0) & (iw < w) & mask_m[None, :] & (offs_k < 9 * CIN)[:, None]
    corner = ((image.to(tl.int64) * h + row * STRIDE - 1) * w + column * STRIDE - 1) * CIN
    # In 64 bits all the way: only so are the constant parts folded into the load instructions.
    below = (tap // 3).to(tl.int64) * (w * CIN)
    beside = (tap % 3 * CIN + offs_k % CIN).to(tl.int64)
    return tl.load(x_ptr + (corner[None, :] + below[:, None] + beside[:, None]), mask=inside, other=0.0)


@triton.jit
def _weights(weight_ptr, offs_k, offs_n, in_stride, tap_stride, CIN: tl.constexpr, COUT: tl.constexpr):
    """The weight as [len(offs_k), len(offs_n)], in the patches' order."""
    places = offs_n[None, :] * (9 * CIN) + (offs_k % CIN * in_stride + offs_k // CIN * tap_stride)[:, None]
    return tl.load(weight_ptr + places, mask=(offs_k < 9 * CIN)[:, None] & (offs_n < COUT)[None, :], other=0.0)


@triton.jit
def _convolve(
    x_ptr,
    weight_ptr,
    whole_weight,
    offs_m,
    mask_m,
    offs_n,
    h,
    w,
    ho,
    wo,
    in_stride,
    tap_stride,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
    ACC: tl.constexpr,
):
    """One tile [len(offs_m), len(offs_n)] of the convolution; 9 * CIN <= BLOCK_K: its weight is whole_weight."""
    acc = tl.zeros((offs_m.shape[0], offs_n.shape[0]), ACC)
    if 9 * CIN <= BLOCK_K:
        patches = _patches(x_ptr, offs_m, mask_m, tl.arange(0, BLOCK_K), h, w, ho, wo, CIN, STRIDE)
        acc = tl.dot(tl.trans(patches), whole_weight, acc, input_precision=PRECISION, out_dtype=ACC)
    else:
        for start in range(0, 9 * CIN, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            patches = _patches(x_ptr, offs_m, mask_m, offs_k, h, w, ho, wo, CIN, STRIDE)
            weight = _weights(weight_ptr, offs_k, offs_n, in_stride, tap_stride, CIN, COUT)
            acc = tl.dot(tl.trans(patches), weight, acc, input_precision=PRECISION, out_dtype=ACC)
    return acc


@triton.jit(do_not_specialize=["positions", "h", "w", "ho", "wo"])
def stem_kernel(
    x_ptr,
    weight_ptr,
    y_ptr,
    moments_ptr,
    positions,
    h,
    w,
    ho,
    wo,
    in_stride,
    tap_stride,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = conv3x3(x) rounded, and (count, mean, M2) of the rounded values per program.

    Reads each element of x once from DRAM (each 9 / STRIDE^2 times from the cache), writes each of y once. Bound by
    instruction issue on the fastest memories, else by DRAM. Grid: (parts, channel tiles); a program takes every
    parts-th tile of BLOCK_M positions.
    """
    acc_type: tl.constexpr = moments_ptr.dtype.element_ty
    part = tl.program_id(0)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COUT
    whole_weight = _weights(weight_ptr, tl.arange(0, BLOCK_K), offs_n, in_stride, tap_stride, CIN, COUT)
    count = tl.full((), 0, acc_type)
    mean = tl.zeros((BLOCK_N,), acc_type)
    m2 = tl.zeros((BLOCK_N,), acc_type)
    for tile in range(part, tl.cdiv(positions, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < positions
        acc = _convolve(
            x_ptr, weight_ptr, whole_weight, offs_m, mask_m, offs_n, h, w, ho, wo, in_stride, tap_stride,
            CIN, COUT, STRIDE, BLOCK_K, PRECISION, acc_type,
        )  # fmt: skip
        y = acc.to(y_ptr.dtype.element_ty)
        offs = offs_m.to(tl.int64)[:, None] * COUT + offs_n[None, :]
        tl.store(y_ptr + offs, y, mask=mask_m[:, None] & mask_n[None, :])
        # Past the last position patches are zeros, and so is y.
        values = y.to(acc_type)
        tile_count = tl.minimum(positions - tile * BLOCK_M, BLOCK_M).to(acc_type)
        tile_mean = tl.sum(values, 0) * divide(1.0, tile_count)
        delta = tl.where(mask_m[:, None], values - tile_mean[None, :], 0.0)
        count, mean, m2 = chan_merge(count, mean, m2, tile_count, tile_mean, tl.sum(delta * delta, 0))
    row = moments_ptr + part * 3 * COUT + offs_n
    tl.store(row, tl.zeros((BLOCK_N,), acc_type) + count, mask=mask_n)
    tl.store(row + COUT, mean, mask=mask_n)
    tl.store(row + 2 * COUT, m2, mask=mask_n)


@triton.jit(do_not_specialize=["positions", "h", "w", "ho", "wo"])
def stem_folded_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    positions,
    h,
    w,
    ho,
    wo,
    in_stride,
    tap_stride,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = relu6(conv3x3(x) + bias), rounded once.

    Traffic, bound and grid are stem_kernel's, less the moments.
    """
    acc_type: tl.constexpr = bias_ptr.dtype.element_ty
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COUT
    whole_weight = _weights(weight_ptr, tl.arange(0, BLOCK_K), offs_n, in_stride, tap_stride, CIN, COUT)
    bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    for tile in range(tl.program_id(0), tl.cdiv(positions, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < positions
        acc = _convolve(
            x_ptr, weight_ptr, whole_weight, offs_m, mask_m, offs_n, h, w, ho, wo, in_stride, tap_stride,
            CIN, COUT, STRIDE, BLOCK_K, PRECISION, acc_type,
        )  # fmt: skip
        offs = offs_m.to(tl.int64)[:, None] * COUT + offs_n[None, :]
        out = relu6(acc + bias, 6.0).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + offs, out, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["positions", "h", "w", "ho", "wo"])
def stem_backward_kernel(
    grad_ptr,
    y_ptr,
    bn_ptr,
    coef_ptr,
    x_ptr,
    parts_ptr,
    positions,
    h,
    w,
    ho,
    wo,
    CIN: tl.constexpr,
    COUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dW of the convolution, one part per program: the sum over positions of patch * dy.

    dy = A * dz + B * y + C with dz = grad where 0 < bn(y) < 6, made on the fly and rounded to the activation type.
    Reads each element of grad, y and x once from DRAM, writes 36 bytes per (input, output) channel pair and program.
    Bound by DRAM, by issue on the fastest memories. Grid: (parts, channel tiles, patch tiles: one for 3 channels); a
    program takes every parts-th tile of BLOCK_M positions.
    """
    acc_type: tl.constexpr = parts_ptr.dtype.element_ty
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < COUT
    # A constant 0 where there is one tile lets the compiler know every value's place in its patch.
    first_k = 0 if 9 * CIN <= BLOCK_K else tl.program_id(2) * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    scale = tl.load(bn_ptr + SCALE * COUT + offs_n, mask=mask_n, other=0.0)[None, :]
    shift = tl.load(bn_ptr + SHIFT * COUT + offs_n, mask=mask_n, other=0.0)[None, :]
    a = tl.load(coef_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    b = tl.load(coef_ptr + COUT + offs_n, mask=mask_n, other=0.0)[None, :]
    c = tl.load(coef_ptr + 2 * COUT + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_N), acc_type)
    for tile in range(tl.program_id(0), tl.cdiv(positions, BLOCK_M), tl.num_programs(0)):
        offs_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < positions
        mask = mask_m[:, None] & mask_n[None, :]
        offs = offs_m.to(tl.int64)[:, None] * COUT + offs_n[None, :]
        dz = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(acc_type)
        y = tl.load(y_ptr + offs, mask=mask, other=0.0).to(acc_type)
        z = y * scale + shift
        dz = tl.where((z <= 0) | (z >= 6), 0.0, dz)
        # Past the last position dy is C, but the patches there are zeros.
        dy = (a * dz + b * y + c).to(x_ptr.dtype.element_ty)
        patches = _patches(x_ptr, offs_m, mask_m, offs_k, h, w, ho, wo, CIN, STRIDE)
        acc = tl.dot(patches, dy, acc, input_precision=PRECISION, out_dtype=acc_type)
    places = offs_n[None, :] * (9 * CIN) + (offs_k % CIN * 9 + offs_k // CIN)[:, None]
    part = parts_ptr + tl.program_id(0) * (9 * CIN * COUT)
    tl.store(part + places, acc, mask=(offs_k < 9 * CIN)[:, None] & mask_n[None, :])


# --- launchers -----------------------------------------------------------------------------------------------


def stem(x: Tensor, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """Dense 3x3 convolution, padding 1. Returns raw y [N, out, Ho, Wo] and its moments [G, 3, out]."""
    x, weight, y = layout.channels_last(x), _ordered(weight), _output(x, weight, stride)
    meta = tuning.tile("stem", x.dtype, cout=weight.shape[0])
    grid = _grid(y, meta)
    moments = x.new_empty((grid[0], 3, weight.shape[0]), dtype=layout.wide(x.dtype))
    stem_kernel[grid](x, weight, y, moments, *_sizes(x, y), *_strides(weight), **_constants(x, weight, stride), **meta)
    return y, moments


def stem_backward(
    grad: Tensor,
    y: Tensor,
    bn: Tensor,
    coef: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """From the gradient at relu6(bn(y)): (dx, dweight) of the dense 3x3 convolution.

    A network's input seldom needs a gradient, so dx comes from plain torch, with dy as a whole in memory.
    """
    dx = dweight = None
    if need_input:
        dx, _ = aten.stem_backward(grad, y, bn, coef, x, weight, stride, True, False)
    if need_weight:
        grad, x = layout.channels_last(grad), layout.channels_last(x)
        meta = tuning.tile("stem_backward", x.dtype, cout=weight.shape[0])
        columns = triton.cdiv(9 * weight.shape[1], meta["BLOCK_K"])
        grid = (*_grid(y, meta, columns), columns)
        parts = bn.new_empty((grid[0], *weight.shape))
        stem_backward_kernel[grid](grad, y, bn, coef, x, parts, *_sizes(x, y), **_constants(x, weight, stride), **meta)
        dweight = sum_parts(parts, weight)
    return dx, dweight


def stem_folded(x: Tensor, weight: Tensor, bias: Tensor, stride: int) -> Tensor:
    """relu6(conv3x3(x) + bias); bias is in the wide type."""
    x, weight, out = layout.channels_last(x), _ordered(weight), _output(x, weight, stride)
    meta = tuning.tile("stem_folded", x.dtype, cout=weight.shape[0])
    stem_folded_kernel[_grid(out, meta)](
        x, weight, bias, out, *_sizes(x, out), *_strides(weight), **_constants(x, weight, stride), **meta
    )
    return out


def _output(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    n, _, h, w = x.shape
    return layout.new_channels_last(x, (n, weight.shape[0], (h - 1) // stride + 1, (w - 1) // stride + 1))


def _grid(y: Tensor, meta: dict[str, int], others: int = 1) -> tuple[int, int]:
    """(parts, channel tiles) of a walk over y's positions, beside `others` programs for each of these."""
    n, cout, ho, wo = y.shape
    columns = triton.cdiv(cout, meta["BLOCK_N"])
    return min(triton.cdiv(n * ho * wo, meta["BLOCK_M"]), max(1, PROGRAMS // (columns * others))), columns


def _sizes(x: Tensor, y: Tensor) -> tuple[int, int, int, int, int]:
    return y.numel() // y.shape[1], x.shape[2], x.shape[3], y.shape[2], y.shape[3]


def _ordered(weight: Tensor) -> Tensor:
    """The weight in row-major or in channels_last order, as either comes; anything else is copied."""
    cin = weight.shape[1]
    return weight if weight.stride() in ((9 * cin, 9, 3, 1), (9 * cin, 1, 3 * cin, cin)) else weight.contiguous()


def _strides(weight: Tensor) -> tuple[int, int]:
    return weight.stride(1), weight.stride(3)


def _constants(x: Tensor, weight: Tensor, stride: int) -> dict[str, int | str]:
    return {
        "CIN": weight.shape[1],
        "COUT": weight.shape[0],
        "STRIDE": stride,
        "PRECISION": tuning.dot_precision(x.dtype),
    }
