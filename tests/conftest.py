"""Fixtures every test may use."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real weights and pictures; it is no part of the repository."""
    default = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    folder = Path(os.environ.get("MBV2_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set MBV2_TEST_DATA)")
    return folder
