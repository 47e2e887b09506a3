"""The block in training mode made of staged operators: against the reference, compiled, and through Triton."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Gpu
from stage_check import FLOOR, HALF_AND_SINGLE, relative_error
from staged_cases import Make, of
from torch import Tensor

from mbv2 import kernels
from mbv2.kernels import reference, staged
from mbv2.kernels.stages import BatchNorm, ConvBN

pytestmark = [
    pytest.mark.usefixtures("plain_torch"),
    # numpy's, under Triton's interpreter.
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning"),
]
BLOCKS = {
    "stride 1, residual": (3, 8, 3, 1, True),
    "stride 1": (3, 8, 5, 1, False),
    "stride 2": (3, 8, 5, 2, False),
    "t=1": (4, None, 3, 1, False),
    "t=1, residual": (4, None, 4, 1, True),
}
every_block = pytest.mark.parametrize("block", BLOCKS)


@pytest.fixture
def plain_torch() -> Iterator[None]:
    with kernels.backend("aten"):
        yield


def composed(
    x: Tensor, parameters: dict[str, Tensor], stride: int, residual: bool, eps: float = 1e-3
) -> tuple[Tensor, list[Tensor]]:
    """The block in training mode out of staged operators, and the variances it met."""
    variances = []

    def finalized(y: Tensor, mean: Tensor, m2: Tensor, which: str) -> tuple[Tensor, Tensor, Tensor]:
        number = y.numel() / y.shape[1]
        scale, shift, var = staged.bn_finalize(mean, m2, number, parameters["g" + which], parameters["b" + which], eps)
        variances.append(var)
        return y, scale, shift

    y1 = (x, None, None) if "w1" not in parameters else finalized(*staged.expand(x, parameters["w1"]), "1")
    y2 = finalized(*staged.depthwise(*y1, parameters["wd"], stride), "2")
    y3 = finalized(*staged.project(*y2, parameters["w3"]), "3")
    return staged.bn_apply(*y3, x if residual else None, False), variances


def block_parameters(c: int, hidden: int | None, out: int, make: Make) -> dict[str, Tensor]:
    parameters = (
        {} if hidden is None else {"w1": make(hidden, c, 1, 1), "g1": make(hidden, around=1), "b1": make(hidden)}
    )
    width = hidden or c
    return parameters | {
        "wd": make(width, 1, 3, 3),
        "g2": make(width, around=1),
        "b2": make(width, around=1),
        "w3": make(out, width, 1, 1),
        "g3": make(out, around=1),
        "b3": make(out),
    }


def by_reference(x: Tensor, parameters: dict[str, Tensor], stride: int, residual: bool) -> Tensor:
    def conv(weight: str, which: str) -> ConvBN:
        bn = BatchNorm(parameters["g" + which], parameters["b" + which], None, None, None, 0.1, 1e-3, True, False)
        return ConvBN(parameters[weight], bn)

    expand = conv("w1", "1") if "w1" in parameters else None
    return reference.inverted_residual(x, expand, conv("wd", "2"), conv("w3", "3"), stride, residual)


@every_block
def test_block_of_stages_equals_the_reference_with_all_gradients(block: str) -> None:
    c, hidden, out, stride, residual = BLOCKS[block]
    make = of(seed=7)
    x, parameters = make(3, c, 7, 6), block_parameters(c, hidden, out, make)
    theirs = by_reference(x, parameters, stride, residual)
    grad = torch.randn_like(theirs)
    wanted = [x, *parameters.values()]
    # With --device interpreter these are the Triton kernels, in float64.
    with kernels.backend("auto"):
        mine, _ = composed(x, parameters, stride, residual)
        gradients = torch.autograd.grad(mine, wanted, grad)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    expected = torch.autograd.grad(theirs, wanted, grad)
    for name, g, e in zip(["x", *parameters], gradients, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-9, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", HALF_AND_SINGLE)
def test_block_of_stages_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    """Errors are means over several blocks: sums that cancel make a single one's a matter of luck."""
    mine, eager = torch.zeros(11), torch.zeros(11)
    for seed in range(6):
        make = of(seed=seed)
        x, parameters = make(3, 8, 9, 9).to(dtype), block_parameters(8, 24, 8, make)
        for name, p in parameters.items():
            # Weights of unit gain in the activations' type; gamma and beta stay float32.
            parameters[name] = (p / p[0].numel() ** 0.5).to(dtype) if name[0] == "w" else p.float()
        exact = with_gradients(by_reference, x.double(), {name: p.double() for name, p in parameters.items()})
        for block, errors in ((composed, mine), (by_reference, eager)):
            got = with_gradients(block, x, parameters)
            errors += torch.tensor([relative_error(g, e) for g, e in zip(got, exact, strict=True)])
    for name, m, e in zip(["out", "x", *parameters], mine / 6, eager / 6, strict=True):
        assert m <= 1.3 * e + FLOOR[dtype], f"{name}: error {m:.1e} against float64, eager {e:.1e}"


def with_gradients(block: Callable[..., Any], x: Tensor, parameters: dict[str, Tensor]) -> list[Tensor]:
    leaves = [v.detach().requires_grad_() for v in (x, *parameters.values())]
    out = block(leaves[0], dict(zip(parameters, leaves[1:], strict=True)), 1, True)
    out = out[0] if isinstance(out, tuple) else out
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).bfloat16().to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def check_compiled(block: str, backend: str, dynamic: bool) -> None:
    c, hidden, out, stride, residual = BLOCKS[block]
    make = of(torch.float32, seed=8)
    parameters = block_parameters(c, hidden, out, make)
    torch._dynamo.reset()
    compiled = torch.compile(composed, fullgraph=True, backend=backend, dynamic=dynamic)
    for n in (2, 3):
        x = make(n, c, 7, 6)
        wanted = [x, *parameters.values()]
        eager, variances = composed(x, parameters, stride, residual)
        graph, compiled_variances = compiled(x, parameters, stride, residual)
        torch.testing.assert_close((graph, compiled_variances), (eager, variances))
        assert graph.stride() == eager.stride()
        grad = torch.randn_like(eager)
        torch.testing.assert_close(
            torch.autograd.grad(graph, wanted, grad), torch.autograd.grad(eager, wanted, grad), rtol=1e-4, atol=1e-4
        )


@every_block
def test_compiled_block_of_stages_equals_eager(block: str) -> None:
    check_compiled(block, "aot_eager", dynamic=False)


@pytest.mark.slow
def test_block_of_stages_compiles_with_symbolic_shapes() -> None:
    check_compiled("stride 2", "aot_eager", dynamic=True)


@pytest.mark.slow
def test_block_of_stages_under_inductor_equals_eager() -> None:
    check_compiled("stride 1, residual", "inductor", dynamic=False)


def stem_and_head(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    y, mean, m2 = staged.stem(x, parameters["ws"], 2)
    scale, shift, _ = staged.bn_finalize(mean, m2, y.numel() / y.shape[1], parameters["g1"], parameters["b1"], 1e-3)
    a = staged.bn_apply(y, scale, shift, None, True)
    y, mean, m2 = staged.expand(a, parameters["wh"])
    scale, shift, _ = staged.bn_finalize(mean, m2, y.numel() / y.shape[1], parameters["g2"], parameters["b2"], 1e-3)
    return staged.bn_relu6_pool(y, scale, shift)


def check_triton(gpu: Gpu, function: Callable[..., Tensor], x: Tensor, parameters: dict[str, Tensor]) -> None:
    """Triton in float32 against plain torch in float64, and that it was Triton that ran."""
    leaves = [v.detach().to(gpu.device).requires_grad_() for v in (x, *parameters.values())]
    exact_leaves = [v.detach().double().requires_grad_() for v in (x, *parameters.values())]
    before = kernels.report()["calls"]
    with kernels.backend("triton"):
        out = function(leaves[0], dict(zip(parameters, leaves[1:], strict=True)))
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4))
        gradients = torch.autograd.grad(out, leaves, grad.to(gpu.device))
    after = kernels.report()["calls"]
    exact = function(exact_leaves[0], dict(zip(parameters, exact_leaves[1:], strict=True)))
    exact_gradients = torch.autograd.grad(exact, exact_leaves, grad.double())
    for name, g, e in zip(["out", "x", *parameters], (out, *gradients), (exact, *exact_gradients), strict=True):
        assert relative_error(g.detach().cpu(), e.detach()) < 1e-5, name
    changed = {call for call, number in after.items() if number != before.get(call)}
    assert changed
    assert all(call.endswith("/triton") for call in changed), changed


@pytest.mark.parametrize("block", ["stride 1, residual", "t=1"])
def test_block_of_stages_through_triton_equals_float64(block: str, gpu: Gpu) -> None:
    c, hidden, out, stride, residual = BLOCKS[block]
    make = of(torch.float32, seed=9)
    x, parameters = make(2, c, 5, 6), block_parameters(c, hidden, out, make)
    check_triton(gpu, lambda x, parameters: composed(x, parameters, stride, residual)[0], x, parameters)


def test_stem_and_head_of_stages_through_triton_equal_float64(gpu: Gpu) -> None:
    make = of(torch.float32, seed=10)
    parameters = {
        "ws": make(8, 3, 3, 3),
        "g1": make(8, around=1),
        "b1": make(8, around=1),
        "wh": make(16, 8, 1, 1),
        "g2": make(16, around=1),
        "b2": make(16, around=1),
    }
    check_triton(gpu, stem_and_head, make(2, 3, 7, 6), parameters)
