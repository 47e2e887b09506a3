"""A network made ready for a GPU: folded once, one operator a block, the same logits."""

from typing import Any

import pytest
import torch
from emulated_cuda import emulated, wishing  # noqa: F401
from ptxcpu.nvcc import find_nvcc
from torch import Tensor

from mbv2.folding import folded
from mbv2.kernels import dispatch
from mbv2.kernels.cuda import stages
from mbv2.model import MobileNetV2
from mbv2.optimized_cuda import OptimizedCudaMobileNetV2, check


def trained(width: float, dtype: torch.dtype = torch.float32, padding: str = "symmetric") -> MobileNetV2:
    """A model in evaluation mode whose BatchNorms have statistics worth folding."""
    torch.manual_seed(0)
    model = MobileNetV2(10, width, padding=padding)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 2)
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.normal_(module.bias, 0, 0.2)
    return model.eval().to(dtype)


def pictures(n: int = 2, size: int = 32, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator).to(dtype)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("width", [0.35, 1.4])
def test_logits_are_the_models(width: float, padding: str) -> None:
    model, x = trained(width, padding=padding), pictures()
    fast = OptimizedCudaMobileNetV2(model)
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
    assert not fast(x.requires_grad_()).requires_grad
    assert fast.num_classes == 10 and not list(fast.parameters())


def test_logits_and_labels_of_an_extra_class_are_the_models() -> None:
    model = MobileNetV2(11, 0.35, class_offset=1).eval()
    fast, labels = OptimizedCudaMobileNetV2(model), torch.tensor([0, 3, 9])
    logits = torch.randn(3, 11)
    assert (fast.num_classes, fast.num_real_classes, fast.class_offset) == (11, model.num_real_classes, 1)
    assert torch.equal(fast.real_logits(logits), model.real_logits(logits))
    assert torch.equal(fast.targets(labels), model.targets(labels))


@pytest.mark.parametrize("affine", [True, False])
def test_folding_is_the_convolution_and_its_batch_norm(affine: bool) -> None:
    conv = torch.nn.Conv2d(4, 6, 1, bias=False).double()
    norm = torch.nn.BatchNorm2d(6, eps=1e-3, affine=affine).double().eval()
    for tensor in (norm.running_mean, *norm.parameters()):
        torch.nn.init.normal_(tensor)
    norm.running_var.uniform_(0.5, 2)
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    weight, bias = folded(conv.weight, norm)
    got = torch.nn.functional.conv2d(x, weight, bias.double())
    torch.testing.assert_close(got, norm(conv(x)), rtol=1e-6, atol=1e-6)
    assert weight.dtype == torch.float64 and bias.dtype == torch.float32 and not weight.requires_grad


def test_later_training_of_the_model_does_not_reach_it_and_its_state_can_be_kept() -> None:
    model, x = trained(0.35), pictures()
    fast = OptimizedCudaMobileNetV2(model)
    before = fast(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(fast(x), before)
    again = OptimizedCudaMobileNetV2(trained(0.35).eval())
    again.load_state_dict(fast.state_dict())
    assert torch.equal(again(x), before)


def test_one_graph_of_known_operators() -> None:
    fast, x = OptimizedCudaMobileNetV2(trained(0.35)), pictures()
    program = torch.export.export(fast, (x,))
    # What runs without gradients lies in a graph of its own inside.
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    called = [str(node.target) for graph in graphs for node in graph.nodes if str(node.target).startswith("mbv2.")]
    assert called == ["mbv2.stem_folded.default", *["mbv2.inverted_residual.default"] * 17, "mbv2.head_folded.default"]
    torch.testing.assert_close(program.module()(x), fast(x))


def test_training_and_another_type_are_refused() -> None:
    fast = OptimizedCudaMobileNetV2(trained(0.35))
    with pytest.raises(RuntimeError, match="cannot be trained"):
        fast.train()
    with pytest.raises(RuntimeError, match="keeps its type"):
        fast.half()
    assert fast.eval() is fast and fast.to("cpu") is fast


def test_models_of_mixed_types_or_devices_are_refused() -> None:
    model = trained(0.35)
    check(model)
    model.features[3].to(torch.float16)
    with pytest.raises(ValueError, match=r"torch\.float16, torch\.float32"):
        check(model)
    with pytest.raises(ValueError, match=r"torch\.float64"):
        check(trained(0.35).double())
    model = trained(0.35)
    model.features[3].to("meta")
    with pytest.raises(ValueError, match="spread over cpu, meta"):
        check(model)


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed")
def test_every_block_is_one_fused_launch(
    emulated: list[tuple[Any, Any]],  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("mbv2._C", reason="the planner is not compiled here")
    monkeypatch.setattr(stages, "next_best", lambda: dispatch._backends["aten"].stages())
    monkeypatch.setitem(dispatch._backends, "cuda", dispatch.Backend(lambda device, dtype: None, lambda: stages))
    wishing(monkeypatch, tile=4, splits=1)
    model, x = trained(0.35, torch.float16), pictures(1, 64, torch.float16)
    fast = OptimizedCudaMobileNetV2(model)
    with dispatch.backend("aten"):
        expected = OptimizedCudaMobileNetV2(trained(0.35))(x.float())
    with dispatch.backend("cuda"):
        got = fast(x)
    assert len(emulated) == 17
    assert float((got.float() - expected).norm() / expected.norm()) < 0.02
