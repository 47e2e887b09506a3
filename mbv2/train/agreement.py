"""Failing together: what one rank cannot do ends the run on all of them, where a lone exception would hang the rest."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from mbv2.distributed import World
from mbv2.errors import UserError

T = TypeVar("T")


class AgreedError(UserError):
    """A UserError that every rank raises at the same point."""


def together(world: World, work: Callable[[], T]) -> T:
    """Call `work` on every rank; when it fails on any, all raise what the first of them says.

    Raises:
        AgreedError: `work` raised UserError or OSError on some rank.
    """
    result, error = _attempt(work)
    for message in world.gather_objects(error):
        if message is not None:
            raise AgreedError(message)
    return result  # type: ignore[return-value]


def on_main(world: World, work: Callable[[], T]) -> T:
    """Call `work` on rank 0 and return its (picklable) result on every rank.

    Raises:
        AgreedError: on every rank, when `work` raised UserError or OSError.
    """
    result, error = world.broadcast_object(_attempt(work) if world.is_main else None)
    if error is not None:
        raise AgreedError(error)
    return result


class Control:
    """A word between the ranks before each step: has anyone been asked to stop, has anyone failed?

    It goes over gloo on the CPU, so that asking does not wait for the GPU's queue. Every rank must make one, at the
    same point.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._group = dist.new_group(backend="gloo") if world.is_distributed and world.device.type == "cuda" else None

    def stop(self, requested: bool, error: str | None) -> bool:
        """Whether to stop before this step; every rank must ask before each one and gets the same answer.

        Raises:
            AgreedError: some rank has an error.
        """
        world = self._world
        word = torch.tensor([int(requested), int(error is not None)])
        if world.is_distributed:
            dist.all_reduce(word, group=self._group)
        if word[1]:
            messages: list[str | None] = [error]
            if world.is_distributed:
                messages = [None] * world.world_size
                dist.all_gather_object(messages, error, group=self._group)
            raise AgreedError(next(message for message in messages if message is not None))
        return bool(word[0])


def _attempt(work: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return work(), None
    except UserError as error:
        return None, str(error)
    except OSError as error:
        return None, f"{error.filename or 'file system'}: {error.strerror or error}"
