"""Who am I among the processes: torchrun, mpirun, srun or alone, and the few collectives the product uses."""

import contextlib
import os
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from mbv2.errors import UserError

# Each launcher's (rank, world size, local rank), most specific first: srun inside torchrun is still torchrun.
_LAUNCHERS = (
    ("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("srun", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)

# Whether this process has been part of a process group.
_joined = False


@dataclass(frozen=True)
class World:
    """This process among all: global rank, rank on this machine, number of processes, and its device."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that talks and writes files."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        """Whether a process group exists."""
        return dist.is_available() and dist.is_initialized()

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum `tensor` over all processes, in place, and return it. Every rank must call it."""
        if self.is_distributed:
            if self.device.type == "cuda" and tensor.device.type != "cuda":
                moved = tensor.to(self.device)
                dist.all_reduce(moved)
                tensor.copy_(moved)
            else:
                dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.is_distributed:
            dist.barrier()

    def broadcast_object(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        if not self.is_distributed:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Everyone's `value` in rank order, on every rank."""
        if not self.is_distributed:
            return [value]
        box: list[Any] = [None] * self.world_size
        dist.all_gather_object(box, value)
        return box


def init(device_target: str = "auto", run_distribute: bool = True) -> World:
    """Join the process group that the launcher's variables describe, or stay alone when there are none.

    Args:
        device_target: "GPU", "CPU" or "auto" (GPU when there is one). gloo serves the CPU, NCCL the GPU.
        run_distribute: False ignores the launcher's variables (refused when there is more than one process).

    Raises:
        UserError: unknown device, no GPU where one is asked for, fewer GPUs than local processes, or
            incomplete launcher variables.
    """
    target = device_target.lower()
    if target not in ("gpu", "cuda", "cpu", "auto"):
        raise UserError(f"--device_target {device_target}: choose GPU, CPU or auto")
    if target in ("gpu", "cuda") and not torch.cuda.is_available():
        raise UserError(f"--device_target {device_target}: torch sees no CUDA GPU here; use --device_target CPU")
    on_gpu = target != "cpu" and torch.cuda.is_available()
    rank, world_size, local_rank = _launched()
    if not run_distribute and world_size > 1:
        raise UserError(f"--run_distribute False, but {world_size} processes were started; start one")
    if on_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise UserError(f"local rank {local_rank} has no GPU: {count} visible; start {count} processes per machine")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    if run_distribute and "RANK" in os.environ and not dist.is_initialized():
        global _joined
        _joined = True
        # torchrun with one process still gets a group, so that one code path is tested everywhere.
        dist.init_process_group(
            "nccl" if on_gpu else "gloo",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(minutes=30),
            device_id=device if on_gpu else None,
        )
    return World(rank, local_rank, world_size, device)


def leave(code: int) -> NoReturn:
    """End the process with exit code `code`; after work in a process group, without Python's finalisation.

    Threads of gloo may still be letting go of tensors then. One that asks for the interpreter while it is being
    finalised aborts the process ("terminate called without an active exception"), which torchrun takes for a failure.
    """
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    if _joined:
        os._exit(code)
    sys.exit(code)


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def _launched() -> tuple[int, int, int]:
    """(rank, world_size, local_rank) of the launcher; mpirun's and srun's are exported under torchrun's names."""
    for launcher, rank_name, size_name, local_name in _LAUNCHERS:
        if rank_name not in os.environ or size_name not in os.environ:
            continue
        try:
            rank, size = int(os.environ[rank_name]), int(os.environ[size_name])
            local = int(os.environ.get(local_name, "0"))
        except ValueError as error:
            raise UserError(f"{launcher}'s {rank_name}, {size_name} or {local_name} is not a number") from error
        if launcher != "torchrun":
            if size == 1:
                return 0, 1, 0
            _export_rendezvous(launcher, rank, size, local)
        return rank, size, local
    return 0, 1, 0


def _export_rendezvous(launcher: str, rank: int, size: int, local: int) -> None:
    local_size = os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") or os.environ.get("MPI_LOCALNRANKS")
    one_machine = local_size == str(size) or os.environ.get("SLURM_NNODES") == "1"
    if "MASTER_ADDR" not in os.environ:
        if not one_machine:
            raise UserError(
                f"{launcher} started {size} processes on several machines: "
                "set MASTER_ADDR to the first machine's name (and MASTER_PORT if 29500 is taken)"
            )
        os.environ["MASTER_ADDR"] = "127.0.0.1"
    os.environ.setdefault("MASTER_PORT", "29500")
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(local))
