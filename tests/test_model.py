"""The network against torchvision's: names, shapes, outputs, gradients, running statistics."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import mbv2
from mbv2 import weights
from mbv2.model import MobileNetV2, as_channels_last, make_divisible


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
                tensor.add_(0.1 * noise)
    return model


def pair(width: float, dtype: torch.dtype = torch.float64) -> tuple[MobileNetV2, nn.Module]:
    ours = scrambled(MobileNetV2(num_classes=7, width_mult=width, dropout=0.0).to(dtype))
    theirs = torchvision.models.mobilenet_v2(num_classes=7, width_mult=width, dropout=0.0).to(dtype)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.0, 1.3, 1.4])
def test_state_dict_loads_strictly_both_ways(width: float) -> None:
    ours, theirs = MobileNetV2(width_mult=width), torchvision.models.mobilenet_v2(width_mult=width)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize(("width", "size"), [(0.35, 96), (1.0, 65), (1.4, 33)])
def test_eval_output_equals_torchvision(width: float, size: int) -> None:
    ours, theirs = pair(width)
    x = torch.randn(2, 3, size, size, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)


def test_training_step_equals_torchvision() -> None:
    ours, theirs = pair(0.35)
    x = torch.randn(4, 3, 64, 48, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 6])
    for model in (ours, theirs):
        nn.functional.cross_entropy(model.train()(x), target).backward()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-7, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-9, atol=1e-9)


def test_weight_gradients_have_their_parameters_strides_in_channels_last() -> None:
    model = as_channels_last(MobileNetV2(width_mult=0.35, num_classes=5))
    x = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    model(x).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.stride() == parameter.stride(), name


def test_blocks_keep_channels_last() -> None:
    model = MobileNetV2(width_mult=0.35).eval()
    y = model.features(torch.randn(2, 3, 64, 64))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_frozen_batchnorm_uses_and_keeps_running_statistics() -> None:
    ours, theirs = pair(0.35)
    for model in (ours, theirs):
        model.train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_cumulative_momentum_and_untracked_statistics_follow_torch() -> None:
    ours, theirs = pair(0.35)
    for model in (ours, theirs):
        for index, module in enumerate(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
            if index % 2:
                module.momentum = None
    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    for model in (ours, theirs):
        model.train()
        model(x)
        model(x * 2)
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-9, atol=1e-9)


def test_one_value_per_channel_cannot_be_trained_on() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        MobileNetV2(width_mult=0.35).train()(torch.randn(1, 3, 32, 32))


def test_last_extra_class_stays_out_of_real_logits() -> None:
    model = MobileNetV2(num_classes=1001, width_mult=0.35)
    logits = torch.randn(2, 1001)
    assert model.num_real_classes == 1000
    assert torch.equal(model.real_logits(logits), logits[:, :1000])
    assert torch.equal(model.targets(torch.tensor([283])), torch.tensor([283]))


def test_background_class_shifts_targets_and_stays_out_of_real_logits() -> None:
    model = MobileNetV2(num_classes=1001, width_mult=0.35, class_offset=1)
    logits = torch.randn(2, 1001)
    assert torch.equal(model.real_logits(logits), logits[:, 1:])
    assert torch.equal(model.targets(torch.tensor([283])), torch.tensor([284]))


@pytest.mark.parametrize("bad", [{"num_classes": 0}, {"width_mult": -1.0}, {"class_offset": 2}])
def test_impossible_networks_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match="no such MobileNetV2"):
        MobileNetV2(**bad)


@given(st.floats(0.1, 2000))
def test_make_divisible_is_near_and_divisible(value: float) -> None:
    rounded = make_divisible(value)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * value
    assert rounded >= 8


@settings(max_examples=8, deadline=None)
@given(st.integers(17, 70), st.integers(17, 70), st.sampled_from([0.35, 0.6]))
def test_any_picture_size_equals_torchvision(height: int, width: int, alpha: float) -> None:
    ours, theirs = pair(alpha)
    x = torch.randn(1, 3, height, width, dtype=torch.float64)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_compiles_as_one_graph() -> None:
    model = MobileNetV2(width_mult=0.35).eval()
    x = torch.randn(2, 3, 32, 32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-4, atol=1e-4)


@contextmanager
def memory_full_of_nan() -> Iterator[None]:
    """Whatever is allocated and not written holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def not_written(model: nn.Module) -> list[str]:
    state = model.state_dict()
    return [name for name, value in state.items() if not torch.isfinite(value).all() or value.abs().max() > 1e6]


def test_a_network_leaves_nothing_unwritten_and_one_for_weights_leaves_what_they_fill() -> None:
    with memory_full_of_nan():
        assert not_written(MobileNetV2(7, 0.35)) == []
        bare = not_written(MobileNetV2(7, 0.35, initialise=False))
    assert "features.0.0.weight" in bare
    assert {"classifier.1.weight", "classifier.1.bias"} <= set(bare)
    assert all(name.endswith(".weight") or name == "classifier.1.bias" for name in bare)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("classes", [1000, 7])
def test_loading_weights_leaves_nothing_unwritten(tmp_path: Path, suffix: str, classes: int) -> None:
    trained = scrambled(MobileNetV2(width_mult=0.35))
    path = tmp_path / f"trained{suffix}"
    if suffix == ".pth":
        torch.save(trained.state_dict(), path)
    else:
        weights.save_weights(path, trained.state_dict(), {})
    with memory_full_of_nan():
        made = [mbv2.create_model("mobilenet_v2_0.35_96", pretrained=path, num_classes=classes)]
        made.append(weights.model_from_weights(path)[0])
    for model in made:
        assert not_written(model) == []
        for name, value in trained.features.state_dict().items():
            assert torch.equal(model.features.state_dict()[name], value), name


def test_weights_of_another_type_are_converted(tmp_path: Path) -> None:
    trained = MobileNetV2(5, 0.35)
    torch.save(trained.bfloat16().state_dict(), tmp_path / "half.pth")
    model = weights.model_from_weights(tmp_path / "half.pth")[0]
    torch.testing.assert_close(model.state_dict(), trained.float().state_dict(), rtol=0, atol=0)


def test_fresh_weights_are_distributed_as_torchvision_s() -> None:
    torch.manual_seed(0)
    ours, theirs = MobileNetV2(), torchvision.models.mobilenet_v2()
    for (name, a), (_, b) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        if a.numel() < 2 or not a.is_floating_point():
            assert torch.equal(a, b), name
            continue
        spread = 5 * float(b.std()) / a.numel() ** 0.5
        assert abs(float(a.mean() - b.mean())) <= 2 * spread, name
        assert abs(float(a.std() - b.std())) <= 2 * spread, name
    assert {type(module) for module in ours.modules()} >= {nn.Conv2d, nn.Linear}


@pytest.mark.parametrize("call", ["model.eval()(x)", "model(x).sum().backward()"])
def test_a_first_call_does_not_import_the_compiler(call: str) -> None:
    text = f"""
import sys, torch, mbv2
model, x = mbv2.MobileNetV2(7, 0.35), torch.randn(2, 3, 32, 32)
{call}
raise SystemExit("torch._dynamo" in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", text], check=True)
