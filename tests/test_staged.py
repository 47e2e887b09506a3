"""Each staged operator by itself: against plain torch, its gradients, compilers, fakes, autocast and refusals."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from staged_cases import (
    CASES,
    ONCE,
    as_double,
    assert_near,
    column,
    differentiable,
    gradients,
    of,
    project_args,
    results,
    strided,
)
from torch import Tensor

from mbv2 import kernels
from mbv2.kernels import staged, staged_backward
from mbv2.kernels.layout import channels_last

SIZES = [(2, 3, 5, 4), (1, 1, 3, 3), (1, 4, 1, 1), (3, 1, 2, 5), (1, 2, 1, 6)]
every_case = pytest.mark.parametrize("case", CASES)
# Both are noise of others: numpy's, under Triton's interpreter, and torch's own check's reading of .grad.
pytestmark = [
    pytest.mark.usefixtures("plain_torch"),
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),
]


@pytest.fixture
def plain_torch() -> Iterator[None]:
    with kernels.backend("aten"):
        yield


@every_case
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_results_and_gradients_equal_plain_torch(case: str, sizes: tuple[int, ...]) -> None:
    op, plain, arguments = CASES[case]
    args = arguments(of(), *sizes)
    exact = results(plain(*args))
    grads = [torch.randn_like(e) for e in exact]
    # With --device interpreter these are the Triton kernels, in float64.
    with kernels.backend("auto"):
        got = results(op(*args))
        got_gradients = gradients(got, args, grads)
    for g, e in zip(got, exact, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)
    for g, e in zip(got_gradients, gradients(exact, args, grads), strict=True):
        torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-9)


@every_case
@pytest.mark.parametrize("sizes", [(2, 2, 3, 2), (1, 1, 2, 2), (3, 2, 1, 1)], ids=str)
def test_gradcheck(case: str, sizes: tuple[int, ...]) -> None:
    op, _, arguments = CASES[case]
    assert torch.autograd.gradcheck(op, arguments(of(seed=1), *sizes))


@every_case
@pytest.mark.parametrize(
    ("sizes", "memory"),
    [
        ((2, 3, 5, 4), "sliced"),
        ((1, 1, 3, 3), "contiguous"),
        ((1, 4, 1, 1), "contiguous"),
        ((2, 2, 4, 3), "transposed"),
    ],
    ids=str,
)
def test_opcheck(case: str, sizes: tuple[int, ...], memory: str) -> None:
    op, _, arguments = CASES[case]
    args = tuple(
        strided(a.detach(), memory).requires_grad_() if isinstance(a, Tensor) and a.dim() == 4 else a
        for a in arguments(of(torch.float32), *sizes)
    )
    torch.library.opcheck(op.overload, args)


BACKWARD = {
    "expand": (
        staged_backward.expand_backward,
        lambda m: (m(2, 5, 4, 3), m(2, 5, 4, 3), m(3, 5), m(5, 3, 1, 1), m(2, 3, 4, 3)),
    ),
    "depthwise": (
        staged_backward.depthwise_backward,
        lambda m: (m(2, 3, 2, 2), m(2, 3, 2, 2), m(3, 3), m(2, 3, 4, 3), m(3), m(3, around=1), m(3, 1, 3, 3), 2),
    ),
    "depthwise_bare": (
        staged_backward.depthwise_backward,
        lambda m: (m(1, 1, 4, 3), m(1, 1, 4, 3), m(3, 1), m(1, 1, 4, 3), None, None, m(1, 1, 3, 3), 1),
    ),
    "project": (
        staged_backward.project_backward,
        lambda m: (m(1, 5, 2, 2), m(1, 5, 2, 2), m(3, 5), m(5, 3, 1, 1), m(1, 3, 2, 2), m(3), m(3, around=1)),
    ),
    "stem": (
        staged_backward.stem_backward,
        lambda m: (m(2, 5, 2, 2), m(2, 5, 2, 2), m(3, 5), m(2, 3, 4, 3), m(5, 3, 3, 3), 2),
    ),
    "bn_apply": (
        staged_backward.bn_apply_backward,
        lambda m: (m(2, 3, 4, 3), m(2, 3, 4, 3), m(3), m(3, around=1), True),
    ),
}


@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("name", BACKWARD)
def test_opcheck_of_backward(name: str, needed: tuple[bool, bool]) -> None:
    op, arguments = BACKWARD[name]
    torch.library.opcheck(op.overload, (*arguments(of(torch.float32, grad=False)), *needed))


def test_opcheck_of_pool_backward() -> None:
    make = of(torch.float32, grad=False)
    arguments = (make(2, 3), make(2, 3, 4, 3), make(3), make(3))
    torch.library.opcheck(staged_backward.bn_relu6_pool_backward.overload, arguments)


@pytest.mark.parametrize("case", ONCE)
def test_frozen_inputs_get_no_gradient_and_leave_the_others_alone(case: str) -> None:
    op, _, arguments = CASES[case]
    args = arguments(of(), 2, 3, 4, 5)
    outputs = results(op(*args))
    grads = [torch.randn_like(o) for o in outputs]
    everything = iter(gradients(outputs, args, grads))
    for index, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            continue
        alone = tuple(a.detach() if isinstance(a, Tensor) and i != index else a for i, a in enumerate(args))
        (only,) = gradients(results(op(*alone)), alone, grads)
        torch.testing.assert_close(only, next(everything))


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_frozen_inputs_skip_their_work(frozen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[bool]] = []
    original = torch.ops.aten.convolution_backward

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return original(*args)

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", spy)
    y, scale, shift, weight = project_args(of(), 2, 3, 4, 4)
    args = (
        (y.detach(), scale.detach(), shift.detach(), weight)
        if frozen == "input"
        else (y, scale, shift, weight.detach())
    )
    staged.project(*args)[0].sum().backward()
    assert asked == [[frozen != "input", frozen != "weight", False]]


@pytest.mark.parametrize("case", ONCE)
def test_double_backward_is_refused_by_name(case: str) -> None:
    op, _, arguments = CASES[case]
    args = arguments(of(), 2, 3, 4, 4)
    outputs = results(op(*args))
    first = torch.autograd.grad(outputs, args[0], [torch.ones_like(o) for o in outputs], create_graph=True)
    name = case.removesuffix("_bare").removesuffix("_relu6")
    with pytest.raises(
        NotImplementedError, match=f"double backward of mbv2::{name} is not supported; use backend 'aten'"
    ):
        first[0].square().sum().backward()


@pytest.mark.parametrize("case", ["bn_finalize", "bn_finalize_bare"])
def test_bn_finalize_has_a_second_derivative(case: str) -> None:
    op, _, arguments = CASES[case]
    assert torch.autograd.gradgradcheck(op, arguments(of(), 2, 3, 4, 4))


@every_case
def test_meta_tensors_get_shape_type_and_strides(case: str) -> None:
    op, _, arguments = CASES[case]
    for sizes in SIZES:
        args = arguments(of(torch.float16, grad=False), *sizes)
        real = results(op(*args))
        fake = results(op(*[a.to("meta") if isinstance(a, Tensor) else a for a in args]))
        for r, f in zip(real, fake, strict=True):
            assert (f.shape, f.dtype, f.stride()) == (r.shape, r.dtype, r.stride()), (case, sizes)


@pytest.mark.parametrize("case", ONCE)
def test_gradients_have_their_own_inputs_type_and_layout(case: str) -> None:
    op, _, arguments = CASES[case]
    args = arguments(of(torch.float16), 2, 3, 4, 5)
    args = tuple(
        a.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        if isinstance(a, Tensor) and a.dim() == 4
        else a
        for a in args
    )
    outputs = results(op(*args))
    for arg, gradient in zip(
        differentiable(args), gradients(outputs, args, list(map(torch.ones_like, outputs))), strict=True
    ):
        assert (gradient.shape, gradient.dtype, gradient.stride()) == (arg.shape, arg.dtype, arg.stride())


@every_case
def test_autocast_leaves_the_operators_alone(case: str) -> None:
    op, _, arguments = CASES[case]
    args = arguments(of(torch.float32), 2, 3, 4, 5)
    outside = results(op(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = results(op(*args))
        grads = [torch.ones_like(o) for o in inside]
        inside_gradients = gradients(inside, args, grads)
    for a, b in zip((*inside, *inside_gradients), (*outside, *gradients(outside, args, grads)), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["expand", "depthwise", "project", "stem", "bn_apply_relu6", "bn_relu6_pool"])
def test_nan_passes(case: str) -> None:
    op, _, arguments = CASES[case]
    args = arguments(of(grad=False), 2, 3, 4, 5)
    args[0][1, 2, 3, 4] = float("nan")
    y = results(op(*args))[0]
    assert y[1].isnan().any()
    assert not y[0].isnan().any()


def test_sizes_and_types_that_do_not_fit_are_refused() -> None:
    make = of(torch.float32)
    x, weight, v = make(2, 3, 4, 5), make(6, 3, 1, 1), make(3)
    with pytest.raises(
        ValueError, match=r"weight of \(6, 4, 1, 1\) and stride 1 do not fit an input of \(2, 3, 4, 5\)"
    ):
        staged.expand(x, make(6, 4, 1, 1))
    with pytest.raises(ValueError, match="stride 3 do not fit"):
        staged.stem(x, make(6, 3, 3, 3), 3)
    with pytest.raises(ValueError, match=r"input is torch.float32 and the weight torch.float16; .*autocast does not"):
        staged.expand(x, weight.half())
    with pytest.raises(ValueError, match="both scale and shift, or neither"):
        staged.depthwise(x, v, None, make(3, 1, 3, 3), 1)
    with pytest.raises(ValueError, match=r"scale \(4,\) and shift \(3,\) do not fit"):
        staged.project(x, make(4), v, weight)
    with pytest.raises(ValueError, match=r"residual must be \(2, 3, 4, 5\)"):
        staged.bn_apply(x, v, v, make(2, 3, 4, 4), False)
    with pytest.raises(ValueError, match="do not fit"):
        staged.expand(x.to("meta"), make(6, 4, 1, 1).to("meta"))


TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 2e-1}


@settings(max_examples=60, deadline=None)
@given(
    case=st.sampled_from([name for name in CASES if not name.startswith("bn_finalize")]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7), st.integers(1, 7)),
    memory=st.sampled_from(["contiguous", "channels_last", "sliced", "transposed"]),
    weight_memory=st.sampled_from(["contiguous", "channels_last", "sliced"]),
    dtype=st.sampled_from(list(TOLERANCE)),
    stride=st.sampled_from([1, 2]),
    seed=st.integers(0, 5),
)
def test_any_shape_memory_and_type(
    case: str, sizes: Any, memory: str, weight_memory: str, dtype: torch.dtype, stride: int, seed: int
) -> None:
    op, plain, arguments = CASES[case]
    args = list(arguments(of(dtype, grad=False, seed=seed), *sizes))
    if case in ("depthwise", "depthwise_bare", "stem"):
        args[-1] = stride
    exact_args = tuple(as_double(a) for a in args)
    # The mask of ReLU6 is a matter of rounding where its argument is 0 or 6: away from there.
    if case not in ("expand", "stem", "depthwise_bare", "bn_apply"):
        z = column(exact_args[1]) * exact_args[0] + column(exact_args[2])
        near = (z.abs() < 0.05) | ((z - 6).abs() < 0.05)
        args[0] = args[0].masked_fill(near, 0)
        exact_args = tuple(as_double(a) for a in args)
    for index, arg in enumerate(args):
        if isinstance(arg, Tensor) and arg.dim() == 4:
            is_weight = index > 0 and case != "bn_apply"
            args[index] = strided(arg, weight_memory if is_weight else memory)
    for tensor in (*args, *exact_args):
        if isinstance(tensor, Tensor):
            tensor.requires_grad_()
    got, exact = results(op(*args)), results(plain(*exact_args))
    grads = [torch.randn(e.shape, generator=torch.Generator().manual_seed(seed)) for e in exact]
    for g, e in zip(got, exact, strict=True):
        assert_near(g, e, TOLERANCE[dtype])
        assert g.stride() == (channels_last(g).stride() if g.dim() == 4 else torch.empty(g.shape).stride())
    mine = gradients(got, tuple(args), [v.to(g.dtype) for v, g in zip(grads, got, strict=True)])
    truth = gradients(exact, exact_args, [v.to(g.dtype).double() for v, g in zip(grads, got, strict=True)])
    for g, e in zip(mine, truth, strict=True):
        assert_near(g, e, 10 * TOLERANCE[dtype])
