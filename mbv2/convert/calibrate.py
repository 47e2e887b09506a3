"""BatchNorm statistics for networks whose format has folded them away, measured on pictures."""

from typing import Any

import torch
from torch import Tensor

from mbv2 import distributed
from mbv2.data.recipe import Recipe, eval_options
from mbv2.errors import UserError
from mbv2.model import MobileNetV2
from mbv2.progress import Progress

_PICTURES = 512


@torch.no_grad()
def calibrate(model: MobileNetV2, meta: dict[str, Any], folder: str) -> str:
    """Give every BatchNorm of `model` the mean and variance its input has on pictures; evaluation stays as it was.

    A folded stage is y = conv(x) + b. Afterwards gamma is the deviation of conv(x) and beta b plus its mean, so that
    running statistics undo what gamma and beta do, and a step of training starts from what evaluation computes.

    Args:
        model: with BatchNorms that do nothing (gamma 1, mean 0, variance 1 - eps), in evaluation mode or not.
        meta: resolution, mean, std and squeeze.
        folder: pictures; the first 512 are used.

    Raises:
        UserError: no pictures there.
    """
    from mbv2.data import make_loader
    from mbv2.data.sources import Source
    from mbv2.infer import find_pictures

    found = find_pictures(folder)
    step = max(1, len(found.samples) // _PICTURES)
    source = Source(found.samples[::step][:_PICTURES], found.class_names)
    recipe = Recipe(
        meta["resolution"], tuple(meta["mean"]), tuple(meta["std"]), **eval_options(meta, meta["resolution"])
    )
    world = distributed.init("CPU", run_distribute=False)
    loader = make_loader("torch", source, recipe, False, 32, world, workers=0, on_corrupt="skip")
    model.eval()
    norms = [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    sums = [torch.zeros(3, norm.num_features, dtype=torch.float64) for norm in norms]

    def watch(index: int) -> Any:
        def add(module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            y = inputs[0].double()
            sums[index] += torch.stack(
                (y.new_ones(y.shape[1]) * (y.numel() / y.shape[1]), y.sum((0, 2, 3)), y.square().sum((0, 2, 3)))
            )

        return add

    hooks = [norm.register_forward_pre_hook(watch(index)) for index, norm in enumerate(norms)]
    try:
        with Progress(len(source.samples), "calibrate") as progress:
            for images, _, _ in loader:
                _run_modules(model, images)
                progress.advance(len(images))
    finally:
        loader.close()
        for hook in hooks:
            hook.remove()
    if not sums[0][0].any():
        raise UserError(f"--calibrate {folder}: none of the pictures can be decoded")
    for norm, (count, total, squares) in zip(norms, sums, strict=True):
        mean = total / count
        var = (squares / count - mean.square()).clamp_min(1e-6)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.add_(mean.float())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
    return f"BatchNorm statistics measured on {len(source.samples)} pictures"


def _run_modules(model: MobileNetV2, x: Tensor) -> None:
    """The features module by module, so that hooks fire; our operators read the modules instead of calling them."""
    if model.turns_picture:
        x = x.flip(2, 3)

    def conv(module: torch.nn.Conv2d, x: Tensor) -> Tensor:
        turn = model.turns_picture and module.kernel_size[0] > 1
        weight = module.weight.flip(2, 3) if turn else module.weight
        return torch.nn.functional.conv2d(x, weight, None, module.stride, module.padding, 1, module.groups)

    def run(module: torch.nn.Module, x: Tensor) -> Tensor:
        if isinstance(module, torch.nn.Conv2d):
            return conv(module, x)
        if isinstance(module, torch.nn.Sequential):
            for part in module:
                x = run(part, x)
            return x
        if hasattr(module, "use_res_connect"):
            out = run(module.conv, x)
            return x + out if module.use_res_connect else out
        return module(x)

    run(model.features, x)
