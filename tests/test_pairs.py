"""Fused block or pairs: the model's arithmetic, and that what it calls best is never slower than all blocks fused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import pairs, plan
from bench.occupancy import ARCHITECTURES

pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
A100 = ARCHITECTURES[80]
BLOCK = plan.Block(32, 192, 32, 1, 28, True)


def test_a_launch_takes_the_longest_of_what_bounds_it() -> None:
    gpu = replace(A100, processors=10, clock=1e9, bandwidth=1e12 / 0.85)
    work = pairs.Work()
    work.add(8, 4, 300, shared=12800, products=1024)
    assert work.longest == pairs.START + pairs.LONE_WARP * 2 * 300
    # Of 2 blocks an SM in a full wave each has half of its issue slots: 2400 instructions at 2.4 a clock, twice.
    assert pairs.microseconds(gpu, work, 20, 2, 0, 0) == pytest.approx(max(2 * 1000, work.longest) / 1e3)
    # One block more is a wave of its own.
    assert pairs.microseconds(gpu, work, 21, 2, 0, 0) == pytest.approx((2 * work.longest) / 1e3, rel=0.01)
    assert pairs.microseconds(gpu, work, 1, 2, 0, dram=1e9) == pytest.approx(1000)
    assert pairs.microseconds(gpu, work, 1, 2, moved=pairs.L2 * 1e6, dram=0) == pytest.approx(1000)


def test_both_pairs_are_weighed_where_a_block_expands() -> None:
    names = [option.name for option in pairs.options(A100, BLOCK, 8)]
    assert names == ["fused", "expand+depthwise | project", "expand | depthwise+project"]
    alone = replace(BLOCK, cin=32, hidden=32, expands=False)
    assert [option.name for option in pairs.options(A100, alone, 8)] == ["fused"]


def test_a_pair_writes_and_reads_the_hidden_tensor_through_dram_and_launches_twice() -> None:
    batch = 256
    slow = replace(A100, bandwidth=A100.bandwidth / 100)
    hidden = pairs.ITEM * BLOCK.elements["E2"] * batch
    _, pair, _ = pairs.options(slow, BLOCK, batch)
    assert pair.microseconds > 1e6 * 2 * hidden / slow.bandwidth + pairs.SECOND_LAUNCH
    # At batch 8 it stays in L2.
    _, pair, _ = pairs.options(slow, BLOCK, 8)
    assert pair.microseconds < 1e6 * 2 * hidden / 32 / slow.bandwidth


def test_the_best_choice_is_never_slower_and_says_where_it_departs_from_the_fused_block() -> None:
    for batch in (1, 64):
        row = pairs.network(A100, 0.5, 96, batch)
        assert row["best_us"] <= row["fused_us"] and 0 <= row["saved"] < 1
        assert bool(row["pairs"]) == (row["best_us"] < row["fused_us"])


def test_command_prints_the_table_and_writes_every_network(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pairs.workload, "variants", lambda: iter([(0.35, 96)]))
    path = tmp_path / "pairs.json"
    assert pairs.main(["--gpu", "A100-40GB", "H100 SXM", "--batch", "1", "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    assert [(row["gpu"], row["alpha"], row["batch"]) for row in rows] == [("A100-40GB", 0.35, 1), ("H100 SXM", 0.35, 1)]
    assert "PREDICTED" in capsys.readouterr().out
