import torch
from torch import nn

from mbv2.train.ema import Ema


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))


def test_the_average_is_the_recurrence():
    model = net()
    ema = Ema(model, 0.5)
    expected = model[0].weight.detach().clone()
    for number in range(20):
        with torch.no_grad():
            model[0].weight.add_(1.0)
        ema.update(model)
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(ema.model[0].weight, expected)


def test_batch_norm_statistics_are_averaged_and_counters_copied():
    model = net()
    ema = Ema(model, 0.0)
    model(torch.randn(8, 2))
    ema.update(model)
    torch.testing.assert_close(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].num_batches_tracked == 1


def test_the_network_itself_is_untouched():
    model = net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ema = Ema(model, 0.9)
    ema.update(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_saved_and_loaded_it_goes_on_the_same():
    model = net()
    whole, first = Ema(model, 0.9), Ema(model, 0.9)
    second = Ema(net(), 0.9)
    for number in range(6):
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        whole.update(model)
        if number < 3:
            first.update(model)
        if number == 2:
            second.load({key: value.clone() for key, value in first.state_dict().items()}, first.updates)
        if number >= 3:
            second.update(model)
    assert all(torch.equal(value, second.state_dict()[key]) for key, value in whole.state_dict().items())
