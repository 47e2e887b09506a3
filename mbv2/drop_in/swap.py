"""Another forward for a module, and nothing else: a subclass made for its class and assigned to `__class__`.

The module stays the object it was, with its parameters, names, hooks and mode, so optimisers, EMA copies, DDP and
`state_dict` see no change, and `isinstance` holds. What was weighed against it:

* a module put in its place loses the block's hooks and every reference to it;
* a wrapper around it changes the names in `state_dict`;
* a `forward` set on the instance cannot be pickled, and a deep copy of the module could call the original's;
* a forward set on the class reaches models that nobody asked to change;
* rewriting the model as a graph (torch.fx) loses its class, and Python in its forward.

The subclass is unpickled by way of the class it was made for. The fused forward reads the module anew at every call
and leaves everything it does not know to the original forward, so what is changed later is never computed wrongly.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from mbv2.drop_in.leaves import Mismatch
from mbv2.drop_in.owners import Owner, owner_of
from mbv2.drop_in.patterns import Block, Fused, Head, Step, run_all, stages
from mbv2.kernels.dispatch import asked
from mbv2.kernels.ops import is_fused

# Parameters of other types (quantised, sharded) have arithmetic of their own.
_PLAIN = (
    "torch.Tensor",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch._subclasses.fake_tensor.FakeTensor",
    "torch._subclasses.functional_tensor.FunctionalTensor",
)
# On CPUs, from this many positions of the input on (two pictures of 224 x 224), a network's stem and head run faster
# in operators; below, torch's own modules do (docs/drop_in.md). Blocks always gain.
_POSITIONS = 100_000


class Accelerated:
    """What all classes made here have in common; `isinstance(module, Accelerated)` tells them."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        function, arguments, *rest = super().__reduce_ex__(protocol)
        cls = type(self)
        original = original_class(cls)
        given = tuple(original if argument is cls else argument for argument in arguments)
        return _rebuilt, (original, function, given), *rest


@functools.cache
def accelerated_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The subclass of `cls` whose forward runs its known steps as fused operators."""
    members = {"forward": _forward(cls, owner_of(cls)), "__module__": __name__, "__doc__": cls.__doc__}
    return types.new_class(f"Accelerated{cls.__name__}", (Accelerated, cls), {}, lambda body: body.update(members))


def original_class(cls: type[nn.Module]) -> type[nn.Module]:
    """The class that an accelerated class was made for."""
    return cls.__bases__[1]


def _rebuilt(original: type[nn.Module], function: Any, arguments: tuple[Any, ...]) -> nn.Module:
    module = function(*arguments)
    module.__class__ = accelerated_class(original)
    return module


def _forward(cls: type[nn.Module], owner: Owner) -> Any:
    original = cls.forward

    # torch.jit.script compiles what functools.wraps points to: the original.
    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs:
            x = args[0]
            if isinstance(x, fx.Proxy):
                return _traced(self, x, owner, original)
            if _worthwhile(x) and not owner.own(self):
                steps = owner.read(self)
                if not isinstance(steps, Mismatch) and _gains(steps, x) and _computable(steps, x):
                    return run_all(steps, x)
        return original(self, *args, **kwargs)

    return forward


def _worthwhile(x: Any) -> bool:
    """Whether an operator may be called on x and would gain something."""
    return (
        isinstance(x, Tensor)
        and _plain(x)
        and x.dim() == 4
        and not torch.jit.is_tracing()
        and is_fused("inverted_residual", x)
        and not _has_any_global_hook()
        and not torch._C._are_functorch_transforms_active()
    )


def _gains(steps: list[Step], x: Tensor) -> bool:
    """Whether the steps are faster as operators at x's size, unless a backend was named; compiled code holds any."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or asked() != "auto":
        return True
    if isinstance(steps[0], Head) or any(isinstance(step, Block) for step in steps):
        return True
    return x.shape[0] * x.shape[2] * x.shape[3] >= _POSITIONS


def _computable(steps: list[Step], x: Tensor) -> bool:
    """Whether the weights have x's device and type, as they must; the original forward raises torch's own error."""
    cast = torch.is_autocast_enabled(x.device.type)
    for step in steps:
        if not isinstance(step, Fused):
            continue
        for stage in stages(step):
            weight, scale = stage.conv.weight, stage.norm.weight
            if not _plain(weight) or (scale is not None and not _plain(scale)):
                return False
            if weight.device != x.device or (weight.dtype != x.dtype and not cast):
                return False
    return True


def _plain(tensor: Tensor) -> bool:
    cls = type(tensor)
    return cls.__module__ + "." + cls.__qualname__ in _PLAIN


def _traced(self: nn.Module, x: fx.Proxy, owner: Owner, original: Any) -> Any:
    """One node for a module that consists of fused steps only; torch.fx sees through all others."""
    steps = owner.read(self)
    fused = not isinstance(steps, Mismatch) and all(isinstance(step, Fused) for step in steps)
    name = x.tracer.path_of_module(self) if fused else ""
    return x.tracer.create_proxy("call_module", name, (x,), {}) if name else original(self, x)
