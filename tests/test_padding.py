"""TensorFlow's SAME padding: the model against explicit F.pad in plain torch, forward, backward and folded."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mbv2
from mbv2 import kernels, weights
from mbv2.data.recipe import Recipe
from mbv2.data.torch_loader import eval_picture
from mbv2.errors import UserError
from mbv2.kernels import cpu_network
from mbv2.kernels.dispatch import available
from mbv2.model import MobileNetV2


def scrambled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(5)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
            if name.endswith("running_var"):
                tensor.copy_(noise.abs() + 0.5)
            else:
                tensor.copy_(1 + 0.2 * noise if tensor.dim() == 1 else tensor + 0.1 * noise)
    return model


def same_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """TensorFlow's rule: total padding max((ceil(n / s) - 1) * s + k - n, 0), the smaller half before."""
    pads: list[int] = []
    for size in (x.shape[3], x.shape[2]):
        k, s = conv.kernel_size[0], conv.stride[0]
        total = max((-(-size // s) - 1) * s + k - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), conv.weight, None, conv.stride, 0, 1, conv.groups)


def plain(model: MobileNetV2, x: Tensor) -> Tensor:
    """The network module by module, as torchvision runs it, but with SAME padding."""

    def run(module: nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, nn.Conv2d):
            return same_conv(x, module)
        if isinstance(module, nn.Sequential):
            for part in module:
                x = run(part, x)
            return x
        if hasattr(module, "conv"):
            out = run(module.conv, x)
            return x + out if module.use_res_connect else out
        return module(x)

    return model.classifier(run(model.features, x).mean((2, 3)))


@pytest.mark.parametrize("size", [(48, 32), (65, 33), (34, 47)])
def test_eval_equals_explicit_same_padding(size: tuple[int, int]) -> None:
    model = scrambled(MobileNetV2(5, 0.35, padding="same", bn_eps=1e-3)).double().eval()
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(model(x), plain(model, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 48), (65, 34)])
def test_training_step_equals_explicit_same_padding(size: tuple[int, int]) -> None:
    ours = scrambled(MobileNetV2(5, 0.35, dropout=0.0, padding="same", bn_eps=1e-3)).double()
    theirs = copy.deepcopy(ours)
    x = torch.randn(4, 3, *size, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 4])
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    F.cross_entropy(ours.train()(a), target).backward()
    F.cross_entropy(plain(theirs.train(), b), target).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    for (name, p), (_, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-6, atol=1e-9, msg=lambda m, name=name: f"{name}: {m}")
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()), rtol=1e-9, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([1, 2]))
def test_one_depthwise_convolution_at_every_size_and_stride(height: int, width: int, stride: int) -> None:
    conv = nn.Conv2d(2, 2, 3, stride, groups=2, bias=False).double()
    x = torch.randn(1, 2, height, width, dtype=torch.float64)
    turned = F.conv2d(x.flip(2, 3), conv.weight.flip(2, 3), None, stride, 1, 1, 2).flip(2, 3)
    torch.testing.assert_close(turned, same_conv(x, conv))


@pytest.mark.parametrize("name", [name for name in available() if name not in ("cuda", "triton")])
@pytest.mark.parametrize("training", [False, True])
def test_every_backend_of_this_machine(name: str, training: bool) -> None:
    model = scrambled(MobileNetV2(5, 0.35, dropout=0.0, padding="same", bn_eps=1e-3)).train(training)
    twin = copy.deepcopy(model).double()
    x = torch.randn(4, 3, 48, 65)
    with kernels.backend(name):
        out = model(x)
        out.square().mean().backward()
    expected = plain(twin, x.double())
    expected.square().mean().backward()
    torch.testing.assert_close(out.double(), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    for (key, p), (_, q) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        error = (p.grad.double() - q.grad).norm() / q.grad.norm().clamp_min(1e-12)
        assert error < 2e-2 or q.grad.norm() < 1e-6, (key, error)


@pytest.mark.skipif(cpu_network.refusal() is not None, reason="no compiled kernels in this build")
@pytest.mark.parametrize("size", [(64, 64), (65, 33)])
def test_the_packed_cpu_network(size: tuple[int, int]) -> None:
    model = scrambled(MobileNetV2(5, 0.35, padding="same", bn_eps=1e-3)).eval()
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        fast = mbv2.optimize_for_inference(model)(x)
        expected = plain(model.double(), x.double())
    torch.testing.assert_close(fast.double(), expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_same_differs_from_symmetric_on_even_sizes() -> None:
    one, two = MobileNetV2(5, 0.35).eval(), MobileNetV2(5, 0.35, padding="same").eval()
    two.load_state_dict(scrambled(one).state_dict())
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert not torch.allclose(one(x), two(x), rtol=1e-2)


@pytest.mark.parametrize("options", [{"padding": "valid"}, {"bn_eps": 0.0}, {"bn_eps": 2.0}])
def test_there_are_two_paddings_and_positive_epsilons(options: dict) -> None:
    with pytest.raises(ValueError, match="no such MobileNetV2"):
        MobileNetV2(**options)


def test_padding_and_epsilon_travel_with_the_weights(tmp_path: Path) -> None:
    model = scrambled(MobileNetV2(1000, 0.35, padding="same", bn_eps=1e-3)).eval()
    path = tmp_path / "w.safetensors"
    weights.save_weights(path, model.state_dict(), {"alpha": 0.35, "padding": "same", "bn_eps": 1e-3})
    loaded, meta = weights.model_from_weights(path)
    created = mbv2.create_model("mobilenet_v2_0.35_96", pretrained=path)
    assert (meta["padding"], meta["bn_eps"]) == ("same", 1e-3)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = plain(model, x)
        for other in (loaded.eval(), created.eval()):
            torch.testing.assert_close(other(x), expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_weights_of_another_padding_are_not_loaded_silently() -> None:
    given = weights.Weights(MobileNetV2(5, 0.35).state_dict(), {"padding": "same"}, "w.safetensors")
    with pytest.raises(UserError, match=r"w\.safetensors: trained with padding same"):
        weights.load_into(MobileNetV2(5, 0.35), given)
    with pytest.raises(UserError, match="'reflect'"):
        weights.model_from_weights(weights.Weights(given.state_dict, {"padding": "reflect"}, "w.safetensors"))


def test_a_squeezed_picture_is_resized_whole() -> None:
    image = torch.randint(0, 256, (3, 40, 90), dtype=torch.uint8)
    image[:, :, :8] = 255
    squeezed = eval_picture(image, Recipe(resolution=32, squeeze=True))
    assert squeezed.shape == (3, 32, 32)
    assert (squeezed[:, :, :2] == 255).all()
    cropped = eval_picture(image, Recipe(resolution=32))
    assert not (cropped[:, :, :2] == 255).all()
