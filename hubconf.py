"""Entry points for `torch.hub`: one per published variant, dots written as underscores.

`torch.hub.load(<folder or repository>, "mobilenet_v2_1_0_224", pretrained=True)`
`torch.hub.load(<folder or repository>, "mobilenet_v2", alpha=0.6, num_classes=10)`
"""

import importlib.util as _importing
import sys as _sys
from collections.abc import Callable as _Callable
from pathlib import Path as _Path
from typing import Any as _Any

import torch as _torch

import mbv2 as _mbv2


def _make_kernels_importable() -> None:
    """Find `mbv2.kernels` in a bare clone, which is what torch.hub loads: only installing moves the folder there."""
    if _importing.find_spec("mbv2.kernels") is not None:
        return
    folder = _Path(__file__).resolve().parent / "kernels"
    spec = _importing.spec_from_file_location(
        "mbv2.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = _importing.module_from_spec(spec)
    _sys.modules["mbv2.kernels"] = _mbv2.kernels = module
    spec.loader.exec_module(module)


_make_kernels_importable()

from mbv2.model import MobileNetV2 as _MobileNetV2  # noqa: E402
from mbv2.zoo import create_model as _create_model  # noqa: E402
from mbv2.zoo import list_models as _list_models  # noqa: E402

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
