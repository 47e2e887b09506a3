"""Benchmarks on a CPU: the LiteRT file is the model, parts add up to the whole, tables have what they promise."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bench import cpu, cpu_blocks, cpu_parts, cpu_peers, cpu_scaling, cpu_training, schema
from bench.schema import Row
from mbv2 import optimized
from mbv2.kernels import cpu_network


@torch.no_grad()
def test_the_litert_peer_computes_the_model(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    models = cpu_peers.make_models(0.35)
    x = torch.randn(2, 3, 64, 64)
    run = cpu_peers.litert(models, cpu_peers.Case(0.35, 64, 2, 1), x, str(tmp_path))
    torch.testing.assert_close(torch.tensor(run(x)), models[1](x), rtol=1e-4, atol=1e-5)


def test_the_litert_peer_refuses_sizes_that_its_padding_does_not_fit(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    with pytest.raises(ValueError, match="72 pixels"):
        cpu_peers.litert(cpu_peers.make_models(0.35), cpu_peers.Case(0.35, 72, 1, 1), torch.zeros(1), str(tmp_path))


@pytest.mark.parametrize(("width", "resolution"), [(1.0, 224), (0.5, 100)])
def test_the_parts_add_up_to_the_whole(width: float, resolution: int) -> None:
    model = cpu_peers.make_models(width)[0]
    parts = cpu_parts.part_work(optimized.block_shapes(model), model.last_channel, model.num_classes, resolution)
    assert sum(part["flop"] for part in parts) == 2 * cpu.multiply_adds(width, resolution)


compiled = pytest.mark.skipif(cpu_network.refusal() is not None, reason=f"{cpu_network.refusal()}")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@compiled
def test_every_part_and_the_whole_are_timed() -> None:
    rows, peak = cpu_parts.measure("0.35_64", 1, 0)
    assert [row["part"] for row in rows[-3:]] == ["head", "classifier", "the whole run"]
    assert all(row["least_ms"] > 0 and row["peak_percent"] > 0 for row in rows)
    assert peak > 0
    # No run is as fast as every part's fastest together.
    assert rows[-1]["least_ms"] >= sum(row["least_ms"] for row in rows[:-1]) * 0.999


def case(batch: int, runner: str, median: float, threads: int = 1) -> Row:
    figures = {"median_ms": median, "cpu_median_ms": median, "over_ours": median / 2}
    return {"model": "1.0_224", "batch": batch, "threads": threads, "runner": runner, **figures}


def test_a_batch_is_held_against_the_peer_s_single_pictures_as_well() -> None:
    rows = [case(1, "mbv2", 2.0), case(1, "peer", 3.0), case(4, "mbv2", 6.0), case(4, "peer", 13.0)]
    cpu.add_looped(rows)
    assert [row.get("looped_over_ours") for row in rows] == [None, None, 4 * 2 / 6, 4 * 3 / 6]
    (first, second) = cpu.summary(rows)
    assert first == "1.0_224 batch 1, 1 thread(s): best peer 1.50 (peer)"
    assert second == "1.0_224 batch 4, 1 thread(s): best peer 6.50 (peer); looped over batch 1 2.00 (peer)"


def test_two_threads_are_held_against_one() -> None:
    rows = [case(1, "mbv2", 2.0), case(1, "mbv2", 1.25, threads=2), case(1, "peer", 1.5, threads=2)]
    assert cpu.summary(rows) == ["1.0_224 batch 1, 2 thread(s): best peer 0.75 (peer); 1.60 x one thread by the clock"]


@compiled
def test_the_table_of_peers_is_written_and_drawn(tmp_path: Path) -> None:
    out = tmp_path / "cpu"
    argv = ["--models", "0.35_32", "--batches", "1", "2", "--runners", "mbv2", "eager NCHW", "--seconds", "0"]
    assert cpu.main([*argv, "--threads", "1", "2", "--out", str(out)]) == 0
    result = schema.read(tmp_path / "cpu.json")
    assert [(row["batch"], row["threads"], row["runner"]) for row in result.rows] == [
        (batch, threads, runner) for batch in (1, 2) for threads in (1, 2) for runner in ("mbv2", "eager NCHW")
    ]
    assert all((row["handover_ns"] is not None) == (row["threads"] == 2) for row in result.rows)
    assert (tmp_path / "cpu.png").is_file()


@compiled
def test_scaling_has_a_row_for_each_shape(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu_scaling, "BATCHES", (1, 2))
    monkeypatch.setattr(cpu_scaling, "SIZES", (32, 48))
    monkeypatch.setattr(cpu_scaling, "ODD", (cpu_scaling.Odd(0.1, 3, 7, 5), cpu_scaling.Odd(0.1, 1, 1, 1)))
    assert cpu_scaling.main(["--seconds", "0", "--out", str(tmp_path / "s")]) == 0
    rows = schema.read(tmp_path / "s.json").rows
    assert [row["shape"] for row in rows] == [
        *("1 x 224 x 224", "2 x 224 x 224", "1 x 32 x 32", "1 x 48 x 48", "3 x 7 x 5", "1 x 1 x 1")
    ]
    assert (tmp_path / "s.png").is_file()


@compiled
def test_training_steps_are_checked_timed_and_their_memory_counted(tmp_path: Path) -> None:
    argv = ["--models", "0.35_96", "--batches", "2", "--threads", "1", "--seconds", "0", "--out", str(tmp_path / "t")]
    assert cpu_training.main([*argv, "--runners", "mbv2", "eager channels_last", "eager NCHW"]) == 0
    rows = {row["runner"]: row for row in schema.read(tmp_path / "t.json").rows}
    assert list(rows) == ["mbv2", "eager channels_last", "eager NCHW"]
    assert rows["mbv2"]["saved_mib_per_image"] < rows["eager NCHW"]["saved_mib_per_image"]
    assert rows["eager channels_last"]["faster"] == 1
    assert (tmp_path / "t.png").is_file()


@compiled
def test_blocks_are_checked_and_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocks = (cpu_blocks.Block(2, 8, 16, 5, 3, 2), cpu_blocks.Block(3, 8, 8, 1, 1, 1, 1))
    monkeypatch.setattr(cpu_blocks, "BLOCKS", blocks)
    assert cpu_blocks.main(["--seconds", "0", "--out", str(tmp_path / "b")]) == 0
    rows = schema.read(tmp_path / "b.json").rows
    assert [row["shape"] for row in rows] == ["2 x 8 x 5 x 3", "3 x 8 x 1 x 1"]
    assert all(row["rounds"] == 5 and row["cpu_min_us"] > 0 and row["eager_min_us"] > 0 for row in rows)
    assert (tmp_path / "b.png").is_file()


@compiled
@pytest.mark.parametrize("broken", [1.01, float("nan")])
def test_a_block_with_a_wrong_gradient_is_not_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], broken: float
) -> None:
    from mbv2.kernels.cpu import stages

    right = stages.expand_backward
    monkeypatch.setattr(stages, "expand_backward", lambda *a: tuple(broken * g for g in right(*a)))
    monkeypatch.setattr(cpu_blocks, "BLOCKS", (cpu_blocks.Block(2, 8, 16, 5, 3, 2),))
    assert cpu_blocks.main(["--seconds", "0"]) == 1
    assert "left out: mbv2 at 2 x 8 x 5 x 3 to 16, stride 2: wrong result" in capsys.readouterr().out


def test_a_runner_that_is_far_slower_than_ours_is_not_timed_again() -> None:
    rows = [{"threads": 1, "runner": name, "cpu_median_ms": ms} for name, ms in (("mbv2", 2), ("a", 5), ("b", 13))]
    assert cpu_training.too_slow(rows, 1) == ["b"]
    assert cpu_training.too_slow(rows, 2) == []


@compiled
def test_a_runner_with_wrong_gradients_is_left_out() -> None:
    runners, plain = cpu_training.make_runners(0.35, ["mbv2", "eager channels_last"])
    with torch.no_grad():
        runners["mbv2"].model.classifier[1].weight.mul_(1.5)
    found, wrong = cpu_training.checked(0.35, 64, runners, plain)
    assert list(found) == ["eager channels_last"]
    assert "differ from float64" in wrong["mbv2"]
