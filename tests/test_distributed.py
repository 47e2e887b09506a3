"""Reading the launcher's variables."""

import pytest
import torch

from mbv2 import distributed
from mbv2.errors import UserError

ALL = [name for launcher in distributed._LAUNCHERS for name in launcher[1:]]


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ALL, "MASTER_ADDR", "MASTER_PORT", "SLURM_NNODES", "OMPI_COMM_WORLD_LOCAL_SIZE"]:
        monkeypatch.delenv(name, raising=False)


def test_alone_without_variables() -> None:
    world = distributed.init("CPU")
    assert (world.rank, world.world_size, world.device) == (0, 1, torch.device("cpu"))
    assert world.is_main
    assert not world.is_distributed
    assert world.gather_objects("x") == ["x"]


@pytest.mark.parametrize(
    "names",
    [
        ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ],
)
def test_mpirun_and_srun_are_read_and_exported_for_torch(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str]
) -> None:
    for name, value in zip(names, ("5", "8", "1"), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
        monkeypatch.delenv(name)
    monkeypatch.setenv("MASTER_ADDR", "node0")
    assert distributed._launched() == (5, 8, 1)


def test_several_machines_without_an_address_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_PROCID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "4")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        distributed._launched()


def test_torchrun_wins_over_the_srun_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "RANK": "3",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "1",
        "SLURM_PROCID": "0",
        "SLURM_NTASKS": "2",
    }.items():
        monkeypatch.setenv(name, value)
    assert distributed._launched() == (3, 4, 1)


def test_a_garbled_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "first")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="RANK"):
        distributed._launched()


def test_unknown_device_and_absent_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="choose GPU, CPU or auto"):
        distributed.init("Ascend")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="use --device_target CPU"):
        distributed.init("GPU")
