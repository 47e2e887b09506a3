"""Choice of backend: asked for, disabled, refused, failing its first-use check; what is counted and what is said."""

import inspect
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from mbv2 import kernels
from mbv2.kernels import aten, dispatch
from mbv2.kernels.selfcheck import disagreement
from mbv2.model import InvertedResidual

STAGES = [
    name
    for name, function in vars(aten).items()
    if inspect.isfunction(function) and function.__module__ == aten.__name__ and not name.startswith("_")
]


@pytest.fixture
def other(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A backend under the name "cuda" that is plain torch with a count of its calls; each test may break it."""
    calls: Counter[str] = Counter()

    def counted(name: str):
        def stage(*arguments):
            calls[name] += 1
            return getattr(aten, name)(*arguments)

        return stage

    stages = SimpleNamespace(**{name: counted(name) for name in STAGES})
    made = SimpleNamespace(stages=stages, calls=calls, reason=None)
    entry = dispatch.Backend(lambda device, dtype: made.reason, lambda: stages)
    monkeypatch.setitem(dispatch._backends, "cuda", entry)
    monkeypatch.setattr(dispatch, "_verdicts", {})
    monkeypatch.setattr(dispatch, "_said", set())
    return made


def run(training: bool = True) -> torch.Tensor:
    torch.manual_seed(0)
    block = InvertedResidual(8, 8, 1, 6).train(training)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    out = block(x)
    out.sum().backward()
    return out.detach()


def test_the_first_backend_that_takes_the_call_runs_it(other: SimpleNamespace) -> None:
    run()
    assert other.calls["expand"] == other.calls["depthwise_backward"] == 1
    assert kernels.report()["available"][0] == "cuda"


def test_calls_are_counted_forward_and_backward(other: SimpleNamespace) -> None:
    before = Counter(kernels.report()["calls"])
    run()
    added = Counter(kernels.report()["calls"]) - before
    assert added == {"inverted_residual_train/cuda": 1, "inverted_residual_train_backward/cuda": 1}


def test_asking_for_plain_torch_gets_it(other: SimpleNamespace) -> None:
    with kernels.backend("aten"):
        run()
    assert not other.calls


def test_a_refusing_backend_asked_for_by_name_is_a_clear_error(other: SimpleNamespace) -> None:
    other.reason = "no kernel likes Tuesdays"
    with (
        kernels.backend("cuda"),
        pytest.raises(kernels.BackendError, match=r"'cuda' cannot run .*Tuesdays; use backend 'auto' or 'aten'"),
    ):
        run()
    run()
    assert not other.calls


def test_triton_asked_for_on_a_cpu_says_what_is_missing() -> None:
    with kernels.backend("triton"), pytest.raises(kernels.BackendError, match="the input is on cpu, not on a CUDA GPU"):
        run()


def test_a_disabled_backend_is_not_chosen(other: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_DISABLE_CUDA", "1")
    run()
    assert not other.calls
    with kernels.backend("cuda"), pytest.raises(kernels.BackendError, match="MBV2_DISABLE_CUDA is set"):
        run()


def test_a_disabled_stage_runs_in_plain_torch_and_the_rest_does_not(
    other: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = run()
    other.calls.clear()
    monkeypatch.setenv("MBV2_DISABLE_PROJECT", "1")
    torch.testing.assert_close(run(), expected)
    assert other.calls["project"] == 0 and other.calls["project_backward"] == 1


def test_a_stage_that_fails_its_first_use_check_falls_back_and_says_so_once(
    other: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBV2_SELF_CHECK", "1")
    expected = run()
    good = other.stages.depthwise
    monkeypatch.setattr(dispatch, "_verdicts", {})
    other.stages.depthwise = lambda *a: tuple(2 * result for result in good(*a))
    with pytest.warns(UserWarning, match=r"stage depthwise of backend 'cuda' failed.*differs from plain torch"):
        out = run()
    torch.testing.assert_close(out, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run()
    assert list(kernels.report()["failed_checks"]) == ["depthwise/cuda float32 cpu"]
    with kernels.backend("cuda"), pytest.raises(kernels.BackendError, match="failed its first-use check"):
        run()


def test_a_stage_that_raises_in_its_first_use_check_falls_back(
    other: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MBV2_SELF_CHECK", "1")

    def broken(*arguments):
        raise RuntimeError("ptxas went home")

    other.stages.bn_apply = broken
    with pytest.warns(UserWarning, match="bn_apply.*ptxas went home"):
        run()


def test_each_stage_is_checked_once(other: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_SELF_CHECK", "1")
    run()
    once = other.calls["expand"]
    run()
    assert other.calls["expand"] == once + 1


def test_a_block_compiles_into_one_graph_whichever_backend_is_chosen(other: SimpleNamespace) -> None:
    block = InvertedResidual(8, 8, 1, 6).train()
    x = torch.randn(2, 8, 4, 4)
    for name in ("cuda", "aten"):
        torch._dynamo.reset()
        with kernels.backend(name):
            out = torch.compile(block, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(out, block(x))
    assert other.calls["expand"] >= 1


def test_importing_the_operators_imports_neither_triton_nor_the_compiler() -> None:
    code = "import sys, mbv2.kernels; print([m for m in ('triton', 'torch._dynamo') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_empty_batch_runs_in_plain_torch(other: SimpleNamespace) -> None:
    assert InvertedResidual(8, 8, 1, 6).eval()(torch.empty(0, 8, 4, 4)).shape == (0, 8, 4, 4)
    assert not other.calls


def test_inference_goes_through_the_folded_operator(other: SimpleNamespace) -> None:
    block = InvertedResidual(8, 8, 1, 6).eval()
    x = torch.randn(2, 8, 4, 4)
    with torch.no_grad():
        out = block(x)
        with kernels.backend("aten"):
            torch.testing.assert_close(out, block(x))
    assert other.calls == {"inverted_residual_folded": 1}


@pytest.mark.parametrize("stage", STAGES)
def test_the_check_passes_plain_torch_and_catches_a_wrong_result(stage: str) -> None:
    good = getattr(aten, stage)

    def wrong(*arguments):
        results = good(*arguments)
        listed = results if isinstance(results, tuple) else (results,)
        return tuple(None if r is None else torch.where(torch.arange(r.shape[0]) == 0, 1.3, 1.0).to(r.dtype).view(
            -1, *[1] * (r.dim() - 1)) * r for r in listed)  # fmt: skip

    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert disagreement(stage, good, dtype, torch.device("cpu")) is None
        assert "differs" in (disagreement(stage, wrong, dtype, torch.device("cpu")) or "agrees")


@pytest.mark.parametrize(("current", "guarded"), [(0, ["cuda:1"]), (1, [])])
def test_stages_run_on_the_gpu_their_tensors_are_on(
    current: int, guarded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    entered: list[str] = []

    @contextmanager
    def device(wanted: torch.device) -> Iterator[None]:
        entered.append(str(wanted))
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setitem(dispatch._backends, "cuda", dispatch.Backend(lambda device, dtype: None, lambda: aten))
    x = SimpleNamespace(is_cuda=True, device=torch.device("cuda", 1), dtype=torch.float32)
    y, bn = torch.ones(1, 2, 3, 3), torch.ones(6, 2)
    assert torch.equal(dispatch.Stages("cuda", x).bn_apply(y, bn, None, True), aten.bn_apply(y, bn, None, True))
    assert entered == guarded
