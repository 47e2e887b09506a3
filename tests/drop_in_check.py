"""Holding an accelerated model against the one it was made from: outputs, gradients, running statistics."""

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mbv2
from mbv2 import kernels
from mbv2.kernels import aten, dispatch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The networks here are so small that threads only wait for each other; import it to have it used."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextlib.contextmanager
def operators(way: str) -> Iterator[None]:
    """Have fused steps run: "plain" in plain torch, "operators" through the operators of torch.library.

    For the latter a backend whose stages are plain torch is put in the CPU backend's place.
    """
    if way == "plain":
        with kernels.backend("aten"):
            yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(dispatch._backends, "cpu", dispatch.Backend(lambda device, dtype: None, lambda: aten))
        with kernels.backend("cpu"):
            yield


def fused_calls() -> int:
    """How many steps ran fused so far, forward."""
    names = ("inverted_residual", "stem", "head", "inverted_residual_train", "stem_train", "head_train")
    folded = ("stem_folded", "head_folded")
    return sum(n for name, n in kernels.report()["calls"].items() if name.partition("/")[0] in (*names, *folded))


def scrambled(model: nn.Module) -> nn.Module:
    """Give every parameter and statistic a value that a mistake would show in."""
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            elif tensor.dim() == 1:
                tensor.copy_(1 + 0.2 * noise)
            else:
                fan_in = tensor[0].numel()
                tensor.copy_(noise / fan_in**0.5)
    return model


def pair(model: nn.Module, train: bool = False, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, nn.Module]:
    """A model and its accelerated copy, scrambled alike."""
    theirs = scrambled(model.to(dtype)).train(train)
    ours = copy.deepcopy(theirs)
    mbv2.accelerate(ours)
    return ours, theirs


def tensors(output: Any) -> list[Tensor]:
    """The tensors of whatever a model returned, in order."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [t for value in values if value is not None for t in tensors(value)]


def step(model: nn.Module, x: Tensor) -> dict[str, Any]:
    """One forward and backward pass: outputs, all gradients, all buffers."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    outputs = tensors(model(x))
    generator = torch.Generator().manual_seed(1)
    torch.autograd.backward(outputs, [torch.randn(o.shape, generator=generator, dtype=o.dtype) for o in outputs])
    return {
        "outputs": [o.detach() for o in outputs],
        "x": x.grad,
        "gradients": {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
        "buffers": dict(model.named_buffers()),
    }


def assert_same_step(ours: nn.Module, theirs: nn.Module, x: Tensor, fused: int) -> None:
    """In float64 both models' passes agree, and `fused` steps of ours ran fused."""
    before = fused_calls()
    mine = step(ours, x)
    assert fused_calls() - before == fused
    torch.testing.assert_close(mine, step(theirs, x), rtol=1e-7, atol=1e-9)
    expected = {name for name, p in theirs.named_parameters() if p.grad is not None}
    assert set(mine["gradients"]) == expected
