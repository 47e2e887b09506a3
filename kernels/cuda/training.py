"""Training's depthwise stages: a call goes to the CUDA C++ or the Triton kernel, whichever the static budget prefers.

`depthwise_choice.json`, written by `python -m bench.gpu_static report`, says for every architecture, stage, size of a
value and stride whether the CUDA C++ kernel is predicted to be faster. An architecture that is not listed takes the
entry of the next older one. What the CUDA C++ kernels refuse is Triton's as well.
"""

import json
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mbv2.kernels.cuda import depthwise as own


@cache
def chosen(capability: tuple[int, int], stage: str, itemsize: int, stride: int) -> bool:
    """Whether the CUDA C++ kernel of `stage` is preferred on GPUs of this compute capability."""
    table = json.loads((Path(__file__).parent / "depthwise_choice.json").read_text())
    number = 10 * capability[0] + capability[1]
    older = [arch for arch in (int(name.removeprefix("sm_")) for name in table) if arch <= number]
    return bool(older) and table[f"sm_{max(older)}"].get(f"{stage} {itemsize} s{stride}", False)


def depthwise(y1: Tensor, bn1: Tensor | None, weight: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """See `mbv2.kernels.aten.depthwise`."""
    if _takes("depthwise", y1, stride):
        return own.depthwise(y1, bn1, weight, stride)
    from mbv2.kernels.cuda.stages import next_best

    return next_best().depthwise(y1, bn1, weight, stride)


def depthwise_backward(
    dz2: Tensor,
    y2: Tensor,
    coef2: Tensor,
    y1: Tensor,
    bn1: Tensor | None,
    weight: Tensor,
    stride: int,
    need_input: bool,
    need_weight: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """See `mbv2.kernels.aten.depthwise_backward`."""
    args = dz2, y2, coef2, y1, bn1, weight, stride, need_input, need_weight
    if _takes("depthwise_backward", y1, stride):
        return own.depthwise_backward(*args)
    from mbv2.kernels.cuda.stages import next_best

    return next_best().depthwise_backward(*args)


def _takes(stage: str, x: Tensor, stride: int) -> bool:
    if own.refusal(x) is not None:
        return False
    return chosen(torch.cuda.get_device_capability(x.device), stage, x.dtype.itemsize, stride)
