"""The int8 network's numbers in the weights file they were made from: calibrated once, then read back.

Beside the float tensors of a `.safetensors` file lie those of `mbv2.quantize.quantize`, as `int8.0.weight`,
`int8.0.outputs` and so on in the order of the convolutions: int8 weights of 1x1 convolutions and of the classifier,
int16 taps of depthwise convolutions, a float32 stem. Metadata tell what network they were made from and what they are,
so that numbers of other weights are noticed. Readers of the float weights pass over them.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mbv2.errors import UserError
from mbv2.model import MobileNetV2
from mbv2.quantize import HIDDEN
from mbv2.weights import INT8_PREFIX, fingerprint, save_weights

_REMEDY = "make it anew with mbv2 export --format int8"


def save(path: str | Path, model: MobileNetV2, meta: dict[str, Any], numbers: Sequence[Tensor]) -> None:
    """Write `model`'s weights with `meta`, and `numbers`, what `mbv2.optimized.int8_numbers` made of it.

    Raises:
        OSError: what the file system says.
    """
    tensors = _named(numbers)
    made = {"network": _network(model), "numbers": fingerprint(tensors)}
    save_weights(path, {**model.state_dict(), **tensors}, {**meta, "int8": made})


def read(path: str | Path, model: MobileNetV2) -> list[Tensor]:
    """The numbers in a file that `save` wrote, as `mbv2.optimized.int8_numbers` returns them.

    Raises:
        UserError: unreadable, without numbers, damaged, or made from another network than `model`.
    """
    from mbv2.optimized import fold

    tensors, made = _stored(Path(path))
    if made.get("network") != _network(model):
        raise UserError(f"{path}: its int8 numbers were made from other weights than these; {_REMEDY}")
    wanted = _named([_shaped(index, tensor) for index, tensor in enumerate(fold(model))])
    _check(path, tensors, wanted)
    if made.get("numbers") != fingerprint(tensors):
        raise UserError(f"{path}: its int8 numbers are not those that were written; {_REMEDY}")
    return [tensors[name].float() for name in wanted]


def has_numbers(path: str | Path) -> bool:
    """Whether `path` is a `.safetensors` file with int8 numbers.

    Raises:
        UserError: it cannot be read.
    """
    path = Path(path)
    return path.suffix == ".safetensors" and path.is_file() and bool(_stored(path, required=False)[0])


def _named(numbers: Sequence[Tensor]) -> dict[str, Tensor]:
    """Weights in the smallest type that holds them, by name."""
    named = {}
    for index, (weight, outputs) in enumerate(zip(numbers[::2], numbers[1::2], strict=True)):
        depthwise = weight.dim() == 4 and weight.shape[1] == 1 and weight.shape[2] == 3
        dtype = torch.float32 if index == 0 else torch.int16 if depthwise else torch.int8
        named[f"{INT8_PREFIX}{index}.weight"] = weight.to(dtype)
        named[f"{INT8_PREFIX}{index}.outputs"] = outputs.float()
    return named


def _shaped(index: int, folded: Tensor) -> Tensor:
    """Zeros of the shape that the numbers made of `folded` have: 4 for each bias."""
    return torch.zeros(folded.shape if index % 2 == 0 else (4, len(folded)))


def _network(model: MobileNetV2) -> str:
    """What the numbers depend on, all of it: weights, padding and epsilon."""
    state = {key: value for key, value in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    return f"{fingerprint(state)} {model.padding} {model.bn_eps!r}"


def _stored(path: Path, required: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(INT8_PREFIX)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
            meta = json.loads((file.metadata() or {}).get("mbv2", "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable .safetensors file ({error})") from error
    made = meta.get("int8") if isinstance(meta, dict) else None
    if not tensors and required:
        raise UserError(f"{path}: has no int8 numbers; {_REMEDY}, or measure ranges on pictures")
    return tensors, made if isinstance(made, dict) else {}


def _check(path: str | Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    if tensors.keys() != wanted.keys():
        odd = sorted(tensors.keys() ^ wanted.keys())
        raise UserError(f"{path}: {odd[0]} is {'missing' if odd[0] in wanted else 'unknown'}; {_REMEDY}")
    for name, like in wanted.items():
        value = tensors[name]
        if value.shape != like.shape or value.dtype != like.dtype:
            raise UserError(
                f"{path}: {name} is {value.dtype} {list(value.shape)}, this network's is {like.dtype} "
                f"{list(like.shape)}; {_REMEDY}"
            )
        if not value.isfinite().all() or (value.dtype == torch.int16 and (value < -HIDDEN).any()):
            raise UserError(f"{path}: {name} has values that the kernels do not hold; {_REMEDY}")
