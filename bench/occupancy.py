"""The architectures kernels are judged on: limits of an SM, rates of one GPU of that kind, and how many warps fit."""

from dataclasses import dataclass

_REGISTERS_PER_SM = 65536
_REGISTER_UNIT = 256  # registers are given to a warp in pieces of this size
_RESERVED_SHARED = 1024  # bytes the driver takes of every block's shared memory
_TENSOR_MEMORY_COLUMNS = 512

# Of the peaks below, what well-written kernels reach; shared with the project's traffic model.
ISSUE_SHARE, DRAM_SHARE, TENSOR_SHARE = 0.60, 0.85, 0.40


@dataclass(frozen=True)
class Architecture:
    """One compute architecture and the GPU its rates are of.

    Attributes:
        number: as in sm_<number>.
        gpu: whose rates stand here.
        warps, blocks: most of them resident on an SM.
        shared_per_sm, shared_per_block: bytes.
        processors: SMs.
        clock: Hz.
        bandwidth: DRAM, bytes/s.
        fp32_lanes: FP32 operations an SM starts in a clock.
        tensor_fma: fused multiply-adds/s of the tensor cores, 16-bit operands and float32 sums.
        mma_sync_share: of these, what the instructions of sm_80 (HMMA) reach.
    """

    number: int
    gpu: str
    warps: int
    blocks: int
    shared_per_sm: int
    shared_per_block: int
    processors: int
    clock: float
    bandwidth: float
    fp32_lanes: int
    tensor_fma: float
    mma_sync_share: float = 1.0

    @property
    def name(self) -> str:
        return f"sm_{self.number}"

    @property
    def issue_per_second(self) -> float:
        """Instructions of one thread that the whole GPU issues in a second."""
        return self.processors * 128 * self.clock

    @property
    def instructions_per_byte(self) -> float:
        """Instructions (of one thread) there is time for while a byte of DRAM moves: more, and issue is the bound."""
        return self.issue_per_second * ISSUE_SHARE / (self.bandwidth * DRAM_SHARE)


ARCHITECTURES = {
    a.number: a
    for a in (
        Architecture(80, "A100-40GB", 64, 32, 164 << 10, 163 << 10, 108, 1.41e9, 1.555e12, 64, 156e12),
        Architecture(86, "RTX 3090", 48, 16, 100 << 10, 99 << 10, 82, 1.695e9, 0.936e12, 128, 35.5e12),
        Architecture(89, "RTX 4090", 48, 24, 100 << 10, 99 << 10, 128, 2.52e9, 1.008e12, 128, 82.5e12),
        Architecture(90, "H100 SXM", 64, 32, 228 << 10, 227 << 10, 132, 1.755e9, 3.35e12, 128, 494e12, 0.6),
        Architecture(100, "B200", 64, 32, 228 << 10, 227 << 10, 148, 1.85e9, 8.0e12, 128, 1125e12, 0.25),
        Architecture(120, "RTX 5090", 48, 24, 100 << 10, 99 << 10, 170, 2.41e9, 1.792e12, 128, 105e12),
    )
}


def warps_per_sm(arch: Architecture, num_warps: int, registers: int, shared: int, tensor_columns: int = 0) -> int:
    """Warps of a kernel resident on one SM; 0: a block does not fit.

    Args:
        arch: the architecture.
        num_warps: of a block.
        registers: of a thread.
        shared: bytes of a block.
        tensor_columns: tensor memory of a block (sm_100).
    """
    if shared > arch.shared_per_block or tensor_columns > _TENSOR_MEMORY_COLUMNS:
        return 0
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    blocks = min(
        arch.blocks,
        arch.warps // num_warps,
        # Registers are split over an SM's four quarters, and a warp lies in one of them.
        4 * (_REGISTERS_PER_SM // 4 // max(per_warp, 1)) // num_warps,
        arch.shared_per_sm // (shared + _RESERVED_SHARED),
    )
    if tensor_columns:
        blocks = min(blocks, _TENSOR_MEMORY_COLUMNS // tensor_columns)
    return blocks * num_warps
