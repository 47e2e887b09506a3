"""Backward of relu6(bn2(y2)) followed by the 1x1 projection, from the gradient at bn3's output.

One kernel computes the input's and the weight's gradient in a single pass over y2 where the weight gradient of a
slice of hidden channels fits into registers. For more output channels the pass is cut in two. `dy3 = A g + B y3 + C`
is either computed on load (AFFINE in the tile), once for every slice of hidden channels, or written beforehand.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import MEAN, SCALE, SHIFT, channels_last, new_channels_last
from mbv2.kernels.triton import tuning
from mbv2.kernels.triton.project_backward_split import input_gradient, output_gradient, weight_gradient
from mbv2.kernels.triton.reduce import accumulator, row_programs, sum_parts

CANDIDATES: dict[str, tuple[dict[str, int], ...]] = {
    "project_backward": (
        {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_O": 16, "FOLD": 1, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 16, "FOLD": 4, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_O": 32, "FOLD": 1, "AFFINE": 1, "num_warps": 2, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "FOLD": 4, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 64, "FOLD": 4, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "FOLD": 4, "AFFINE": 0, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_O": 32, "FOLD": 4, "AFFINE": 0, "num_warps": 8, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_O": 32, "FOLD": 1, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_O": 16, "FOLD": 1, "AFFINE": 1, "num_warps": 4, "num_stages": 2},
        {"SPLIT": 1},
    ),
}

_MEAN, _SCALE, _SHIFT = tl.constexpr(MEAN), tl.constexpr(SCALE), tl.constexpr(SHIFT)
_ALL = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["rows", "hidden", "outputs"])
def project_backward_kernel(
    g_ptr,
    y3_ptr,
    coef_ptr,
    w_ptr,
    y2_ptr,
    bn_ptr,
    dz_ptr,
    sums_ptr,
    dw_ptr,
    rows,
    hidden,
    outputs,
    NEED_INPUT: tl.constexpr,
    NEED_WEIGHT: tl.constexpr,
    AFFINE: tl.constexpr,
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
    FOLD: tl.constexpr,
):
    """dz2 = (dy3 W3) where 0 < bn2(y2) < 6, its sums, and dW3 = dy3^T relu6(bn2(y2)), in one pass over y2.

    Reads y2 once and g and y3 once per hidden tile (from L2 after the first; dy3 alone where not AFFINE), writes dz2:
    2 hidden + 2 outputs values a row. Bound by DRAM up to Ampere, by instruction issue on Hopper. A program keeps
    dW3 of BLOCK_N hidden channels and all outputs, in CHUNKS tiles of BLOCK_O, in registers over its share of the
    rows. FOLD rows of a tile are added up before they reach the registers that carry the sums.
    Grid: (hidden tiles, parts of the rows).
    """
    # Division and multiplication tell the compiler the alignment, which it needs for wide loads.
    hidden = hidden // HIDDEN_ALIGN * HIDDEN_ALIGN
    outputs = outputs // OUTPUT_ALIGN * OUTPUT_ALIGN
    part = tl.program_id(1)
    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_o = tl.arange(0, BLOCK_O)
    mask_n = offs_n < hidden
    dtype = y2_ptr.dtype.element_ty
    mean = tl.load(bn_ptr + _MEAN * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    scale = tl.load(bn_ptr + _SCALE * hidden + offs_n, mask=mask_n, other=0.0)[None, :]
    shift = tl.load(bn_ptr + _SHIFT * hidden + offs_n, mask=mask_n, other=0.0)
    # A value that is not purely loaded keeps Triton from recomputing what follows in the layout of each dot, and
    # so from giving up the asynchronous copies. The same for `c` below.
    shift = tl.where(mask_n, shift, 0.0)[None, :]
    tile_n = offs_m[:, None] * hidden + offs_n[None, :]
    tile_o = offs_m[:, None] * outputs + offs_o[None, :]
    tile_w = offs_o[:, None] * hidden + offs_n[None, :]
    total = tl.zeros((BLOCK_M // FOLD, BLOCK_N), ACC)
    centred = tl.zeros((BLOCK_M // FOLD, BLOCK_N), ACC)
    dw = (tl.zeros((BLOCK_N, BLOCK_O), ACC),)
    for _ in tl.static_range(CHUNKS - 1):
        dw = dw + (tl.zeros((BLOCK_N, BLOCK_O), ACC),)
    for tile in tl.range(part, tl.cdiv(rows, BLOCK_M), tl.num_programs(1), num_stages=STAGES):
        row = tl.cast(tile, tl.int64) * BLOCK_M
        mask_m = (offs_m < rows - row)[:, None]
        mask = mask_m if EVEN_N else mask_m & mask_n[None, :]
        y2 = tl.load(y2_ptr + row * hidden + tile_n, mask=mask, other=0.0).to(ACC)
        z = y2 * scale + shift
        # Past the last row nothing lies between 0 and the cap, so neither gradient gets anything from there.
        cap = tl.where(mask_m, 6.0, 0.0)
        a2 = tl.minimum(tl.maximum(z, 0.0, propagate_nan=_ALL), cap, propagate_nan=_ALL).to(dtype)
        da = tl.zeros((BLOCK_M, BLOCK_N), ACC)
        next_dw = ()
        for chunk in tl.static_range(CHUNKS):
            first = chunk * BLOCK_O
            mask_o = offs_o < outputs - first
            mask_mo = mask_m if EVEN_O else mask_m & mask_o[None, :]
            dy = tl.load(g_ptr + row * outputs + first + tile_o, mask=mask_mo, other=0.0)
            if AFFINE:
                a = tl.load(coef_ptr + first + offs_o, mask=mask_o, other=0.0)[None, :]
                b = tl.load(coef_ptr + outputs + first + offs_o, mask=mask_o, other=0.0)[None, :]
                c = tl.load(coef_ptr + 2 * outputs + first + offs_o, mask=mask_o, other=0.0)
                c = tl.where(mask_o, c, 0.0)[None, :]
                y3 = tl.load(y3_ptr + row * outputs + first + tile_o, mask=mask_mo, other=0.0).to(ACC)
                dy = (a * dy.to(ACC) + (b * y3 + c)).to(dtype)
            if NEED_WEIGHT:
                next_dw = next_dw + (tl.dot(tl.trans(a2), dy, dw[chunk], input_precision=PRECISION, out_dtype=ACC),)
            if NEED_INPUT:
                mask_w = mask_o[:, None] if EVEN_N else mask_o[:, None] & mask_n[None, :]
                w = tl.load(w_ptr + first * hidden + tile_w, mask=mask_w, other=0.0)
                da = tl.dot(dy, w, da, input_precision=PRECISION, out_dtype=ACC)
        if NEED_WEIGHT:
            dw = next_dw
        if NEED_INPUT:
            dz = tl.where((z <= 0) | (z >= cap), 0.0, da.to(dtype).to(ACC))
            tl.store(dz_ptr + row * hidden + tile_n, dz.to(dtype), mask=mask)
            total += tl.sum(tl.reshape(dz, (FOLD, BLOCK_M // FOLD, BLOCK_N)), 0)
            centred += tl.sum(tl.reshape(dz * (y2 - mean), (FOLD, BLOCK_M // FOLD, BLOCK_N)), 0)
    if NEED_INPUT:
        sums = sums_ptr + part * 2 * hidden + offs_n
        tl.store(sums, tl.sum(total, 0), mask=mask_n)
        tl.store(sums + hidden, tl.sum(centred, 0), mask=mask_n)
    if NEED_WEIGHT:
        for chunk in tl.static_range(CHUNKS):
            first = chunk * BLOCK_O
            mask_w = (offs_o < outputs - first)[:, None] & mask_n[None, :]
            tl.store(dw_ptr + (part.to(tl.int64) * outputs + first) * hidden + tile_w, tl.trans(dw[chunk]), mask=mask_w)


def project_backward(
    grad: Tensor,
    y3: Tensor,
    coef3: Tensor,
    weight: Tensor,
    y2: Tensor,
    bn2: Tensor,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradient at bn3's output: (dz2 at bn2's output, its sums [G, 2, hidden], dweight like weight)."""
    if not (need_input or need_weight):
        return None, None, None
    grad = channels_last(grad)
    outputs, hidden = weight.shape[:2]
    rows = y2.numel() // hidden
    tile = tuning.tile("project_backward", y2.dtype, cout=outputs, hidden=hidden)
    dz2 = new_channels_last(y2, y2.shape) if need_input else None
    affine = tile.get("AFFINE", 0)
    if not affine:
        grad = output_gradient(grad, y3, coef3)
    if "SPLIT" in tile:
        sums = input_gradient(grad, weight, y2, bn2, dz2) if dz2 is not None else None
        return dz2, sums, weight_gradient(grad, weight, y2, bn2) if need_weight else None

    columns = triton.cdiv(hidden, tile["BLOCK_N"])
    traffic = rows * (hidden + outputs) * 2 * y2.element_size()
    parts = row_programs(rows, tile, columns, traffic, hidden * outputs * 4 if need_weight else 0)
    sums = bn2.new_empty((parts, 2, hidden)) if need_input else None
    dw = bn2.new_empty((parts, outputs, hidden)) if need_weight else None
    project_backward_kernel[(columns, parts)](
        grad,
        y3 if affine else None,
        coef3 if affine else None,
        weight,
        y2,
        bn2,
        dz2,
        sums,
        dw,
        rows,
        hidden,
        outputs,
        NEED_INPUT=need_input,
        NEED_WEIGHT=need_weight,
        EVEN_N=hidden % tile["BLOCK_N"] == 0,
        EVEN_O=outputs % tile["BLOCK_O"] == 0,
        CHUNKS=triton.cdiv(outputs, tile["BLOCK_O"]),
        STAGES=tile["num_stages"],
        HIDDEN_ALIGN=math.gcd(hidden, 16),
        OUTPUT_ALIGN=math.gcd(outputs, 16),
        ACC=accumulator(y2.dtype),
        PRECISION=tuning.dot_precision(y2.dtype),
        **tile,
    )
    return dz2, sums, None if dw is None else sum_parts(dw, weight)
