"""What torchvision's and timm's own model tests ask of these architectures, asked of accelerated models.

After torchvision's test/test_models.py (test_classification_model, test_mobilenet_v2_residual_setting,
test_mobilenet_norm_layer) and timm's tests/test_models.py (forward, backward, default configurations, features,
intermediates, torch.fx, TorchScript). Their recorded outputs are replaced by the original model's.
"""

import copy

import pytest
import timm
import torch
import torchvision
from drop_in_check import fused_calls, one_thread, operators, scrambled  # noqa: F401
from torch import Tensor, nn

import mbv2

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")


@pytest.fixture(params=["plain", "operators"], autouse=True)
def way(request: pytest.FixtureRequest):
    with operators(request.param):
        yield request.param


def accelerated(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    original = scrambled(model)
    model = copy.deepcopy(original)
    assert mbv2.accelerate(model).swapped
    return model, original


def test_torchvision_classification_model() -> None:
    model, original = accelerated(torchvision.models.mobilenet_v2(num_classes=50).eval())
    x = torch.rand(1, 3, 96, 96)
    expected = original(x)
    out = model(x)
    assert out.shape == (1, 50)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), expected, rtol=1e-3, atol=1e-3)
    x.requires_grad_()
    model(x)[0].sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None for p in model.parameters())


def test_torchvision_residual_setting_and_norm_layer() -> None:
    options = {"inverted_residual_setting": [[1, 16, 1, 1], [6, 24, 2, 2]]}
    model, _ = accelerated(torchvision.models.mobilenet_v2(**options).eval())
    assert model(torch.rand(1, 3, 64, 64)).shape[-1] == 1000
    grouped = torchvision.models.mobilenet_v2(norm_layer=lambda channels: nn.GroupNorm(1, channels), **options)
    with pytest.warns(UserWarning, match="GroupNorm"):
        mbv2.accelerate(grouped)
    assert grouped.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 1000)


def test_timm_forward_and_backward() -> None:
    model, original = accelerated(timm.create_model("mobilenetv2_035", num_classes=42))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        out = model.eval()(x)
    assert out.shape == (1, 42)
    assert not out.isnan().any()
    torch.testing.assert_close(out, original.eval()(x), rtol=1e-3, atol=1e-3)
    out = model.train()(torch.randn(2, 3, 64, 64))
    out.mean().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []
    assert sum(p.grad.numel() for p in model.parameters()) == sum(p.numel() for p in model.parameters())


def test_timm_default_configuration_and_classifier() -> None:
    model, original = accelerated(timm.create_model("mobilenetv2_050").eval())
    config, state = model.default_cfg, set(model.state_dict())
    size = (2, 3, 64, 64)
    x = torch.randn(size)
    features = model.forward_features(x)
    assert features.shape == (2, model.num_features, 64 // 32, 64 // 32)
    assert model.forward_head(features).shape == (2, 1000)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, model.head_hidden_size)
    for name in (config["classifier"], config["first_conv"]):
        assert f"{name}.weight" in state
    model.reset_classifier(0)
    original.reset_classifier(0)
    assert model(x).shape == (2, model.num_features)
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-3)
    model.reset_classifier(0, "")
    assert model(x).shape == features.shape
    model.reset_classifier(5, "avg")
    assert model(x).shape == (2, 5)


def test_timm_features_and_intermediates() -> None:
    model, original = accelerated(timm.create_model("mobilenetv2_035", features_only=True).eval())
    x = torch.rand(1, 3, 96, 64)
    outputs = model(x)
    for out, channels, reduction in zip(
        outputs, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert out.shape == (1, channels, 96 // reduction, 64 // reduction)
    torch.testing.assert_close(outputs, original(x), rtol=1e-3, atol=1e-3)
    model, original = accelerated(timm.create_model("mobilenetv2_035").eval())
    final, intermediates = model.forward_intermediates(x)
    torch.testing.assert_close(intermediates, original.forward_intermediates(x)[1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(final, model.forward_features(x), rtol=1e-3, atol=1e-3)


def test_timm_features_of_the_expansion_come_from_inside_the_blocks() -> None:
    # timm puts its hooks on the blocks' own convolutions: such blocks stay as they are.
    options = {"features_only": True, "feature_location": "expansion"}
    model, original = accelerated(timm.create_model("mobilenetv2_035", **options).eval())
    x = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(model(x), original(x), rtol=1e-3, atol=1e-3)


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    model(x).mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_timm_fx_and_torchscript() -> None:
    from timm.models._features_fx import GraphExtractNet

    model, original = accelerated(timm.create_model("mobilenetv2_035", num_classes=7).eval())
    x = torch.randn(2, 3, 64, 64)
    expected = original(x)
    extracted = GraphExtractNet(model, ["blocks.2", "global_pool"])
    for a, b in zip(extracted(x), GraphExtractNet(original, ["blocks.2", "global_pool"])(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.jit.script(model)(x), expected, rtol=1e-3, atol=1e-3)


def test_timm_channels_last_and_checkpointed() -> None:
    model, original = accelerated(timm.create_model("mobilenetv2_035", num_classes=7).double().eval())
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    expected = gradients(original, x)
    model.to(memory_format=torch.channels_last).set_grad_checkpointing()
    before = fused_calls()
    mine = gradients(model, x.to(memory_format=torch.channels_last))
    assert fused_calls() - before >= 17
    torch.testing.assert_close(mine, expected, rtol=1e-7, atol=1e-9)
