"""`accelerate` and `restore`: the walk over a model, and the report of what was swapped and what was not."""

import warnings
from dataclasses import dataclass, field
from itertools import groupby

from torch import nn

from mbv2.drop_in.leaves import Mismatch
from mbv2.drop_in.owners import full_name, owner_of
from mbv2.drop_in.patterns import Apart, Fused, described
from mbv2.drop_in.swap import Accelerated, accelerated_class, original_class
from mbv2.drop_in.unmatched import FOREIGN, NOTES, OTHERWISE_CALLED, OURS, why_depthwise_stays
from mbv2.errors import UserError


@dataclass(frozen=True)
class Swapped:
    """One fused step of a module whose forward was swapped.

    Attributes:
        name: of the module in the model, "" for the model itself.
        kind: "block", "block with residual", "stem" or "head with pooling".
        channels: of the input and after each convolution, as "16 -> 96 -> 96 -> 24".
        stride: 1 or 2.
        owner: the module's class.
    """

    name: str
    kind: str
    channels: str
    stride: int
    owner: str


@dataclass(frozen=True)
class Kept:
    """A module that keeps its own forward although it looks like a part of such a network, and why."""

    name: str
    owner: str
    why: str


@dataclass
class Report:
    """What `accelerate` did; `str()` makes a table of it.

    Attributes:
        model: the model's class.
        swapped: what runs in fused operators now.
        kept: what does not, with one reason each.
    """

    model: str
    swapped: list[Swapped] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.swapped)} swapped, {len(self.kept)} kept"]
        rows = [(s.name or "(model)", s.kind, s.channels, f"stride {s.stride}", s.owner) for s in self.swapped]
        lines += _columns(rows)
        for (owner, why), same in groupby(self.kept, key=lambda kept: (kept.owner, kept.why)):
            names = [kept.name or "(model)" for kept in same]
            where = names[0] if len(names) == 1 else f"{len(names)} from {names[0]} to {names[-1]}"
            lines.append(f"kept: {where} ({owner}): {why}")
        return "\n".join(lines)


def accelerate(model: nn.Module) -> Report:
    """Have the MobileNetV2 blocks of any model computed by mbv2's fused operators, in place.

    A module is matched by what its class's forward is known to do and by the types and attributes of the modules it
    calls: 1x1 convolution, BatchNorm, ReLU6, depthwise 3x3 convolution, BatchNorm, ReLU6, 1x1 convolution, BatchNorm,
    with or without the first three and with or without the residual; a 3x3 stem of stride 2; a 1x1 convolution,
    BatchNorm and ReLU6 that is averaged over all positions. Only its class changes, to a subclass with another forward:
    parameters, names, hooks, `state_dict`, `isinstance` and mode stay. Calling it again changes nothing more.

    Args:
        model: any module: torchvision's, timm's, transformers', a detector around them, an nn.Sequential.

    Returns:
        What was swapped, and what was not and why. Nothing swapped is a warning, not an error.
    """
    report = Report(_class_of(model).__name__)
    _visit(model, "", report, set())
    if not report.swapped and not any(kept.why == OURS for kept in report.kept):
        reason = report.kept[0].why if report.kept else "it has no depthwise convolution"
        warnings.warn(
            f"accelerate: nothing in {report.model} is a MobileNetV2 block that could be swapped: {reason}",
            stacklevel=2,
        )
    return report


def restore(model: nn.Module) -> list[str]:
    """Undo `accelerate`: every swapped module gets its own class back, in place.

    Returns:
        The names of the modules restored.

    Raises:
        UserError: a module's class was derived from the accelerated one since, as FSDP2's fully_shard does.
    """
    swapped = [(name, module) for name, module in model.named_modules() if isinstance(module, Accelerated)]
    for name, module in swapped:
        if type(module).__bases__[0] is not Accelerated:
            raise UserError(
                f"restore: {name or 'the model'} is a {type(module).__name__}, whose class was made on top of the "
                "accelerated one (as fully_shard does); restore the model before that step"
            )
    for _, module in swapped:
        module.__class__ = original_class(type(module))
    return [name for name, _ in swapped]


def _visit(module: nn.Module, name: str, report: Report, seen: set[int]) -> None:
    """Swap this module, or look into it; a block goes before the modules it calls, a Sequential after them."""
    if id(module) in seen:
        return
    seen.add(id(module))
    key = full_name(_class_of(module).forward)
    if key in FOREIGN:
        report.kept.append(Kept(name, type(module).__name__, FOREIGN[key]))
        return
    owner = owner_of(_class_of(module))
    if owner is not None and not owner.opened:
        _try(module, name, report, say_why=True)
        return
    before = len(report.swapped)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}".lstrip(".")
        if child_name == OTHERWISE_CALLED.get(key):
            report.kept.append(Kept(path, _class_of(child).__name__, "another method than its forward is called"))
            for grandchild_name, grandchild in child.named_children():
                _visit(grandchild, f"{path}.{grandchild_name}", report, seen)
        else:
            _visit(child, path, report, seen)
    for child_name, why in NOTES.get(key, {}).items():
        if hasattr(module, child_name) and len(report.swapped) > before:
            owner_name = type(getattr(module, child_name)).__name__
            report.kept.append(Kept(f"{name}.{child_name}".lstrip("."), owner_name, why))
    if owner is not None:
        # A Sequential without a pattern is nothing to report; a network whose head does not fit is.
        _try(module, name, report, say_why=not isinstance(module, nn.Sequential))
    # What a Sequential holds is its owner's to report.
    why = None if isinstance(module, nn.Sequential) and name else why_depthwise_stays(module)
    if why is not None:
        report.kept.append(Kept(name, _class_of(module).__name__, why))


def _try(module: nn.Module, name: str, report: Report, say_why: bool) -> None:
    """Swap one known module if it matches, and report."""
    original = _class_of(module)
    owner = owner_of(original)
    steps = owner.read(module)
    if not isinstance(steps, Mismatch) and owner.own(module):
        steps = Mismatch(None, "has a forward of its own on the instance")
    if isinstance(steps, Mismatch):
        if say_why:
            report.kept.append(Kept(name, original.__name__, _reason(module, steps)))
        if not steps.passing:
            return
    else:
        report.swapped += [
            Swapped(name, *described(step), original.__name__) for step in steps if isinstance(step, Fused)
        ]
        report.kept += [
            Kept(name, original.__name__, f"of its {step.kind}, {_reason(module, step.why)}")
            for step in steps
            if isinstance(step, Apart)
        ]
    if not isinstance(module, Accelerated):
        module.__class__ = accelerated_class(original)


def _reason(module: nn.Module, mismatch: Mismatch) -> str:
    for name, part in module.named_modules():
        if name and part is mismatch.module:
            return f"{name} {mismatch.why}"
    return mismatch.why


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The module's class, the original one if it was swapped."""
    cls = type(module)
    return original_class(cls) if cls.__bases__[0] is Accelerated else cls


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
