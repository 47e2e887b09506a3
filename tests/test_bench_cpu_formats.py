"""bench.cpu_bfloat16 and cpu_int8: they measure where there are instructions, and say so where there are none."""

from pathlib import Path

import pytest

from bench import cpu_bfloat16, cpu_int8, schema
from mbv2.kernels import cpu_network

pytestmark = pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}")
SMALL = ["--models", "0.35_32", "--batches", "2", "--seconds", "0"]


def test_a_machine_without_the_instructions_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MBV2_CPU_ISA", "avx2")
    assert cpu_bfloat16.main(SMALL) == 0
    assert "nothing to measure" in capsys.readouterr().out


def test_every_runner_is_measured_or_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MBV2_CPU_ISA", cpu_network.usable_isas("bfloat16")[0])
    assert cpu_bfloat16.main([*SMALL, "--out", str(tmp_path / "b")]) == 0
    result = schema.read(tmp_path / "b.json")
    measured = {row["runner"] for row in result.rows}
    assert {"mbv2", "mbv2 float32", "eager autocast"} <= measured
    assert measured | result.left_out.keys() == cpu_bfloat16.RUNNERS.keys()
    assert all(row["min_ms"] > 0 and row["peak_percent"] > 0 for row in result.rows)


def test_int8_has_right_logits_beside_the_other_runtimes(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert cpu_int8.main([*SMALL, "--out", str(tmp_path / "i")]) == 0
    result = schema.read(tmp_path / "i.json")
    errors = {row["runner"]: row["error"] for row in result.rows}
    assert {"mbv2", "mbv2 float32"} <= errors.keys()
    assert errors.keys() | result.left_out.keys() == cpu_int8.RUNNERS.keys()
    assert errors["mbv2 float32"] < 1e-5 < errors["mbv2"] < 0.3
    assert (tmp_path / "i.png").is_file()
