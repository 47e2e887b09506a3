"""Sharing rows among programs, and adding up the parts of a weight gradient that they leave behind."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mbv2.kernels.layout import wide

# Warps that keep a large GPU busy, and programs beyond which what each of them leaves behind outweighs balance.
_BUSY, _MOST = 1024, 1024
_TILE, _WIDEST, _PROGRAMS = 2048, 64, 256


@triton.jit(do_not_specialize=["parts_count"])
def sum_parts_kernel(
    parts_ptr, out_ptr, parts_count, size, PARTS: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr
):
    """out[i] = sum over g of parts[g, i], rounded once, always added in the same order.

    Reads 4 bytes (8 for float64) per element of parts [G, size], writes one activation-sized value per element of
    out [size]. Bound by DRAM or, for few elements, by latency, hence PARTS rows in flight at once. Grid: (blocks of
    size,).
    """
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < size
    offs_g = tl.arange(0, PARTS)
    total = tl.zeros((PARTS, BLOCK), ACC)
    for first in range(0, parts_count, PARTS):
        g = first + offs_g
        rows = parts_ptr + g.to(tl.int64)[:, None] * size
        total += tl.load(rows + offs[None, :], mask=(g < parts_count)[:, None] & inside[None, :], other=0.0)
    tl.store(out_ptr + offs, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=inside)


def sum_parts(parts: Tensor, like: Tensor) -> Tensor:
    """Add parts [G, ...] over g in a fixed order.

    Args:
        parts: dense float32 (float64 for float64 gradients), each part with `like`'s elements in row-major order.
        like: the parameter.

    Returns:
        The sum with `like`'s shape, strides and type.
    """
    out = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
    # Only the stem's weight can have another order of its elements than row-major.
    straight = out.is_contiguous()
    target = out if straight else torch.empty(like.shape, dtype=like.dtype, device=like.device)
    size = like.numel()
    # A small weight is cut finely, or few programs would add up many parts one after the other.
    block = min(_WIDEST, max(8, triton.next_power_of_2(size // _PROGRAMS)))
    sum_parts_kernel[(triton.cdiv(size, block),)](
        parts,
        target,
        parts.shape[0],
        size,
        PARTS=_TILE // block,
        BLOCK=block,
        ACC=accumulator(parts.dtype),
        num_warps=4,
    )
    return out if straight else out.copy_(target)


def row_programs(rows: int, tile: dict[str, int], others: int, traffic: int = 0, part: int = 0) -> int:
    """How many programs share the rows.

    Args:
        rows: there are.
        tile: BLOCK_M and num_warps of the kernel.
        others: programs that work on the same rows.
        traffic: bytes the kernel moves.
        part: bytes each of the programs leaves to be added up; they stay below a tenth of the traffic where that does
            not leave the GPU idle.

    Returns:
        A number that depends on nothing else, so that equal shapes give equal bits; each gets equally many tiles, or
        one less.
    """
    tiles = triton.cdiv(rows, tile["BLOCK_M"])
    most = _MOST // others
    if part:
        most = min(most, max(traffic // (10 * part), _BUSY // (others * tile["num_warps"])))
    each = triton.cdiv(tiles, max(1, most))
    return triton.cdiv(tiles, each)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Triton's name of the type that values of `dtype` are added up in."""
    return tl.float64 if wide(dtype) == torch.float64 else tl.float32
