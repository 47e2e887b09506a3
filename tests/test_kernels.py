"""The operator library: block against plain modules, choice of backend, statistics shared by ranks."""

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torchvision
from torch import nn

from bench.memory import saved_bytes
from mbv2 import kernels
from mbv2.model import InvertedResidual, MobileNetV2, share_batch_statistics


def plain(block: InvertedResidual, x: torch.Tensor) -> torch.Tensor:
    out = block.conv(x)
    return x + out if block.use_res_connect else out


@pytest.mark.parametrize("sizes", [(16, 24, 2, 6), (24, 24, 1, 6), (32, 16, 1, 1)])
def test_block_and_its_gradients_pass_gradcheck(sizes: tuple[int, int, int, int]) -> None:
    inputs, outputs, stride, ratio = (max(1, v // 8) if i < 2 else v for i, v in enumerate(sizes))
    block = InvertedResidual(inputs, outputs, stride, ratio).double().train()
    x = torch.randn(2, inputs, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v: block(v), (x,), eps=1e-6, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_block_equals_its_modules_called_one_by_one(training: bool) -> None:
    block = InvertedResidual(8, 8, 1, 6).double().train(training)
    twin = InvertedResidual(8, 8, 1, 6).double().train(training)
    twin.load_state_dict(block.state_dict())
    x = torch.randn(3, 8, 7, 5, dtype=torch.float64)
    torch.testing.assert_close(block(x), plain(twin, x))
    torch.testing.assert_close(block.state_dict(), twin.state_dict())


def test_stages_whose_channels_do_not_fit_are_refused() -> None:
    a, b = InvertedResidual(8, 8, 1, 6), InvertedResidual(16, 16, 1, 6)
    with pytest.raises(ValueError, match="expand gives 48 channels, depthwise has 96"):
        kernels.inverted_residual(
            torch.randn(2, 8, 4, 4),
            a.conv[0].stage(),
            b.conv[1].stage(),
            kernels.ConvBN(b.conv[2].weight, kernels.BatchNorm.of(b.conv[3])),
            1,
            False,
        )


def test_nan_passes_through_the_block() -> None:
    block = InvertedResidual(8, 8, 1, 6).eval()
    x = torch.randn(1, 8, 4, 4)
    x[0, 0, 1, 1] = float("nan")
    assert block(x)[0, :, 1, 1].isnan().all()


@pytest.mark.parametrize(("expand_ratio", "stride"), [(6, 1), (6, 2), (1, 1)])
def test_plain_torch_keeps_no_more_for_the_backward_pass_than_torchvision(expand_ratio: int, stride: int) -> None:
    ours = InvertedResidual(8, 8, stride, expand_ratio).train()
    theirs = torchvision.models.mobilenetv2.InvertedResidual(8, 8, stride, expand_ratio).train()
    x = torch.randn(2, 8, 12, 12).to(memory_format=torch.channels_last).requires_grad_()
    with kernels.backend("aten"):
        kept = [saved_bytes(block, [*block.parameters(), *block.buffers()], x) for block in (ours, theirs)]
    assert kept[0] == kept[1]


def test_the_plain_network_keeps_no_more_for_the_backward_pass_than_torchvision_s() -> None:
    ours, theirs = MobileNetV2(8, 0.35).train(), torchvision.models.mobilenet_v2(num_classes=8, width_mult=0.35).train()
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    with kernels.backend("aten"):
        kept = [saved_bytes(net, [*net.parameters(), *net.buffers()], x) for net in (ours, theirs)]
    assert kept[0] <= 1.01 * kept[1]


def test_calls_are_counted_by_backend() -> None:
    before = kernels.report()["calls"].get("inverted_residual/aten", 0)
    with kernels.backend("aten"):
        InvertedResidual(8, 8, 1, 6).eval()(torch.randn(1, 8, 4, 4))
    assert kernels.report()["calls"]["inverted_residual/aten"] == before + 1


def test_asking_for_a_backend_that_is_not_there_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(kernels.BackendError, match="no backend 'tpu'"), kernels.backend("tpu"):
        pass
    monkeypatch.setenv("MBV2_BACKEND", "tpu")
    with pytest.raises(kernels.BackendError, match="MBV2_BACKEND: no backend 'tpu'"):
        InvertedResidual(8, 8, 1, 6).eval()(torch.randn(1, 8, 4, 4))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def sync_rank(rank: int, world_size: int, port: int, folder: str, how: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    saved = torch.load(Path(folder) / "input.pt")
    block = InvertedResidual(4, 4, 1, 6).double()
    block.load_state_dict(saved["state"])
    shared = share_batch_statistics(block) if how == "attribute" else nn.SyncBatchNorm.convert_sync_batchnorm(block)
    block = shared.train()
    # Ragged on purpose: rank 0 has one picture, rank 1 the others.
    mine = saved["x"][:1] if rank == 0 else saved["x"][1:]
    x = mine.clone().requires_grad_()
    out = block(x)
    (out * (saved["g"][:1] if rank == 0 else saved["g"][1:])).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    buffers = dict(block.named_buffers())
    torch.save({"out": out.detach(), "dx": x.grad, "grads": gradients, "buffers": buffers}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("how", ["attribute", "SyncBatchNorm"])
def test_shared_statistics_of_two_ranks_equal_one_joint_batch(tmp_path: Path, how: str) -> None:
    block = InvertedResidual(4, 4, 1, 6).double().train()
    x = torch.randn(4, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    g = torch.randn(4, 4, 5, 6, dtype=torch.float64)
    torch.save({"state": block.state_dict(), "x": x.detach(), "g": g}, tmp_path / "input.pt")
    mp.spawn(sync_rank, args=(2, free_port(), str(tmp_path), how), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    out = block(x)
    (out * g).sum().backward()
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), x.grad)
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], {name: p.grad for name, p in block.named_parameters()})
        torch.testing.assert_close(rank["buffers"], dict(block.named_buffers()))
