"""The doctor's report: complete, true, on one screen."""

import json
from collections.abc import Iterator

import pytest
import torch

from mbv2 import cli, doctor
from mbv2.kernels.cuda import support


@pytest.fixture(scope="module")
def found() -> Iterator[dict]:
    yield doctor.examine()


def test_the_report_names_versions_device_and_loader(found: dict) -> None:
    assert found["torch"] == torch.__version__
    assert found["device"] == ("CUDA" if torch.cuda.is_available() else "CPU")
    assert found["loader"] in ("torch", "dali")
    assert found["device_why"]
    assert found["loader_why"]
    assert len(found["gpus"]) == torch.cuda.device_count()


def test_the_backends_are_those_that_ran(found: dict) -> None:
    calls = found["kernels"]["calls"]
    # 17 blocks in inference and 17 in a training step, whose operator has its own name where it is not plain torch's.
    operators = ("inverted_residual", "inverted_residual_train")
    assert sum(count for name, count in calls.items() if name.split("/")[0] in operators) == 34
    assert set(found["kernels"]["used"]) == {name.rsplit("/", 1)[1] for name in calls}
    assert set(found["kernels"]["used"]) <= set(found["kernels"]["available"])
    assert found["kernels"]["why"]


def test_calls_before_the_examination_are_not_counted(found: dict) -> None:
    assert doctor.examine()["kernels"]["calls"] == found["kernels"]["calls"]


def test_a_backend_asked_for_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_BACKEND", "aten")
    kernels = doctor.examine()["kernels"]
    assert kernels["used"] == ["aten"]
    assert "MBV2_BACKEND=aten" in kernels["why"]


def test_a_backend_that_is_not_there_is_reported_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_BACKEND", "abacus")
    kernels = doctor.examine()["kernels"]
    assert kernels["used"] == []
    assert "abacus" in kernels["why"]


def test_it_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 10 <= len(lines) <= 24
    assert {"python", "torch", "device", "CPU", "DALI", "loader", "extension", "kernels"} <= {
        line.split(maxsplit=1)[0] for line in lines
    }


@pytest.mark.parametrize("reason", [None, "mbv2 has no compiled CUDA kernels here"])
def test_the_cuda_module_is_there_or_the_reason_why_not(reason: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "missing", lambda: reason)
    lines = dict(doctor._rows(doctor.examine()))
    assert lines["extension (GPU)"] == f"mbv2._cuda, the CUDA C++ kernels: {reason or 'compiled'}"


def test_json_is_the_same_report(found: dict, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == found


def test_a_machine_without_dali_is_told_how_to_get_it(found: dict) -> None:
    lines = dict(doctor._rows({**found, "dali": None}))
    assert "pip install" in lines["DALI"]


def test_an_unknown_option_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--xray"]) == 2
    assert "--xray" in capsys.readouterr().err
