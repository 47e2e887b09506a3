"""Which backend runs an operator: the best one that supports the call, or the one asked for.

`MBV2_BACKEND=name` or `with backend(name)` asks for one by name, and a call it cannot serve is an error.
`auto` takes the first of `ORDER` that supports the call; `aten` (plain torch) supports everything.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

ORDER = ("cuda", "triton", "cpu", "aten")


class BackendError(RuntimeError):
    """The backend that was asked for by name cannot run this call; the message says why."""


@dataclass(frozen=True)
class Implementation:
    """One backend's version of an operator.

    Attributes:
        run: takes what the public function takes.
        refusal: takes the input tensor; returns why this backend cannot serve it, or None when it can.
    """

    run: Callable[..., Tensor]
    refusal: Callable[[Tensor], str | None]


_implementations: dict[str, dict[str, Implementation]] = {}
_calls: Counter[tuple[str, str]] = Counter()
_asked: str | None = None


def register(operator: str, backend_name: str, implementation: Implementation) -> None:
    """Make `implementation` the way `backend_name` runs `operator`."""
    _implementations.setdefault(operator, {})[backend_name] = implementation


def available() -> list[str]:
    """The backends that have any operator here, best first."""
    return [name for name in ORDER if any(name in table for table in _implementations.values())]


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


def choose(operator: str, x: Tensor) -> Callable[..., Tensor]:
    """The function that runs `operator` on input `x`.

    Raises:
        BackendError: a backend was asked for by name and cannot serve this call.
    """
    asked = _asked or os.environ.get("MBV2_BACKEND", "auto")
    table = _implementations[operator]
    if asked != "auto":
        _check_name(asked, "MBV2_BACKEND")
        reason = table[asked].refusal(x) if asked in table else "it does not have this operator"
        if reason is not None:
            raise BackendError(f"backend {asked!r} cannot run {operator}: {reason}; use backend 'auto' or 'aten'")
        return _counted(operator, asked)
    for name in ORDER:
        if name in table and table[name].refusal(x) is None:
            return _counted(operator, name)
    raise BackendError(f"no backend can run {operator} on {x.device} {x.dtype}")


def report() -> dict[str, Any]:
    """What is there and what ran: backends of this build, the one asked for, and calls by operator and backend."""
    return {
        "available": available(),
        "asked": _asked or os.environ.get("MBV2_BACKEND", "auto"),
        "calls": {f"{operator}/{name}": count for (operator, name), count in sorted(_calls.items())},
    }


def _counted(operator: str, name: str) -> Callable[..., Tensor]:
    # A counter read inside a compiled graph would be guarded on, and recompile at every call.
    if not torch.compiler.is_compiling():
        _calls[operator, name] += 1
    return _implementations[operator][name].run


def _check_name(name: str, source: str) -> None:
    if name != "auto" and name not in available():
        raise BackendError(f"{source}: no backend {name!r} in this build; choose from auto, {', '.join(available())}")
