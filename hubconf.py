"""Entry points for `torch.hub`: one per published variant, dots written as underscores.

`torch.hub.load(<folder or repository>, "mobilenet_v2_1_0_224", pretrained=True)`
`torch.hub.load(<folder or repository>, "mobilenet_v2", alpha=0.6, num_classes=10)`
"""

from collections.abc import Callable as _Callable
from typing import Any as _Any

import torch as _torch

from mbv2.model import MobileNetV2 as _MobileNetV2
from mbv2.zoo import create_model as _create_model
from mbv2.zoo import list_models as _list_models

dependencies = ["torch", "torchvision", "safetensors"]


def mobilenet_v2(alpha: float = 1.0, **options: _Any) -> _torch.nn.Module:
    """MobileNetV2 of any width with fresh weights; options as for `mbv2.model.MobileNetV2`."""
    return _MobileNetV2(width_mult=alpha, **options)


def _entry_point(name: str) -> _Callable[..., _torch.nn.Module]:
    def build(pretrained: _Any = False, **options: _Any) -> _torch.nn.Module:
        return _create_model(name, pretrained=pretrained, **options)

    build.__name__ = name.replace(".", "_")
    build.__doc__ = f"`mbv2.create_model({name!r}, pretrained, ...)`: pretrained is False, True or a path."
    return build


# torch.hub lists the callables of this module; a name with dots could not be one.
globals().update({name.replace(".", "_"): _entry_point(name) for name in _list_models()})
