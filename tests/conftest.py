"""Fixtures every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

# Two processes of tests with two threads each share two cores: a thread that spins while it waits keeps the others
# from working. The runtime reads it once, when torch loads it; what tests start inherits it.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("ptx", "interpreter", "cuda"),
        default="ptx",
        help="where Triton kernels run in tests: their PTX on the CPU, Triton's interpreter, or a GPU",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Triton reads it when a kernel is defined, so it must stand before any kernel is imported.
    os.environ["TRITON_INTERPRET"] = "1" if config.getoption("--device") == "interpreter" else "0"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Fixtures that go by --device.
    for item in items:
        if {"gpu", "emulated", "mode"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.gpu)


class Gpu(NamedTuple):
    """Where kernels run: the device of their tensors, and, when PTX runs on the CPU, what every launch did."""

    mode: str
    device: str
    launches: list[Any]


@pytest.fixture
def gpu(request: pytest.FixtureRequest) -> Iterator[Gpu]:
    """A place to run Triton kernels in (see --device); new tensors are filled with NaN until a kernel writes them."""
    mode = request.config.getoption("--device")
    if mode == "cuda" and not torch.cuda.is_available():
        pytest.fail("--device cuda, but torch sees no GPU")
    torch.use_deterministic_algorithms(True)
    try:
        if mode == "ptx":
            from ptxcpu.triton_driver import emulated

            with emulated(80) as launches:
                yield Gpu(mode, "cpu", launches)
        else:
            yield Gpu(mode, "cuda" if mode == "cuda" else "cpu", [])
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and pictures; it is no part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MBV2_TEST_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MBV2_TEST_DATA)")
    return folder
