"""Blocks and the whole network through the Triton backend: training steps against plain torch, inference, fallbacks."""

import copy
from typing import Any

import pytest
import torch
from conftest import Gpu
from stage_check import relative_error, skip_if_wrong_there
from torch import Tensor, nn

from mbv2 import kernels
from mbv2.model import InvertedResidual, MobileNetV2, as_channels_last

SIZES = {"residual": (8, 8, 1, 6), "stride 2": (8, 16, 2, 6), "no expansion": (8, 16, 1, 1)}


def trained_a_little(module: nn.Module) -> nn.Module:
    """Every BatchNorm with gamma, beta and running statistics of its own."""
    torch.manual_seed(0)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.normal_(part.bias, 0.5, 0.5)
            nn.init.normal_(part.running_mean, 0, 0.1)
            nn.init.uniform_(part.running_var, 0.5, 2)
    return module


def steps(module: nn.Module, batches: list[Tensor], rate: float = 0.05) -> dict[str, Tensor]:
    """SGD over the batches; the last output, its gradients, and all parameters and buffers afterwards."""
    optimizer = torch.optim.SGD(module.parameters(), rate)
    result: dict[str, Tensor] = {}
    for x in batches:
        x = x.clone().requires_grad_()
        out = module(x)
        torch.manual_seed(1)
        target = torch.randn(out.shape, dtype=torch.float64).to(out)
        optimizer.zero_grad()
        (out * target).mean().backward()
        result = {"out": out.detach(), "dx": x.grad}
        result |= {f"grad {name}": p.grad.clone() for name, p in module.named_parameters()}
        optimizer.step()
    return {name: value.cpu() for name, value in (result | module.state_dict()).items()}


def assert_trains_as_plain_torch(gpu: Gpu, module: nn.Module, batches: list[Tensor], dtype: torch.dtype) -> None:
    """Errors against float64 of the backend's run and of plain torch's in the same type, taken together."""
    low = copy.deepcopy(module).to(gpu.device, dtype)
    batches = [x.to(dtype) for x in batches]
    exact_module = copy.deepcopy(low).cpu().double()
    with kernels.backend("aten"):
        exact = steps(exact_module, [x.double() for x in batches])
        eager = steps(copy.deepcopy(low), [x.to(gpu.device) for x in batches])
    before = kernels.report()["calls"]
    with kernels.backend("triton"):
        mine = steps(low, [x.to(gpu.device) for x in batches])
    ran = {name for name, count in kernels.report()["calls"].items() if count > before.get(name, 0)}
    assert any(name.endswith("_backward/triton") for name in ran)
    assert not any(name.endswith("/aten") for name in ran)
    worst = []
    for name, truth in exact.items():
        if not truth.is_floating_point():
            assert torch.equal(mine[name], truth), name
            continue
        assert torch.isfinite(mine[name]).all(), name
        worst.append((relative_error(mine[name], truth), relative_error(eager[name], truth), name))
    ours, theirs = (sum(pair[i] ** 2 for pair in worst) ** 0.5 for i in (0, 1))
    floor = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert ours <= 1.3 * theirs + floor, (ours, theirs, sorted(worst, reverse=True)[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SIZES)
def test_a_block_trains_as_plain_torch(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    block = trained_a_little(InvertedResidual(*SIZES[kind])).train()
    batches = [torch.randn(3, 8, 9, 7) for _ in range(2)]
    assert_trains_as_plain_torch(gpu, block, batches, dtype)


@pytest.mark.parametrize("which", [1, 3])
def test_a_block_with_some_batch_norms_in_eval_mode_trains_as_plain_torch(gpu: Gpu, which: int) -> None:
    block = trained_a_little(InvertedResidual(*SIZES["residual"])).train()
    block.conv[which].eval()
    assert_trains_as_plain_torch(gpu, block, [torch.randn(2, 8, 5, 6)], torch.float32)


def test_inputs_in_any_layout_give_the_same_bits(gpu: Gpu) -> None:
    block = InvertedResidual(*SIZES["residual"]).train().to(gpu.device)
    x = torch.randn(2, 16, 5, 12, device=gpu.device)[:, ::2, :, ::2]
    with kernels.backend("triton"):
        assert torch.equal(block(x), block(x.contiguous()))
        assert block(x).is_contiguous(memory_format=torch.channels_last)


def test_training_twice_gives_the_same_bits(gpu: Gpu) -> None:
    block = trained_a_little(InvertedResidual(*SIZES["stride 2"])).train().to(gpu.device)
    batches = [torch.randn(2, 8, 9, 9, device=gpu.device)]
    with kernels.backend("triton"):
        first, second = steps(copy.deepcopy(block), batches), steps(copy.deepcopy(block), batches)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def network(dtype: torch.dtype) -> tuple[MobileNetV2, list[Tensor]]:
    torch.manual_seed(2)
    net = as_channels_last(trained_a_little(MobileNetV2(10, 0.35, dropout=0.0)))
    return net.train(), [torch.randn(4, 3, 96, 96).to(dtype) for _ in range(2)]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_network_0_35_96_trains_two_steps_as_plain_torch(gpu: Gpu) -> None:
    net, batches = network(torch.float32)
    assert_trains_as_plain_torch(gpu, net, batches, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", SIZES)
def test_inference_through_folded_kernels_equals_plain_torch(gpu: Gpu, kind: str, dtype: torch.dtype) -> None:
    skip_if_wrong_there(gpu, dtype)
    block = trained_a_little(InvertedResidual(*SIZES[kind])).eval().to(gpu.device, dtype)
    x = torch.randn(3, 8, 9, 7).to(gpu.device, dtype)
    with torch.no_grad():
        with kernels.backend("aten"):
            eager = block(x).cpu()
            exact = copy.deepcopy(block).cpu().double()(x.cpu().double())
        with kernels.backend("triton"):
            mine = block(x).cpu()
    floor = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert relative_error(mine, exact) <= 1.3 * relative_error(eager, exact) + floor


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inference_of_the_network_0_35_96_equals_plain_torch(gpu: Gpu) -> None:
    net, batches = network(torch.float32)
    net = net.eval().to(gpu.device)
    with torch.no_grad(), kernels.backend("aten"):
        exact = copy.deepcopy(net).cpu().double()(batches[0].double())
    with torch.no_grad(), kernels.backend("triton"):
        mine: Any = net(batches[0].to(gpu.device))
    assert relative_error(mine.cpu(), exact) < 1e-5


def test_the_first_use_check_passes_for_the_kernels_of_a_block(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MBV2_SELF_CHECK", "1")
    block = trained_a_little(InvertedResidual(*SIZES["residual"])).train().to(gpu.device)
    with kernels.backend("triton"):
        block(torch.randn(2, 8, 5, 5, device=gpu.device)).sum().backward()
    assert not kernels.report()["failed_checks"]
