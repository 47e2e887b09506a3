import pytest
import torch
from torch import nn

from mbv2.model import MobileNetV2
from mbv2.train.optimizer import make_optimizer, set_lr


def test_batch_norm_and_biases_have_no_weight_decay():
    model = MobileNetV2(5, 0.35)
    optimizer = make_optimizer(model, 0.1, 0.9, 0.01)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert decay[id(module.weight)] == 0.01
        if isinstance(module, nn.BatchNorm2d | nn.Linear):
            assert decay[id(module.bias)] == 0.0
        if isinstance(module, nn.BatchNorm2d):
            assert decay[id(module.weight)] == 0.0
    assert len(decay) == len(list(model.parameters()))


def test_frozen_parameters_are_left_out():
    model = MobileNetV2(5, 0.35)
    model.features.requires_grad_(False)
    optimizer = make_optimizer(model, 0.1, 0.9, 0.01)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in model.classifier.parameters()}


def test_a_step_without_gradient_moves_only_what_decays():
    model = nn.Linear(2, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, 0.5, 0.0, 0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model.weight.detach(), before["weight"] * 0.95)
    assert torch.equal(model.bias.detach(), before["bias"])


def test_the_learning_rate_reaches_every_group():
    optimizer = make_optimizer(nn.Linear(2, 2), 0.5, 0.0, 0.1)
    set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


def test_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="frozen"):
        make_optimizer(nn.Linear(2, 2).requires_grad_(False), 0.1, 0.9, 0.0)
