"""The operators' benchmark: it covers the network, counts its work, and prints no time for a wrong result."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__ as cli
from bench import kernels as bench
from bench import schema
from mbv2 import kernels
from mbv2.kernels import aten, dispatch
from mbv2.model import MobileNetV2

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads_as_before() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


SMALL = [
    "--model",
    "0.35_32",
    "--batch",
    "2",
    "--seconds",
    "0",
    "--threads",
    "2",
    "--operators",
    "stem",
    "block 16",
    "head",
]


def test_the_operators_are_the_networks_stem_distinct_blocks_and_head() -> None:
    names = [operator.name for operator in bench.operators(1.0, 224, 1)]
    assert names[0] == "stem 3-32 224"
    assert names[1:4] == ["block 32-32-16 s1 112", "block 16-96-24 s2 112", "block 24-144-24 s1 56 +x"]
    assert names[-1] == "head 320-1280 7"
    # Seven rows of the paper's table 2, of which five repeat a block whose shape differs from the row's first.
    assert len(names) == len(set(names)) == 1 + (7 + 5) + 1


def test_work_is_that_of_torchs_own_counter() -> None:
    for operator in bench.operators(0.35, 96, 2):
        with kernels.backend("aten"), FlopCounterMode(display=False) as counter, torch.no_grad():
            operator.module.eval()
            out = operator.run(torch.zeros(operator.shape))
        assert counter.get_total_flops() == 2 * bench.multiply_adds(operator), operator.name
        assert out.shape[0] == 2


def test_input_shapes_are_those_the_network_sees() -> None:
    model, x = MobileNetV2(width_mult=0.5), torch.zeros(1, 3, 96, 96)
    shapes = set()
    with torch.no_grad():
        for feature in model.features[:-1]:
            shapes.add(tuple(x.shape))
            x = feature(x)
    shapes.add(tuple(x.shape))
    assert {operator.shape for operator in bench.operators(0.5, 96, 1)} == shapes


@pytest.mark.parametrize("which", bench.PASSES)
def test_measuring_leaves_the_operators_state_as_it_was(which: str) -> None:
    operator = next(bench.operators(0.35, 32, 2))
    results = [bench._results(operator, which, "aten", bench._input(operator, CPU, torch.float32)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradients_are_of_the_input_and_all_parameters() -> None:
    stem, block, *_ = bench.operators(0.35, 32, 2)
    x = bench._input(block, CPU, torch.float32)
    assert bench._results(block, "backward", "aten", x)[0].shape == x.shape
    assert len(bench._results(block, "backward", "aten", x)) == 1 + len(list(block.module.parameters()))
    # Nobody wants the picture's gradient.
    x = bench._input(stem, CPU, torch.float32)
    assert len(bench._results(stem, "backward", "aten", x)) == len(list(stem.module.parameters()))


def test_bytes_are_inputs_and_outputs_once() -> None:
    block = list(bench.operators(1.0, 224, 1))[1]
    out = torch.empty(1, 16, 112, 112)
    x, y, weights = 32 * 112**2, 16 * 112**2, 32 * 9 + 32 * 16 + 2 * (32 + 16)
    assert bench.moved_bytes(block, out, 4, "forward") == 4 * (x + y + weights)
    assert bench.moved_bytes(block, out, 2, "backward") == 2 * (2 * x + y + 2 * weights)


class _Off:
    """A backend whose depthwise convolution is a little off."""

    def __getattr__(self, stage: str) -> object:
        return getattr(aten, stage)

    def depthwise(self, *args: object) -> object:
        y, moments = aten.depthwise(*args)
        return y * 1.01, moments


def test_a_wrong_backend_gets_no_time_and_the_exit_code_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = dispatch.Backend(lambda device, dtype: None, lambda: aten)
    wrong = dispatch.Backend(lambda device, dtype: None, _Off)
    refusing = dispatch.Backend(lambda device, dtype: "no such device", lambda: SimpleNamespace())
    monkeypatch.setitem(dispatch._backends, "cuda", wrong)
    monkeypatch.setitem(dispatch._backends, "cpu", right)
    monkeypatch.setitem(dispatch._backends, "triton", refusing)
    argv = ["kernels", *SMALL, "--passes", "forward", "--out", str(tmp_path / "k"), "--device", "cpu"]
    assert cli.main(argv) == 1
    result = schema.read(tmp_path / "k.json")
    timed = {(row["operator"].split()[0], row["backend"]) for row in result.rows}
    assert timed == {(name, backend) for name in ("stem", "block", "head") for backend in ("aten", "cpu")} | {
        ("stem", "cuda"),
        ("head", "cuda"),
    }
    wrongs = [name for name, why in result.left_out.items() if why.startswith("wrong result")]
    assert wrongs
    assert all(name.startswith("mbv2 cuda, block") for name in wrongs)
    assert "no such device" in result.left_out["mbv2 triton"]
    assert "wrong result" in capsys.readouterr().out


def test_plain_torch_alone_is_no_failure(tmp_path: Path) -> None:
    assert cli.main(["kernels", *SMALL, "--device", "cpu", "--backends", "aten", "--out", str(tmp_path / "k")]) == 0
    rows = schema.read(tmp_path / "k.json").rows
    assert {row["pass"] for row in rows} == set(bench.PASSES)
    assert all(row["faster"] == 1 and row["gflop_per_s"] > 0 and row["gb_per_s"] > 0 for row in rows)


def test_a_runner_s_forward_pass_leaves_what_another_s_backward_pass_has_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch._backends, "cpu", dispatch.Backend(lambda device, dtype: None, lambda: aten))
    argv = ["kernels", *SMALL, "--passes", "backward", "--device", "cpu", "--backends", "cpu"]
    assert cli.main([*argv, "--out", str(tmp_path / "k")]) == 0
    timed = {(row["operator"].split()[0], row["backend"]) for row in schema.read(tmp_path / "k.json").rows}
    assert timed == {(name, backend) for name in ("stem", "block", "head") for backend in ("aten", "cpu")}
