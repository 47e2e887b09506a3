"""The whole-stage operators of torch.library and the public functions around them, on plain-torch stages."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kernels import free_port
from torch import Tensor, nn

from mbv2 import kernels
from mbv2.kernels import fused, library, library_folded, reference
from mbv2.model import InvertedResidual, MobileNetV2, Stem, share_batch_statistics

# opcheck itself reads .grad of tensors that are not leaves.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")

BLOCKS = [(4, 4, 1, 6), (4, 6, 2, 6), (4, 6, 1, 1)]  # inputs, outputs, stride, expansion


def block_of(sizes: tuple[int, int, int, int], dtype: torch.dtype = torch.float64) -> InvertedResidual:
    torch.manual_seed(0)
    block = InvertedResidual(*sizes)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 1.0, 0.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return block.to(dtype)


def arguments(block: InvertedResidual) -> tuple[Any, ...]:
    return *block.stages(), block.stride, block.use_res_connect


def gradients_of(function: Any, block: InvertedResidual, x: Tensor) -> tuple[Tensor, list[Tensor], dict[str, Tensor]]:
    block, x = copy.deepcopy(block), x.clone().requires_grad_()
    out = function(x, *arguments(block))
    torch.manual_seed(1)
    out.backward(torch.randn_like(out))
    return out.detach(), [x.grad, *(p.grad for p in block.parameters())], dict(block.named_buffers())


def assert_same(block: InvertedResidual, x: Tensor) -> None:
    mine, theirs = gradients_of(fused.inverted_residual, block, x), gradients_of(reference.inverted_residual, block, x)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("sizes", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_fused_block_equals_autograd_through_the_reference(sizes: Any, training: bool) -> None:
    x = torch.randn(3, sizes[0], 7, 6, dtype=torch.float64)
    assert_same(block_of(sizes).train(training), x)


@pytest.mark.parametrize("which", range(3))
def test_one_batch_norm_in_eval_mode_gives_the_reference_gradients(which: int) -> None:
    block = block_of(BLOCKS[0]).train()
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    norms[which].eval()
    assert_same(block, torch.randn(3, 4, 5, 6, dtype=torch.float64))


@pytest.mark.parametrize("change", ["momentum=None", "no running statistics", "no affine"])
def test_batch_norm_options_act_as_in_torch(change: str) -> None:
    block = block_of(BLOCKS[0]).train()
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            if change == "momentum=None":
                module.momentum = None
            else:
                kind = {"track_running_stats": False} if change == "no running statistics" else {"affine": False}
                owner = block.get_submodule(name.rpartition(".")[0])
                owner.add_module(name.rpartition(".")[2], nn.BatchNorm2d(module.num_features, **kind).double())
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    assert_same(block, x)
    assert_same(block.eval(), x)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 3),
    h=st.integers(1, 6),
    w=st.integers(1, 6),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    stride=st.sampled_from([1, 2]),
    ratio=st.sampled_from([1, 2, 6]),
    layout=st.sampled_from(["contiguous", "channels_last", "sliced", "expanded", "flipped"]),
)
def test_any_shape_and_strides_give_the_reference_results(
    n: int, h: int, w: int, inputs: int, outputs: int, stride: int, ratio: int, layout: str
) -> None:
    block = block_of((inputs, outputs, stride, ratio)).train()
    if n * ((h - 1) // stride + 1) * ((w - 1) // stride + 1) < 2:
        n += 1
    torch.manual_seed(2)
    x = torch.randn(n, inputs, h, w, dtype=torch.float64)
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = torch.randn(n, 2 * inputs, h, 2 * w, dtype=torch.float64)[:, ::2, :, ::2]
    elif layout == "expanded":
        x = torch.randn(1, inputs, h, w, dtype=torch.float64).expand(n, -1, -1, -1)
    elif layout == "flipped":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    out = fused.inverted_residual(x, *arguments(copy.deepcopy(block)))
    torch.testing.assert_close(out, reference.inverted_residual(x, *arguments(block)), rtol=1e-7, atol=1e-7)
    shape = out.shape
    assert out.stride() == (shape[1] * shape[2] * shape[3], 1, shape[3] * shape[1], shape[1])


@pytest.mark.parametrize("training", [True, False])
def test_the_output_of_a_picture_of_one_pixel_has_exact_strides(training: bool) -> None:
    block = block_of((2, 2, 1, 6)).train(training)
    out = fused.inverted_residual(torch.randn(2, 2, 1, 1, dtype=torch.float64), *arguments(block))
    assert out.stride() == (2, 1, 2, 2)


@pytest.mark.parametrize("name", ["aten", "cpu"])
def test_what_a_block_returns_allows_operations_in_place(name: str) -> None:
    """As torchvision's ReLU6(inplace=True) after one."""
    if name not in kernels.report()["available"]:
        pytest.skip(f"no backend {name} here")
    block = block_of(BLOCKS[0], torch.float32).train()
    x = torch.randn(2, 4, 1, 1)
    with kernels.backend(name):
        out = fused.inverted_residual(x, *arguments(block))
        nn.functional.relu6(out, inplace=True).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_as_accurate_as_eager(dtype: torch.dtype) -> None:
    block = block_of((8, 8, 1, 6)).train()
    x = torch.randn(4, 8, 15, 15, dtype=torch.float64).to(dtype)
    for parameter in block.parameters():
        parameter.data = parameter.data.to(dtype).double()
    exact = gradients_of(reference.inverted_residual, block, x.double())
    low = copy.deepcopy(block).to(dtype)
    mine, eager = gradients_of(fused.inverted_residual, low, x), gradients_of(reference.inverted_residual, low, x)
    # Single elements flip at ReLU6's corners in either; taken together the gradients tell.
    errors, allowed = 0.0, 0.0
    for got, theirs, truth in zip(mine[1], eager[1], exact[1], strict=True):
        assert got.dtype == dtype
        errors += float((got - truth).norm() / truth.norm()) ** 2
        allowed += float((theirs - truth).norm() / truth.norm()) ** 2
    assert errors**0.5 <= 1.3 * allowed**0.5 + 1e-6


def test_frozen_parameters_get_no_gradient_and_skip_their_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for stage in ("bn_sums", "project_backward", "depthwise_backward", "expand_backward"):
        plain = getattr(kernels.aten, stage)
        monkeypatch.setattr(kernels.aten, stage, lambda *a, s=stage, p=plain: called.append((s, a[-2:])) or p(*a))
    block = block_of(BLOCKS[0]).train().requires_grad_(False)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    block.conv[2].weight.requires_grad_()
    fused.inverted_residual(x, *arguments(block)).sum().backward()
    assert [name for name, _ in called] == ["bn_sums", "project_backward"]
    assert called[1][1] == (False, True)
    assert block.conv[2].weight.grad is not None
    called.clear()
    block.conv[3].eval()
    block.conv[1][1].bias.requires_grad_()
    fused.inverted_residual(x, *arguments(block)).sum().backward()
    assert [name for name, _ in called] == ["project_backward"]
    assert all(p.grad is None for p in block.conv[0].parameters())


def test_weight_gradients_have_their_parameters_strides() -> None:
    block = block_of((4, 6, 2, 6), torch.float32).train().to(memory_format=torch.channels_last)
    fused.inverted_residual(torch.randn(2, 4, 6, 6), *arguments(block)).sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def tensors(sizes: Any, training: bool = True) -> tuple[Any, ...]:
    block = block_of(sizes).train(training)
    *expand, depthwise, project, bn = block.conv
    first: tuple[Any, ...] = (None, None, None, None, None, 1e-5)
    if expand:
        first = (expand[0][0].weight, *norm_of(expand[0][1], training))
    return (*first, depthwise[0].weight, *norm_of(depthwise[1], training), project.weight, *norm_of(bn, training))


def norm_of(bn: nn.BatchNorm2d, training: bool) -> tuple[Any, ...]:
    mean, var = (None, None) if training else (bn.running_mean, bn.running_var)
    return bn.weight, bn.bias, mean, var, bn.eps


@pytest.mark.parametrize("sizes", BLOCKS)
@pytest.mark.parametrize("training", [True, False])
def test_the_training_block_passes_opcheck(sizes: Any, training: bool) -> None:
    x = torch.randn(2, sizes[0], 5, 4, dtype=torch.float64, requires_grad=True)
    residual = sizes[2] == 1 and sizes[0] == sizes[1]
    torch.library.opcheck(
        library.inverted_residual_train.overload,
        (x, *tensors(sizes, training), sizes[2], residual, ""),
        rtol=1e-7,
        atol=1e-7,
    )


@pytest.mark.parametrize("shape", [(1, 4, 3, 3), (2, 4, 1, 1), (2, 1, 3, 1)])
def test_ambiguous_layouts_pass_opcheck(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(
        library.inverted_residual_train.overload, (x, *tensors((shape[1], 1, 2, 6)), 1, False, ""), rtol=1e-7, atol=1e-7
    )


def test_stem_and_head_pass_opcheck() -> None:
    w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((8, 3, 3, 3), (8,)))
    x = torch.randn(2, 3, 7, 6, dtype=torch.float64, requires_grad=True)
    p, z = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((8, 4, 1, 1), (2, 4, 3, 3)))
    torch.library.opcheck(library.stem_train.overload, (x, w, b, b, None, None, 1e-5, 2, ""), rtol=1e-7, atol=1e-7)
    torch.library.opcheck(library.head_train.overload, (z, p, b, b, None, None, 1e-5, ""), rtol=1e-7, atol=1e-7)
    torch.library.opcheck(library_folded.stem_folded.overload, (x, w, b, 2), rtol=1e-7, atol=1e-7)
    torch.library.opcheck(library_folded.head_folded.overload, (z, p, b), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sizes", BLOCKS)
def test_the_folded_block_passes_opcheck_and_gradcheck(sizes: Any) -> None:
    block = block_of(sizes).eval()
    *expand, depthwise, project, bn = block.conv
    x = torch.randn(2, sizes[0], 5, 4, dtype=torch.float64, requires_grad=True)
    first = (expand[0][0].weight, expand[0][1].bias) if expand else (None, None)
    call = (x, *first, depthwise[0].weight, depthwise[1].bias, project.weight, bn.bias, sizes[2], False)
    torch.library.opcheck(library_folded.inverted_residual.overload, call, rtol=1e-7, atol=1e-7)
    assert torch.autograd.gradcheck(library_folded.inverted_residual, call, eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("sizes", BLOCKS)
def test_the_training_block_passes_gradcheck_in_every_parameter(sizes: Any) -> None:
    x = torch.randn(2, sizes[0], 4, 3, dtype=torch.float64, requires_grad=True)
    parameters = tensors(sizes)

    def out_of(v: Tensor, *rest: Any) -> Tensor:
        return library.inverted_residual_train(v, *rest, sizes[2], False, "")[0]

    assert torch.autograd.gradcheck(out_of, (x, *parameters), eps=1e-6, atol=1e-5, fast_mode=True)


def test_stem_and_head_pass_gradcheck() -> None:
    torch.manual_seed(3)
    w, b = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 3, 3), (4,)))
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    p, z = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((4, 3, 1, 1), (2, 3, 3, 2)))
    for stride in (1, 2):
        stem = lambda v, q, g, s=stride: library.stem_train(v, q, g, g, None, None, 1e-5, s, "")[0]  # noqa: E731
        assert torch.autograd.gradcheck(stem, (x, w, b), eps=1e-6, atol=1e-5, fast_mode=True)
    head = lambda v, q, g: library.head_train(v, q, g, g, None, None, 1e-5, "")[0]  # noqa: E731
    assert torch.autograd.gradcheck(head, (z, p, b), eps=1e-6, atol=1e-5, fast_mode=True)


def test_double_backward_is_a_clear_error() -> None:
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    out = fused.inverted_residual(x, *arguments(block_of(BLOCKS[0]).train()))
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no double backward.*aten"):
        gradient.sum().backward()


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        fused.inverted_residual(torch.randn(1, 4, 2, 2).double(), *arguments(block_of((4, 6, 2, 6)).train()))


def test_a_weight_of_another_type_is_a_clear_error() -> None:
    with pytest.raises(ValueError, match=r"input is torch.float32 but a weight is torch.float64"):
        fused.inverted_residual(torch.randn(2, 4, 3, 3), *arguments(block_of(BLOCKS[0])))


class Net(nn.Module):
    """Stem, two blocks and head through torch.library, whatever backend would be chosen."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        net = MobileNetV2(num_classes=5, width_mult=0.25)
        self.stem, self.blocks, self.head = net.features[0], net.features[1:3], net.features[-1]
        self.head[0] = nn.Conv2d(self.blocks[1].conv[-2].out_channels, 16, 1, bias=False)
        self.head[1] = nn.BatchNorm2d(16)

    def forward(self, x: Tensor, way: Any = fused) -> Tensor:
        x = way.stem(x, self.stem.stage(), 2)
        for block in self.blocks:
            x = way.inverted_residual(x, *arguments(block))
        return way.head(x, self.head.stage())


@pytest.mark.parametrize("training", [True, False])
def test_a_network_compiles_into_one_graph_with_equal_results(training: bool) -> None:
    net = Net().double().train(training)
    twin = copy.deepcopy(net)
    x = torch.randn(2, 3, 16, 18, dtype=torch.float64)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    out, expected = compiled(x), twin(x, reference)
    torch.testing.assert_close(out, expected, rtol=1e-8, atol=1e-8)
    if training:
        out.square().sum().backward()
        expected.square().sum().backward()
        for (name, mine), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-7, atol=1e-8, msg=name)
        torch.testing.assert_close(dict(net.named_buffers()), dict(twin.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_autocast_gives_the_types_of_eager_and_float32_parameters_gradients(training: bool) -> None:
    net = Net().train(training)
    x = torch.randn(4, 3, 16, 16)
    with torch.autocast("cpu", torch.bfloat16):
        out, expected = net(x), copy.deepcopy(net)(x, reference)
    assert out.dtype == expected.dtype == torch.bfloat16
    assert (out - expected).norm() / expected.norm() < 0.1
    if training:
        out.float().square().sum().backward()
        assert {p.grad.dtype for p in net.parameters()} == {torch.float32}


def test_a_float32_input_with_residual_under_autocast_promotes_as_eager_does() -> None:
    block = block_of((4, 4, 1, 6), torch.float32).train()
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert fused.inverted_residual(x, *arguments(block)).dtype == torch.float32
        assert reference.inverted_residual(x, *arguments(block)).dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
def test_stem_and_head_equal_the_reference(training: bool) -> None:
    stem = Stem(3, 8, 3, 2).double().train(training)
    twin = copy.deepcopy(stem)
    x = torch.randn(3, 3, 9, 8, dtype=torch.float64, requires_grad=True)
    out, expected = fused.stem(x, stem.stage()), reference.stem(x, twin.stage())
    torch.testing.assert_close(out, expected)
    g = torch.randn_like(out)
    mine = torch.autograd.grad(out, [x, *stem.parameters()], g)
    theirs = torch.autograd.grad(expected, [x, *twin.parameters()], g)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(stem.state_dict(), twin.state_dict())


def test_saved_for_backward_is_at_most_15_megabytes_a_picture_in_16_bit() -> None:
    """The 17 blocks at 1.0_224; torchvision's own blocks keep 36.9 MB (eager, ReLU6 in place)."""
    net = MobileNetV2().bfloat16().train()
    x = torch.randn(2, 32, 112, 112).bfloat16().to(memory_format=torch.channels_last).requires_grad_()
    kept: dict[int, int] = {}
    parameters = {p.data_ptr() for p in net.parameters()}

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in parameters:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for block in net.features[1:-1]:
            x = fused.inverted_residual(x, *arguments(block))
    megabytes = sum(kept.values()) / 2 / 1e6
    assert 13.5 < megabytes <= 15, megabytes


def library_sync_rank(rank: int, world_size: int, port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    saved = torch.load(Path(folder) / "input.pt")
    block = share_batch_statistics(block_of(saved["sizes"])).train()
    x = (saved["x"][:1] if rank == 0 else saved["x"][1:]).clone().requires_grad_()
    out = fused.inverted_residual(x, *arguments(block))
    (out * (saved["g"][:1] if rank == 0 else saved["g"][1:])).sum().backward()
    gradients = {name: p.grad for name, p in block.named_parameters()}
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    buffers = dict(block.named_buffers())
    torch.save({"out": out.detach(), "dx": x.grad, "grads": gradients, "buffers": buffers}, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [BLOCKS[0], BLOCKS[2]])
def test_two_ranks_sharing_statistics_inside_the_operator_equal_one_joint_batch(tmp_path: Path, sizes: Any) -> None:
    x = torch.randn(4, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    block = block_of(sizes).train()
    g = torch.randn(4, sizes[1], 5, 6, dtype=torch.float64)
    torch.save({"sizes": sizes, "x": x.detach(), "g": g}, tmp_path / "input.pt")
    mp.spawn(library_sync_rank, args=(2, free_port(), str(tmp_path)), nprocs=2)
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    out = reference.inverted_residual(x, *arguments(block))
    (out * g).sum().backward()
    torch.testing.assert_close(torch.cat([r["out"] for r in ranks]), out.detach())
    torch.testing.assert_close(torch.cat([r["dx"] for r in ranks]), x.grad)
    for rank in ranks:
        torch.testing.assert_close(rank["grads"], {name: p.grad for name, p in block.named_parameters()})
        torch.testing.assert_close(rank["buffers"], dict(block.named_buffers()))
