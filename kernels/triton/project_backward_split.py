"""Backward of relu6(bn2(y2)) followed by the 1x1 projection in separate passes, for many output channels."""

import math

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import MEAN, SCALE, SHIFT, new_channels_last
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.reduce import accumulator, row_programs, sum_parts

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "project_backward_affine": (
        {"BLOCK_M": 64, "BLOCK_O": 32, "num_warps": 4, "num_stages": 1},
        {"BLOCK_M": 32, "BLOCK_O": 32, "num_warps": 4, "num_stages": 1},
    ),
    "project_backward_input": (
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2},
    ),
    "project_backward_weight": (
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_O": 32, "CHUNKS": 2, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "CHUNKS": 1, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "CHUNKS": 2, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "CHUNKS": 3, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "CHUNKS": 5, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_O": 32, "CHUNKS": 5, "num_warps": 8, "num_stages": 2},
    ),
}

_MEAN, _SCALE, _SHIFT = tl.constexpr(MEAN), tl.constexpr(SCALE), tl.constexpr(SHIFT)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows", "outputs"])
def project_backward_affine_kernel(
    g_ptr,
    y3_ptr,
    coef_ptr,
    dy_ptr,
    rows,
    outputs,
    OUTPUT_ALIGN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dy3 = A g + B y3 + C.

    Reads g and y3, writes dy3: 3 values an element. Bound by DRAM. Grid: (output tiles * row tiles,).
    """
    outputs = outputs // OUTPUT_ALIGN * OUTPUT_ALIGN
    columns = tl.cdiv(outputs, BLOCK_O)
    row = (tl.program_id(0) // columns).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_o = (tl.program_id(0) % columns) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask_o = offs_o < outputs
    mask = (offs_m < rows - row)[:, None] & mask_o[None, :]
    offs = row * outputs + offs_m[:, None] * outputs + offs_o[None, :]
    a = tl.load(coef_ptr + offs_o, mask=mask_o, other=0.0)[None, :]
    b = tl.load(coef_ptr + outputs + offs_o, mask=mask_o, other=0.0)[None, :]
    c = tl.load(coef_ptr + 2 * outputs + offs_o, mask=mask_o, other=0.0)[None, :]
    g = tl.load(g_ptr + offs, mask=mask, other=0.0).to(ACC)
    y3 = tl.load(y3_ptr + offs, mask=mask, other=0.0).to(ACC)
    tl.store(dy_ptr + offs, (a * g + (b * y3 + c)).to(dy_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "hidden", "outputs"])
def project_backward_input_kernel(
    dy_ptr,
    w_ptr,
    y2_ptr,
    bn_ptr,
    dz_ptr,
    sums_ptr,
    rows,
    hidden,
    outputs,
    HIDDEN_ALIGN: tl.constexpr,
    OUTPUT_ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dz2 = (dy3 W3) where 0 < bn2(y2) < 6, and its sums.

    Reads y2 and (per hidden tile, from L2) dy3, writes dz2: 2 hidden + outputs values a row. Bound by DRAM.
    Grid: (hidden tiles, parts of the rows).
    """
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    outputs = outputs // OUTPUT_ALIGN * OUTPUT_ALIGN
    part = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < hidden
    dtype = y2_ptr.dtype.element_ty
    mean = tl.load(bn_ptr + _MEAN * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    scale = tl.load(bn_ptr + _SCALE * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    shift = tl.load(bn_ptr + _SHIFT * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    tile_n = offs_m[:, None] * hidden + offs_n[None, :]
    tile_k = offs_m[:, None] * outputs + offs_k[None, :]
    tile_w = offs_k[:, None] * hidden + offs_n[None, :]
    total = tl.zeros((BLOCK_N,), ACC)
    centred = tl.zeros((BLOCK_N,), ACC)
    for tile in range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(1)):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        mask_m = (offs_m < rows - row)[:, None]
        da = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        for k in tl.range(0, outputs, BLOCK_K, num_stages=STAGES):
            mask_k = offs_k < outputs - k
            mask_mk = mask_m if EVEN_K else mask_m & mask_k[None, :]
            mask_w = mask_k[:, None] if EVEN_N else mask_k[:, None] & mask_n[None, :]
            dy = tl.load(dy_ptr + row * outputs + k + tile_k, mask=mask_mk, other=0.0)
            w = tl.load(w_ptr + k * hidden + tile_w, mask=mask_w, other=0.0)
            da = tl.dot(dy, w, da, input_precision=PRECISION, out_dtype=ACC)
        mask = mask_m if EVEN_N else mask_m & mask_n[None, :]
        y2 = tl.load(y2_ptr + row * hidden + tile_n, mask=mask, other=0.0).to(ACC)
        z = y2 * scale + shift
        dz = tl.where((z <= 0) | (z >= 6), 0.0, da.to(dtype).to(ACC))
        tl.store(dz_ptr + row * hidden + tile_n, dz.to(dtype), mask=mask)
        total += tl.sum(dz, 0)
        centred += tl.sum(dz * (y2 - mean), 0)
    sums = sums_ptr + part * 2 * hidden + offs_n
    tl.store(sums, total, mask=mask_n)
    tl.store(sums + hidden, centred, mask=mask_n)


@triton.jit(do_not_specialize=["rows", "hidden", "outputs"])
def project_backward_weight_kernel(
    dy_ptr,
    y2_ptr,
    bn_ptr,
    dw_ptr,
    rows,
    hidden,
    outputs,
    HIDDEN_ALIGN: tl.constexpr,
    OUTPUT_ALIGN: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_O: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dW3 = dy3^T relu6(bn2(y2)) of CHUNKS * BLOCK_O outputs and BLOCK_N hidden channels.

    Reads y2 and (per hidden tile, from L2) dy3: hidden + outputs values a row. Bound by DRAM and tensor cores.
    Grid: (groups of outputs, hidden tiles, parts of the rows).
    """
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    outputs = outputs // OUTPUT_ALIGN * OUTPUT_ALIGN
    group = tl.program_id(0) * CHUNKS * BLOCK_O
    part = tl.program_id(2)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_o = group + tl.arange(0, BLOCK_O)
    mask_n = offs_n < hidden
    scale = tl.load(bn_ptr + _SCALE * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    shift = tl.load(bn_ptr + _SHIFT * hidden + offs_n, mask=mask_n, other=0.0)
    # As in project_backward_kernel.
    shift = tl.where(mask_n, shift, 0.0)[None, :]
    tile_n = offs_m[:, None] * hidden + offs_n[None, :]
    tile_o = offs_m[:, None] * outputs + offs_o[None, :]
    dw = (tl.zeros((BLOCK_N, BLOCK_O), ACC),)
    for _ in tl.static_range(CHUNKS - 1):
        dw = dw + (tl.zeros((BLOCK_N, BLOCK_O), ACC),)
    for tile in tl.range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(2), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        mask_m = (offs_m < rows - row)[:, None]
        mask = mask_m if EVEN_N else mask_m & mask_n[None, :]
        z = tl.load(y2_ptr + row * hidden + tile_n, mask=mask, other=0.0).to(ACC) * scale + shift
        a2 = tl.minimum(tl.maximum(z, 0.0, propagate_nan=_ALL), 6.0, propagate_nan=_ALL)
        a2 = tl.trans(a2.to(y2_ptr.dtype.element_ty))
        next_dw = ()
        for chunk in tl.static_range(CHUNKS):
            mask_mo = mask_m if EVEN_O else mask_m & (offs_o < outputs - chunk * BLOCK_O)[None, :]
            dy = tl.load(dy_ptr + row * outputs + chunk * BLOCK_O + tile_o, mask=mask_mo, other=0.0)
            next_dw = next_dw + (tl.dot(a2, dy, dw[chunk], input_precision=PRECISION, out_dtype=ACC),)
        dw = next_dw
    for chunk in tl.static_range(CHUNKS):
        offs_w = offs_o + chunk * BLOCK_O
        rows_w = dw_ptr + (part.to(tl.int64) * outputs + offs_w[:, None]) * hidden
        tl.store(rows_w + offs_n[None, :], tl.trans(dw[chunk]), mask=(offs_w < outputs)[:, None] & mask_n[None, :])


def output_gradient(grad: Tensor, y3: Tensor, coef3: Tensor) -> Tensor:
    """Write dy3 = A g + B y3 + C."""
    outputs = y3.shape[1]
    rows = y3.numel() // outputs
    dy3 = new_channels_last(y3, y3.shape)
    tile = tuning.tile("project_backward_affine", y3.dtype, cout=outputs)
    grid = (triton.cdiv(outputs, tile["BLOCK_O"]) * triton.cdiv(rows, tile["BLOCK_M"]),)
    project_backward_affine_kernel[grid](
        grad, y3, coef3, dy3, rows, outputs, OUTPUT_ALIGN=math.gcd(outputs, 16), ACC=accumulator(y3.dtype), **tile
    )
    return dy3


def input_gradient(dy3: Tensor, weight: Tensor, y2: Tensor, bn2: Tensor, dz2: Tensor) -> Tensor:
    """Fill dz2; returns its sums [G, 2, hidden]."""
    outputs, hidden = weight.shape[:2]
    rows = y2.numel() // hidden
    tile = tuning.tile("project_backward_input", y2.dtype, cout=outputs, hidden=hidden)
    columns = triton.cdiv(hidden, tile["BLOCK_N"])
    parts = row_programs(rows, tile, columns)
    sums = bn2.new_empty((parts, 2, hidden))
    project_backward_input_kernel[(columns, parts)](
        dy3,
        weight,
        y2,
        bn2,
        dz2,
        sums,
        rows,
        hidden,
        outputs,
        EVEN_N=hidden % tile["BLOCK_N"] == 0,
        EVEN_K=outputs % tile["BLOCK_K"] == 0,
        STAGES=tile["num_stages"],
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        OUTPUT_ALIGN=math.gcd(outputs, 16),
        ACC=accumulator(y2.dtype),
        PRECISION=tuning.dot_precision(y2.dtype),
        **tile,
    )
    return sums


def weight_gradient(dy3: Tensor, weight: Tensor, y2: Tensor, bn2: Tensor) -> Tensor:
    """The gradient of the weight, like it."""
    outputs, hidden = weight.shape[:2]
    rows = y2.numel() // hidden
    tile = tuning.tile("project_backward_weight", y2.dtype, cout=outputs, hidden=hidden)
    group = tile["BLOCK_O"] * tile["CHUNKS"]
    groups = triton.cdiv(outputs, group)
    columns = triton.cdiv(hidden, tile["BLOCK_N"])
    traffic = rows * (hidden + outputs) * y2.element_size()
    parts = row_programs(rows, tile, groups * columns, traffic, hidden * outputs * 4)
    dw = bn2.new_empty((parts, outputs, hidden))
    project_backward_weight_kernel[(groups, columns, parts)](
        dy3,
        y2,
        bn2,
        dw,
        rows,
        hidden,
        outputs,
        EVEN_N=hidden % tile["BLOCK_N"] == 0,
        EVEN_O=outputs % group == 0,
        STAGES=tile["num_stages"],
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        OUTPUT_ALIGN=math.gcd(outputs, 16),
        ACC=accumulator(y2.dtype),
        PRECISION=tuning.dot_precision(y2.dtype),
        **tile,
    )
    return sum_parts(dw, weight)
