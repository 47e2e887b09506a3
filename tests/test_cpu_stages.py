"""The CPU backend's stages against plain torch in float64: every instruction set, odd shapes, any memory."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Gpu
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from stage_check import activations, batch_norm_of, check_stage, coefficients, weights
from staged_cases import strided
from torch import Tensor

from mbv2.kernels import aten, cpu_network
from mbv2.kernels.cpu import stages
from mbv2.kernels.selfcheck import disagreement

ISAS = [] if cpu_network.refusal() else cpu_network.usable_isas()
HERE = Gpu("cpu", "cpu", [])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
PUBLIC = sorted(
    name
    for name, value in vars(aten).items()
    if inspect.isfunction(value) and value.__module__ == aten.__name__ and not name.startswith("_")
)

pytestmark = pytest.mark.skipif(not ISAS, reason=f"{cpu_network.refusal()}")


@pytest.fixture(params=cpu_network.ISAS)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in ISAS:
        pytest.skip(f"this machine cannot run {request.param}")
    monkeypatch.setenv("MBV2_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def bias(c: int) -> Tensor:
    return torch.randn(c, generator=torch.Generator().manual_seed(4))


def calls(
    n: int, cin: int, hidden: int, cout: int, h: int, w: int, stride: int, dtype: torch.dtype
) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Every stage with kernels of its own, and arguments of a block of these sizes."""
    ho, wo = (h - 1) // stride + 1, (w - 1) // stride + 1
    x, y1 = activations(n, cin, h, w, dtype), activations(n, hidden, h, w, dtype, 1)
    y2, y3 = activations(n, hidden, ho, wo, dtype, 2), activations(n, cout, ho, wo, dtype, 3)
    grad, dz1, dz2 = (activations(*t.shape, dtype, seed) for seed, t in enumerate((y3, y1, y2), 10))
    w1, wd = weights(hidden, cin, 1, 1, dtype=dtype), weights(hidden, 1, 3, 3, dtype=dtype)
    w3 = weights(cout, hidden, 1, 1, dtype=dtype)
    picture, ws = activations(n, 3, h, w, dtype), weights(hidden, 3, 3, 3, dtype=dtype)
    around = activations(2, hidden, 5, 5, dtype, 7)
    bn, bn_out = batch_norm_of(around), batch_norm_of(activations(2, cout, 5, 5, dtype, 8))
    coef, coef3 = coefficients(hidden, dtype), coefficients(cout, dtype)
    b, b3 = bias(hidden), bias(cout)
    block: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (stages.stem, (picture, ws, stride)),
        (stages.expand, (x, w1)),
        (stages.depthwise, (y1, bn, wd, stride)),
        (stages.depthwise, (y1, None, wd, stride)),
        (stages.project, (y2, bn, w3)),
        (stages.bn_apply, (y3, bn_out, grad, False)),
        (stages.bn_apply, (y1, bn, None, True)),
        (stages.bn_relu6_pool, (y1, bn)),
        (stages.bn_sums, (grad, y3, bn_out, False)),
        (stages.bn_sums, (dz1, y1, bn, True)),
        (stages.depthwise_backward, (dz2, y2, coef, y1, bn, wd, stride, True, True)),
        (stages.depthwise_backward, (dz2, y2, coef, y1, None, wd, stride, True, True)),
        (stages.stem_backward, (dz2, y2, bn, coef, picture, ws, stride, False, True)),
        (stages.pool_backward, (dz1[:, :, 0, 0].contiguous(), y1, bn)),
        (stages.stem_folded, (picture, ws, b, stride)),
        (stages.pointwise_folded, (x, w1, b, True, None)),
        (stages.pointwise_folded, (y2, w3, b3, False, grad)),
        (stages.depthwise_folded, (y1, wd, b, stride)),
        (stages.inverted_residual_folded, (x, w1, b, wd, b, w3, b3, stride, stride == 1 and cin == cout)),
        (stages.inverted_residual_folded, (y1, None, None, wd, b, w3, b3, stride, False)),
        (stages.head_folded, (x, w1, b)),
    ]
    for need in ((True, True), (True, False), (False, True)):
        block.append((stages.project_backward, (grad, y3, coef3, w3, y2, bn, *need)))
        block.append((stages.expand_backward, (dz1, y1, coef, w1, x, None if need[1] else x, *need)))
    block.append((stages.expand_backward, (dz1, y1, coef, w1, x, x, True, True)))
    return block


def check(*sizes: Any) -> None:
    # Sums over few positions cancel almost to nothing at times, for either side.
    for stage, arguments in calls(*sizes):
        check_stage(HERE, stage, *arguments, slack=3)


def test_every_stage_of_the_contract_is_there_and_no_other() -> None:
    assert sorted(stages.__all__) == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_a_stage_has_the_contract_s_arguments_and_results(name: str) -> None:
    assert inspect.signature(getattr(stages, name)) == inspect.signature(getattr(aten, name))
    assert inspect.getdoc(getattr(stages, name))


@TYPES
@pytest.mark.parametrize("name", PUBLIC)
def test_a_stage_agrees_with_plain_torch_on_the_first_use_check(isa: str, name: str, dtype: torch.dtype) -> None:
    assert disagreement(name, getattr(stages, name), dtype, torch.device("cpu")) is None


# (n, cin, hidden, cout, h, w, stride): a block of the network with a shortcut; channels that fill no vector, several
# tiles of rows; a picture of one pixel; weights beyond what one pass keeps in a cache, for few rows and for more.
SHAPES = [
    (2, 24, 72, 24, 14, 13, 1),
    (3, 5, 19, 7, 27, 33, 2),
    (3, 8, 8, 8, 1, 1, 1),
    (2, 72, 520, 72, 5, 4, 1),
    (3, 72, 920, 72, 10, 9, 1),
]


@TYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stages_are_as_good_as_eager(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check(*shape, dtype)


@settings(max_examples=12, deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    n=st.integers(1, 4),
    cin=st.integers(1, 40),
    hidden=st.integers(1, 70),
    cout=st.integers(1, 40),
    h=st.integers(1, 12),
    w=st.integers(1, 19),
    stride=st.sampled_from([1, 2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    isa=st.sampled_from(ISAS or ["portable"]),
)
def test_any_shape_is_as_good_as_eager(
    n: int, cin: int, hidden: int, cout: int, h: int, w: int, stride: int, dtype: torch.dtype, isa: str
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MBV2_CPU_ISA", isa)
        check(n, cin, hidden, cout, h, w, stride, dtype)


def assert_same_bits(one: Any, other: Any, label: str) -> None:
    for index, (a, b) in enumerate(zip(listed(one), listed(other), strict=True)):
        assert (a is None) == (b is None), label
        assert a is None or torch.equal(a, b), f"{label} result {index} differs"


def listed(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


@TYPES
def test_one_and_two_threads_and_repeated_calls_give_the_same_bits(
    isa: str, dtype: torch.dtype, threads: Callable[[int], None]
) -> None:
    for shape in ((3, 16, 64, 16, 22, 31, 1), (2, 64, 600, 64, 9, 9, 2)):
        for stage, arguments in calls(*shape, dtype):
            results = []
            for count in (1, 2, 3, 1):
                threads(count)
                results.append(stage(*arguments))
            for other in results[1:]:
                assert_same_bits(results[0], other, stage.__name__)


@pytest.mark.parametrize("how", ["contiguous", "sliced", "transposed"])
def test_activations_and_weights_may_lie_in_memory_in_any_way(isa: str, how: str) -> None:
    for stage, arguments in calls(2, 8, 24, 8, 6, 5, 1, torch.float32):
        moved = [strided(a, how) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
        assert_same_bits(stage(*arguments), stage(*moved), stage.__name__)


def test_activations_may_begin_at_any_address(isa: str) -> None:
    def shifted(x: Tensor) -> Tensor:
        memory = torch.full((x.numel() + 3,), float("nan"))[3:]
        n, c, h, w = x.shape
        return memory.view(n, h, w, c).permute(0, 3, 1, 2).copy_(x)

    for stage, arguments in calls(2, 8, 24, 8, 6, 5, 2, torch.float32):
        moved = [shifted(a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in arguments]
        assert_same_bits(stage(*arguments), stage(*moved), stage.__name__)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_weight_gradients_have_the_weight_s_strides(layout: torch.memory_format) -> None:
    for stage, arguments in calls(2, 8, 24, 8, 6, 5, 1, torch.float32):
        if not stage.__name__.endswith("_backward") or arguments[-1] is not True:
            continue
        moved = [
            a.to(memory_format=layout) if isinstance(a, Tensor) and a.shape[2:] == (3, 3) else a for a in arguments
        ]
        weight = next(a for a in moved[2:] if isinstance(a, Tensor) and a.dim() == 4 and a.shape[2] in (1, 3))
        assert stage(*moved)[-1].stride() == weight.stride()


@TYPES
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e-41])
def test_special_values_spread_as_in_eager(isa: str, dtype: torch.dtype, value: float) -> None:
    for stage, arguments in (*calls(2, 8, 24, 8, 6, 7, 1, dtype), *calls(2, 8, 24, 8, 12, 13, 1, dtype)):
        given_arguments = list(arguments)
        first = next(i for i, a in enumerate(arguments) if isinstance(a, Tensor) and a.dim() == 4)
        broken = arguments[first].clone(memory_format=torch.preserve_format)
        broken[1, 2, 3, 4] = value
        given_arguments[first] = broken
        got = listed(stage(*given_arguments))
        wanted = listed(getattr(aten, stage.__name__)(*given_arguments))
        for mine, theirs in zip(got, wanted, strict=True):
            if theirs is None:
                continue
            if theirs.dim() == 3:  # of statistics only whether they are finite is comparable
                mine, theirs = mine.isfinite().all(0), theirs.isfinite().all(0)
                assert torch.equal(mine, theirs), stage.__name__
                continue
            # A product with a zero weight's infinity may be NaN on either side, never a number.
            assert torch.equal(mine.isfinite(), theirs.isfinite()), stage.__name__


def test_a_mean_far_from_zero_costs_no_digits_of_the_variance(isa: str) -> None:
    x = activations(3, 8, 40, 41, torch.float32) * 1e-2 + 1000
    weight = torch.zeros(24, 8, 1, 1)
    weight[:, 0] = 1
    for y, moments in (stages.expand(x, weight), stages.depthwise(x, None, torch.ones(8, 1, 3, 3), 2)):
        merged = stages.merge_moments(moments).double()
        exact = y.double()
        torch.testing.assert_close(merged[1], exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            merged[2], exact.var((0, 2, 3), correction=0) * y.numel() / y.shape[1], rtol=2e-3, atol=0
        )


def test_results_larger_than_the_caches_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    # Beyond 24 MiB results go past the caches; the portable kernels have no such stores.
    size = (1, 8, 64, 8, 340, 320, 1)
    for stage, arguments in calls(*size, torch.float32):
        if stage.__name__ in ("expand", "depthwise", "project_backward", "depthwise_backward"):
            results = []
            for name in (ISAS[0], "portable"):
                monkeypatch.setenv("MBV2_CPU_ISA", name)
                results.append(listed(stage(*arguments)))
            for mine, portable in zip(*results, strict=True):
                if mine is not None:
                    torch.testing.assert_close(mine, portable, rtol=1e-3, atol=1e-3 * float(portable.abs().max()))


def test_wrong_arguments_are_said() -> None:
    x = activations(2, 8, 5, 5, torch.float32)
    bn = batch_norm_of(x)
    weight = weights(24, 8, 1, 1, dtype=torch.float32)
    for call, message in (
        (lambda: stages.expand(x, weight[:, :4]), "weight must be"),
        (lambda: stages.expand(x.half(), weight.half()), "float32 and bfloat16"),
        (lambda: stages.expand(x, weight.bfloat16()), "one type"),
        (lambda: stages.expand(x[:0], weight), "not empty"),
        (lambda: stages.project(x, bn[:, :4], weight), "statistics must be"),
        (lambda: stages.depthwise(x, bn, weights(8, 1, 3, 3, dtype=torch.float32), 3), "stride"),
        (lambda: stages.bn_apply(x, bn, x[:1], False), "do not fit"),
        (lambda: stages.bn_backward(torch.zeros(1, 3, 8), bn), "sums must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_an_unknown_instruction_set_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_CPU_ISA", "abacus")
    with pytest.raises(RuntimeError, match=r"abacus.*portable"):
        stages.bn_apply(activations(1, 8, 2, 2, torch.float32), torch.zeros(6, 8), None, False)
