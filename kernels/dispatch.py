"""Which backend runs an operator: the best one that supports the call, or the one asked for.

`MBV2_BACKEND=name` or `with backend(name)` asks for one by name, and a call it cannot serve is an error. `auto`
takes the first of `ORDER` that supports the call; `aten` (plain torch) supports everything. On a GPU the fallback
from a faster backend is said once, with its reason. `MBV2_DISABLE_TRITON=1` takes a backend out of the choice;
`MBV2_DISABLE_PROJECT_BACKWARD=1` (any stage's name) has that one stage run in plain torch.
"""

import functools
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mbv2.kernels import aten

ORDER = ("cuda", "triton", "cpu", "aten")


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


@dataclass(frozen=True)
class Backend:
    """One way to run the stages.

    Attributes:
        refusal: takes the activations' device and type; returns why this backend cannot serve them, or None.
        stages: imports and returns the module of stage functions (the contract is `kernels/aten.py`).
    """

    refusal: Callable[[torch.device, torch.dtype], str | None]
    stages: Callable[[], ModuleType]


class Stages:
    """The stage functions for one call: a backend's own, or plain torch where one is disabled or failed its check."""

    def __init__(self, name: str, x: Tensor) -> None:
        self._name = name
        self._x = x
        self._module = _backends[name].stages()
        self._checked = name != "aten" and (bool(_verdicts) or _check_wanted(x))

    def __getattr__(self, stage: str) -> Callable[..., Any]:
        if self._name == "aten" or _disabled(stage):
            return getattr(aten, stage)
        x, function = self._x, getattr(self._module, stage)
        if not x.is_cuda or x.device.index == torch.cuda.current_device():
            return _verified(self._name, stage, function, x) if self._checked else function

        # Kernels are launched on the current GPU, whichever it is; torch's own operators go by their tensors.
        def on_its_gpu(*args: Any) -> Any:
            with torch.cuda.device(x.device):
                run = _verified(self._name, stage, function, x) if self._checked else function
                return run(*args)

        return on_its_gpu


_backends: dict[str, Backend] = {"aten": Backend(lambda device, dtype: None, lambda: aten)}
_calls: Counter[tuple[str, str]] = Counter()
_said: set[str] = set()
_verdicts: dict[tuple[str, str, torch.dtype, torch.device], str | None] = {}
_asked: str | None = None
# Kept up to date by os.environ; private, so nothing rests on it being there.
_set_variables: dict[Any, Any] | None = getattr(os.environ, "_data", None)


def register(name: str, entry: Backend) -> None:
    """Make `entry` the backend called `name`, which is one of `ORDER`."""
    _backends[name] = entry


def available() -> list[str]:
    """The backends of this build, best first."""
    return [name for name in ORDER if name in _backends]


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the operators inside through backend `name` ("auto" to let the library choose).

    Raises:
        BackendError: no such backend in this build.
    """
    global _asked
    _check_name(name, "backend")
    before, _asked = _asked, name
    try:
        yield
    finally:
        _asked = before


def asked() -> str:
    """The backend asked for: by `backend`, else by MBV2_BACKEND, else "auto"."""
    return _asked or _variable("MBV2_BACKEND", "auto")


def choose(operator: str, x: Tensor, dtype: torch.dtype | None = None) -> str:
    """The name of the backend that runs `operator` on input `x`, computing in `dtype` (x's own, if None).

    Raises:
        BackendError: a backend was asked for by name and cannot serve this call.
    """
    return "aten" if x.numel() == 0 else _choose(operator, x.device, dtype or x.dtype)


def _choose(operator: str, device: torch.device, dtype: torch.dtype) -> str:
    name = asked()
    if name != "auto":
        _check_name(name, "MBV2_BACKEND")
        reason = _refusal(name, device, dtype)
        if reason is not None:
            raise BackendError(f"backend {name!r} cannot run {operator}: {reason}; use backend 'auto' or 'aten'")
        return name
    for name in available():
        reason = _refusal(name, device, dtype)
        if reason is None:
            return name
        if device.type == "cuda":
            _say_once(f"mbv2: {operator} does not run through {name!r} ({reason}); a slower backend takes over")
    raise AssertionError("the aten backend refuses nothing")


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes seconds.
asked._dynamo_marked_constant = True
_choose._dynamo_marked_constant = True


def stages_for(operator: str, x: Tensor) -> Stages:
    """The stage functions that run `operator` on input `x`, and a mark in the counters.

    Raises:
        BackendError: as `choose`.
    """
    name = choose(operator, x)
    count(operator, name)
    return Stages(name, x)


def count(operator: str, name: str) -> None:
    """Note one call of `operator` through backend `name`."""
    # A counter read inside a compiled graph would be guarded on, and recompile at every call.
    if not torch.compiler.is_compiling():
        _calls[operator, name] += 1


def report() -> dict[str, Any]:
    """What is there and what ran: backends, the one asked for, calls, stages that failed their check, CPU kernels."""
    from mbv2.kernels import cpu_network

    return {
        "available": available(),
        "asked": asked(),
        "calls": {f"{operator}/{name}": calls for (operator, name), calls in sorted(_calls.items())},
        "failed_checks": {
            f"{stage}/{name} {str(dtype).removeprefix('torch.')} {device}": verdict
            for (name, stage, dtype, device), verdict in _verdicts.items()
            if verdict is not None
        },
        "cpu_network": cpu_network.state(),
    }


def _refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if _disabled(name):
        return f"MBV2_DISABLE_{name.upper()} is set"
    return _backends[name].refusal(device, dtype)


def _disabled(name: str) -> bool:
    return _variable(_switch(name), "0") not in ("0", "")


@functools.cache
def _switch(name: str) -> str:
    return f"MBV2_DISABLE_{name.upper()}"


def _variable(name: str, default: str) -> str:
    """`os.environ.get`: some twenty questions in a training step of a block, nearly all about variables not set.

    os.environ takes a microsecond and an exception to say that; the mapping behind it, where it has one, a tenth.
    """
    if _set_variables is not None and (name.encode() if os.name == "posix" else name) not in _set_variables:
        return default
    return os.environ.get(name, default)


def _verified(name: str, stage: str, function: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """`function`, or its twin in plain torch if it failed the check of its first use."""
    key = (name, stage, x.dtype, x.device)
    if key not in _verdicts:
        if not _check_wanted(x):
            return function
        from mbv2.kernels.selfcheck import disagreement

        _verdicts[key] = disagreement(stage, function, x.dtype, x.device)
    if _verdicts[key] is None:
        return function
    message = f"stage {stage} of backend {name!r} failed its first-use check on {x.device} {x.dtype}: {_verdicts[key]}"
    if asked() == name:
        raise BackendError(f"{message}; use backend 'auto' or 'aten'")
    _say_once(f"mbv2: {message}; plain torch takes over for it")
    return getattr(aten, stage)


def _check_wanted(x: Tensor) -> bool:
    """First-use checks run on GPUs; MBV2_SELF_CHECK=0 or 1 decides otherwise. None while a CUDA graph is captured."""
    wanted = _variable("MBV2_SELF_CHECK", "1" if x.is_cuda else "0") not in ("0", "")
    return wanted and not (x.is_cuda and torch.cuda.is_current_stream_capturing())


def _say_once(message: str) -> None:
    if message not in _said and not torch.compiler.is_compiling():
        _said.add(message)
        warnings.warn(message, stacklevel=4)


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in available():
        raise BackendError(f"{source}: no backend {name!r} in this build; choose from auto, {', '.join(available())}")
