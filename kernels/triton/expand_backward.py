"""Backward of a 1x1 convolution followed by BatchNorm and ReLU6, from the gradient at the BatchNorm's output.

It serves the expansion and the head. One kernel computes both gradients in a single pass where the whole weight
gradient fits into the registers of a thread block; for more channels the pass is cut in two.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import channels_last, new_channels_last
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.expand_backward_split import input_gradient, weight_gradient
from mbv2.kernels.triton.reduce import accumulator, row_programs, sum_parts

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "expand_backward": (
        {"BLOCK_M": 64, "BLOCK_H": 32, "BLOCK_C": 16, "num_warps": 2, "num_stages": 2},
        {"BLOCK_M": 16, "BLOCK_H": 32, "BLOCK_C": 16, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_H": 32, "BLOCK_C": 16, "num_warps": 2, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_H": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_H": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_H": 64, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 16, "BLOCK_H": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 64, "BLOCK_H": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 16, "BLOCK_H": 32, "BLOCK_C": 32, "num_warps": 8, "num_stages": 2},
        {"SPLIT": 1},
    ),
}


@triton.jit(do_not_specialize=["rows", "hidden", "inputs"])
def expand_backward_kernel(
    dz_ptr,
    y1_ptr,
    coef_ptr,
    w_ptr,
    x_ptr,
    residual_ptr,
    dx_ptr,
    dw_ptr,
    rows,
    hidden,
    inputs,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    RESIDUAL: tl.constexpr,
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
    """dx = dy1 W1 (+ residual) and dW1 = dy1^T x in one pass, where dy1 = A dz1 + B y1 + C.

    Reads dz1, y1, x (and the residual) once, writes dx: 2 hidden + 2 (3) inputs values a row. Bound by DRAM. A
    program keeps all of dW1, in CHUNKS tiles of BLOCK_H hidden channels, in registers over its share of the rows.
    Grid: (parts of the rows,).
    """
    # Division and multiplication tell the compiler the alignment, which it needs for wide loads.
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    inputs = inputs // INPUT_ALIGN * INPUT_ALIGN
    part = tl.program_id(0)
    dtype = y1_ptr.dtype.element_ty
    offs_m = tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H)
    offs_c = tl.arange(0, BLOCK_C)
    mask_c = (offs_c < inputs)[None, :]
    tile_h = offs_m[:, None] * hidden + offs_h[None, :]
    tile_c = offs_m[:, None] * inputs + offs_c[None, :]
    tile_w = offs_h[:, None] * inputs + offs_c[None, :]
    dw = (tl.zeros((BLOCK_H, BLOCK_C), ACC),)
    for _ in tl.static_range(CHUNKS - 1):
        dw = dw + (tl.zeros((BLOCK_H, BLOCK_C), ACC),)
    for tile in tl.range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        mask_m = (offs_m < rows - row)[:, None]
        mask_mc = mask_m if EVEN_C else mask_m & mask_c
        if NEED_WEIGHT:
            x = tl.load(x_ptr + row * inputs + tile_c, mask=mask_mc, other=0.0)
        dx = tl.zeros((BLOCK_M, BLOCK_C), ACC)
        next_dw = ()
        for chunk in tl.static_range(CHUNKS):
            first = chunk * BLOCK_H
            mask_h = offs_h < hidden - first
            a = tl.load(coef_ptr + first + offs_h, mask=mask_h, other=0.0)[None, :]
            b = tl.load(coef_ptr + hidden + first + offs_h, mask=mask_h, other=0.0)[None, :]
            c = tl.load(coef_ptr + 2 * hidden + first + offs_h, mask=mask_h, other=0.0)
            # A value that is not purely loaded keeps Triton from recomputing dy in the layout of each dot, and so
            # from giving up the asynchronous copies.
            c = tl.where(mask_h, c, 0.0)[None, :]
            mask = mask_m if EVEN_H else mask_m & mask_h[None, :]
            dz = tl.load(dz_ptr + row * hidden + first + tile_h, mask=mask, other=0.0).to(ACC)
            y1 = tl.load(y1_ptr + row * hidden + first + tile_h, mask=mask, other=0.0).to(ACC)
            # Past the last row this is C, which x = 0 keeps out of dW1.
            dy = (a * dz + (b * y1 + c)).to(dtype)
            if NEED_INPUT:
                mask_w = mask_h[:, None] if EVEN_C else mask_h[:, None] & mask_c
                w = tl.load(w_ptr + first * inputs + tile_w, mask=mask_w, other=0.0)
                dx = tl.dot(dy, w, dx, input_precision=PRECISION, out_dtype=ACC)
            if NEED_WEIGHT:
                next_dw = next_dw + (tl.dot(tl.trans(dy), x, dw[chunk], input_precision=PRECISION, out_dtype=ACC),)
        if NEED_WEIGHT:
            dw = next_dw
        if NEED_INPUT:
            if RESIDUAL:
                dx += tl.load(residual_ptr + row * inputs + tile_c, mask=mask_mc, other=0.0).to(ACC)
            tl.store(dx_ptr + row * inputs + tile_c, dx.to(dtype), mask=mask_mc)
    if NEED_WEIGHT:
        for chunk in tl.static_range(CHUNKS):
            first = chunk * BLOCK_H
            mask_w = (offs_h < hidden - first)[:, None] & mask_c
            tl.store(dw_ptr + (part.to(tl.int64) * hidden + first) * inputs + tile_w, dw[chunk], mask=mask_w)


def expand_backward(
    dz1: Tensor,
    y1: Tensor,
    coef1: Tensor,
    weight: Tensor,
    x: Tensor,
    residual_grad: Tensor | None,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """From dz1: (dx, dweight); residual_grad, the gradient that reaches x past the block, is added to dx."""
    if not (need_input or need_weight):
        return None, None
    dz1 = channels_last(dz1)
    residual = channels_last(residual_grad) if need_input and residual_grad is not None else None
    hidden, inputs = weight.shape[:2]
    rows = x.numel() // inputs
    tile = tuning.tile("expand_backward", x.dtype, hidden=hidden, cin=inputs)
    if "SPLIT" in tile:
        dx = input_gradient(dz1, y1, coef1, weight, x, residual) if need_input else None
        return dx, weight_gradient(dz1, y1, coef1, weight, x) if need_weight else None

    dx = new_channels_last(x, x.shape) if need_input else None
    traffic = rows * (hidden + inputs) * 2 * x.element_size()
    parts = row_programs(rows, tile, 1, traffic, hidden * inputs * 4 if need_weight else 0)
    dw = coef1.new_empty((parts, hidden, inputs)) if need_weight else None
    expand_backward_kernel[(parts,)](
        dz1,
        y1,
        coef1,
        weight,
        x,
        residual,
        dx,
        dw,
        rows,
        hidden,
        inputs,
        NEED_INPUT=need_input,
        NEED_WEIGHT=need_weight,
        RESIDUAL=residual is not None,
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        INPUT_ALIGN=math.gcd(inputs, 16),
        EVEN_H=hidden % tile["BLOCK_H"] == 0,
        EVEN_C=inputs % tile["BLOCK_C"] == 0,
        CHUNKS=triton.cdiv(hidden, tile["BLOCK_H"]),
        ACC=accumulator(x.dtype),
        PRECISION=tuning.dot_precision(x.dtype),
        STAGES=tile["num_stages"],
        **tile,
    )
    return dx, None if dw is None else sum_parts(dw, weight)
