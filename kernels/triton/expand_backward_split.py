"""Backward of a 1x1 convolution followed by BatchNorm and ReLU6 in separate passes, for many channels."""

import math

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import new_channels_last
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.reduce import accumulator, row_programs, sum_parts

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "expand_backward_input": (
        {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_C": 32, "CHUNKS": 2, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 64, "CHUNKS": 1, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 32, "CHUNKS": 3, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 32, "CHUNKS": 3, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_C": 32, "CHUNKS": 5, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 64, "BLOCK_C": 32, "CHUNKS": 5, "num_warps": 8, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 32, "CHUNKS": 5, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_K": 32, "BLOCK_C": 64, "CHUNKS": 5, "num_warps": 8, "num_stages": 3},
    ),
    "expand_backward_weight": (
        {"BLOCK_M": 32, "BLOCK_H": 32, "BLOCK_C": 32, "CHUNKS": 2, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_H": 64, "BLOCK_C": 64, "CHUNKS": 1, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_H": 64, "BLOCK_C": 32, "CHUNKS": 3, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 32, "BLOCK_H": 64, "BLOCK_C": 32, "CHUNKS": 5, "num_warps": 4, "num_stages": 3},
        {"BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_C": 32, "CHUNKS": 5, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_C": 64, "CHUNKS": 5, "num_warps": 8, "num_stages": 2},
    ),
}


@triton.jit(do_not_specialize=["rows", "hidden", "inputs"])
def expand_backward_input_kernel(
    dz_ptr,
    y1_ptr,
    coef_ptr,
    w_ptr,
    residual_ptr,
    dx_ptr,
    rows,
    hidden,
    inputs,
    RESIDUAL: tl.constexpr,
    HIDDEN_ALIGN: tl.constexpr,
    INPUT_ALIGN: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dx = dy1 W1 (+ residual) of CHUNKS * BLOCK_C input channels, where dy1 = A dz1 + B y1 + C.

    Reads dz1 and y1 (and the residual), writes dx: 2 hidden + inputs (2 inputs) values a row; each further group of
    input channels reads dz1 and y1 again, from L2. Bound by DRAM. Grid: (groups of inputs * row tiles,).
    """
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    inputs = inputs // INPUT_ALIGN * INPUT_ALIGN
    groups = tl.cdiv(inputs, CHUNKS * BLOCK_C)
    row = (tl.program_id(0) // groups).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_c = (tl.program_id(0) % groups) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = (offs_m < rows - row)[:, None]
    tile_k = row * hidden + offs_m[:, None] * hidden + offs_k[None, :]
    tile_c = row * inputs + offs_m[:, None] * inputs + offs_c[None, :]
    tile_w = offs_k[:, None] * inputs + offs_c[None, :]
    dx = (tl.zeros((BLOCK_M, BLOCK_C), ACC),)
    for _ in tl.static_range(CHUNKS - 1):
        dx = dx + (tl.zeros((BLOCK_M, BLOCK_C), ACC),)
    for k in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < hidden - k
        mask = mask_m if EVEN_K else mask_m & mask_k[None, :]
        a = tl.load(coef_ptr + k + offs_k, mask=mask_k, other=0.0)[None, :]
        b = tl.load(coef_ptr + hidden + k + offs_k, mask=mask_k, other=0.0)[None, :]
        c = tl.load(coef_ptr + 2 * hidden + k + offs_k, mask=mask_k, other=0.0)[None, :]
        dz = tl.load(dz_ptr + k + tile_k, mask=mask, other=0.0).to(ACC)
        y1 = tl.load(y1_ptr + k + tile_k, mask=mask, other=0.0).to(ACC)
        dy = (a * dz + (b * y1 + c)).to(dx_ptr.dtype.element_ty)
        next_dx = ()
        for chunk in tl.static_range(CHUNKS):
            mask_w = mask_k[:, None]
            if not EVEN_C:
                mask_w = mask_w & (offs_c < inputs - chunk * BLOCK_C)[None, :]
            w = tl.load(w_ptr + k * inputs + chunk * BLOCK_C + tile_w, mask=mask_w, other=0.0)
            next_dx = next_dx + (tl.dot(dy, w, dx[chunk], input_precision=PRECISION, out_dtype=ACC),)
        dx = next_dx
    for chunk in tl.static_range(CHUNKS):
        mask_mc = mask_m & (offs_c < inputs - chunk * BLOCK_C)[None, :]
        result = dx[chunk]
        if RESIDUAL:
            result += tl.load(residual_ptr + chunk * BLOCK_C + tile_c, mask=mask_mc, other=0.0).to(ACC)
        tl.store(dx_ptr + chunk * BLOCK_C + tile_c, result.to(dx_ptr.dtype.element_ty), mask=mask_mc)


@triton.jit(do_not_specialize=["rows", "hidden", "inputs"])
def expand_backward_weight_kernel(
    dz_ptr,
    y1_ptr,
    coef_ptr,
    x_ptr,
    dw_ptr,
    rows,
    hidden,
    inputs,
    HIDDEN_ALIGN: tl.constexpr,
    INPUT_ALIGN: tl.constexpr,
    EVEN_H: tl.constexpr,
    EVEN_C: tl.constexpr,
    CHUNKS: tl.constexpr,
    ACC: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """dW1 = dy1^T x of BLOCK_H hidden and CHUNKS * BLOCK_C input channels, where dy1 = A dz1 + B y1 + C.

    Reads dz1, y1 and (per hidden tile, from L2) x: 2 hidden + inputs values a row; each further group of input
    channels reads dz1 and y1 again, from L2. Bound by DRAM. Grid: (groups of inputs, hidden tiles, parts of the rows).
    """
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    inputs = inputs // INPUT_ALIGN * INPUT_ALIGN
    part = tl.program_id(2)
    offs_m = tl.arange(0, BLOCK_M)
    offs_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_c = tl.program_id(0) * CHUNKS * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_h = offs_h < hidden
    tile_h = offs_m[:, None] * hidden + offs_h[None, :]
    tile_c = offs_m[:, None] * inputs + offs_c[None, :]
    a = tl.load(coef_ptr + offs_h, mask=mask_h, other=0.0)[None, :]
    b = tl.load(coef_ptr + hidden + offs_h, mask=mask_h, other=0.0)[None, :]
    c = tl.load(coef_ptr + 2 * hidden + offs_h, mask=mask_h, other=0.0)
    # A value that is not purely loaded keeps Triton from recomputing dy in the layout of the dot, once per warp.
    c = tl.where(mask_h, c, 0.0)[None, :]
    dw = (tl.zeros((BLOCK_H, BLOCK_C), ACC),)
    for _ in tl.static_range(CHUNKS - 1):
        dw = dw + (tl.zeros((BLOCK_H, BLOCK_C), ACC),)
    for tile in tl.range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(2), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        mask_m = (offs_m < rows - row)[:, None]
        mask = mask_m if EVEN_H else mask_m & mask_h[None, :]
        dz = tl.load(dz_ptr + row * hidden + tile_h, mask=mask, other=0.0).to(ACC)
        y1 = tl.load(y1_ptr + row * hidden + tile_h, mask=mask, other=0.0).to(ACC)
        # Past the last row this is C, which x = 0 keeps out of dW1.
        dy = tl.trans((a * dz + (b * y1 + c)).to(x_ptr.dtype.element_ty))
        next_dw = ()
        for chunk in tl.static_range(CHUNKS):
            mask_mc = mask_m if EVEN_C else mask_m & (offs_c < inputs - chunk * BLOCK_C)[None, :]
            x = tl.load(x_ptr + row * inputs + chunk * BLOCK_C + tile_c, mask=mask_mc, other=0.0)
            next_dw = next_dw + (tl.dot(dy, x, dw[chunk], input_precision=PRECISION, out_dtype=ACC),)
        dw = next_dw
    rows_w = dw_ptr + (part.to(tl.int64) * hidden + offs_h[:, None]) * inputs
    for chunk in tl.static_range(CHUNKS):
        columns = offs_c + chunk * BLOCK_C
        tl.store(rows_w + columns[None, :], dw[chunk], mask=mask_h[:, None] & (columns < inputs)[None, :])


def input_gradient(
    dz1: Tensor, y1: Tensor, coef1: Tensor, weight: Tensor, x: Tensor, residual: Tensor | None
) -> Tensor:
    """The gradient of x, plus residual."""
    hidden, inputs = weight.shape[:2]
    rows = x.numel() // inputs
    dx = new_channels_last(x, x.shape)
    tile = tuning.tile("expand_backward_input", x.dtype, hidden=hidden, cin=inputs)
    group = tile["BLOCK_C"] * tile["CHUNKS"]
    groups = triton.cdiv(inputs, group)
    expand_backward_input_kernel[(groups * triton.cdiv(rows, tile["BLOCK_M"]),)](
        dz1,
        y1,
        coef1,
        weight,
        residual,
        dx,
        rows,
        hidden,
        inputs,
        RESIDUAL=residual is not None,
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        INPUT_ALIGN=math.gcd(inputs, 16),
        EVEN_K=hidden % tile["BLOCK_K"] == 0,
        EVEN_C=inputs % group == 0,
        ACC=accumulator(x.dtype),
        PRECISION=tuning.dot_precision(x.dtype),
        STAGES=tile["num_stages"],
        **tile,
    )
    return dx


def weight_gradient(dz1: Tensor, y1: Tensor, coef1: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """The gradient of the weight, like it."""
    hidden, inputs = weight.shape[:2]
    rows = x.numel() // inputs
    tile = tuning.tile("expand_backward_weight", x.dtype, hidden=hidden, cin=inputs)
    group = tile["BLOCK_C"] * tile["CHUNKS"]
    groups = triton.cdiv(inputs, group)
    columns = triton.cdiv(hidden, tile["BLOCK_H"])
    traffic = rows * (2 * hidden + inputs) * x.element_size()
    parts = row_programs(rows, tile, groups * columns, traffic, hidden * inputs * 4)
    dw = coef1.new_empty((parts, hidden, inputs))
    expand_backward_weight_kernel[(groups, columns, parts)](
        dz1,
        y1,
        coef1,
        x,
        dw,
        rows,
        hidden,
        inputs,
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        INPUT_ALIGN=math.gcd(inputs, 16),
        EVEN_H=hidden % tile["BLOCK_H"] == 0,
        EVEN_C=inputs % group == 0,
        ACC=accumulator(x.dtype),
        PRECISION=tuning.dot_precision(x.dtype),
        STAGES=tile["num_stages"],
        **tile,
    )
    return sum_parts(dw, weight)
