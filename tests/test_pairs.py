"""The table of pairs: what the planner's choice saves, where, and the instructions of both ways."""

import json
from pathlib import Path

import pytest

from bench import fused_counts, pairs, plan
from bench.occupancy import ARCHITECTURES
from mbv2.kernels.cuda import fused

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
A100 = ARCHITECTURES[80]


def test_pairs_save_what_the_two_plans_differ_by_and_say_where() -> None:
    for batch in (1, 64):
        row = pairs.network(A100, 1.0, 224, batch)
        saved = sum(pair["saves_us"] for pair in row["pairs"])
        assert row["planned_us"] == pytest.approx(row["one_launch_us"] - saved, abs=0.02)
        assert row["saved"] == pytest.approx(saved / row["one_launch_us"], abs=1e-4)
        assert bool(row["pairs"]) == (batch == 64)


def test_a_pairs_instructions_are_those_of_both_launches_machine_code() -> None:
    row = pairs.network(A100, 1.0, 224, 64)
    [one] = [pair for pair in row["pairs"] if pair["block"] == 17]
    block = plan.network()[16]
    shape, gpu = pairs.shape_of(block, 64), pairs.limits(A100)
    pair, whole = fused.pair_for(shape, gpu), fused.plan_for(shape, gpu)
    assert isinstance(pair, fused.Pair) and isinstance(whole, fused.Plan)
    first, second = fused_counts.pair_executed(shape, pair, pairs.counts(A100))
    least = block.hidden * block.cout * 49 * 64 / 2048 * 32  # tensor-core instructions of the product alone
    assert second > least and first > 0
    alone = fused_counts.executed(shape, whole, pairs.counts(A100))
    assert one["instructions"] == pytest.approx((first + second) / alone, abs=1e-3)


def test_command_prints_the_table_and_writes_every_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs.workload, "variants", lambda: iter([(0.35, 96)]))
    path = tmp_path / "pairs.json"
    assert pairs.main(["--gpu", "A100-40GB", "H100 SXM", "--batch", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["gpu"], row["alpha"], row["batch"]) for row in rows] == [("A100-40GB", 0.35, 1), ("H100 SXM", 0.35, 1)]
    assert "PREDICTED" in capsys.readouterr().out
