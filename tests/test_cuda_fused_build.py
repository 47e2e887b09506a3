"""What setup.py decides about the CUDA module, with the file's own functions and without building anything."""

from pathlib import Path
from typing import Any

import pytest
from ptxcpu.nvcc import find_nvcc

SETUP = Path(__file__).resolve().parents[1] / "setup.py"
with_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")


@pytest.fixture
def functions(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    for name in ("MBV2_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "MBV2_CUDA", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    names: dict[str, Any] = {}
    exec(compile(SETUP.read_text().split("\nsetup(\n")[0], str(SETUP), "exec"), names)
    return names


@with_nvcc
def test_the_listed_architectures_are_built_and_those_below_8_left_out(
    functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.0 9.0a+PTX")
    flags = functions["_arch_flags"](find_nvcc(), False)
    assert flags == ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_90,compute_90]"]
    monkeypatch.setenv("MBV2_CUDA_ARCHS", "7.5")
    with pytest.raises(RuntimeError, match=r"of the architectures 7\.5, .* support none"):
        functions["_arch_flags"](find_nvcc(), False)


def test_without_nvcc_there_is_one_line_and_no_module(
    functions: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert functions["_cuda_extension"]([], []) == []
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "there is no nvcc" in lines[0]
    monkeypatch.setenv("MBV2_CUDA", "0")
    assert functions["_cuda_extension"]([], []) == [] and capsys.readouterr().err == ""
