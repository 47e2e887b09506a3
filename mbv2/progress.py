"""Progress of long work, on stderr: a rich bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")

_SECONDS_BETWEEN_LINES = 5.0


class Progress:
    """Counts towards `total` under a label; use as a context manager and call `advance`.

    Args:
        total: how many units there are.
        label: what is being done.
        unit: what is counted.
        enabled: False says nothing (every rank but 0).
    """

    def __init__(self, total: int, label: str, unit: str = "img", enabled: bool = True) -> None:
        self.total = total
        self.label = label
        self.unit = unit
        self.done = 0
        self._enabled = enabled
        self._bar: Any = None
        self._task: Any = None
        self._started = self._last = time.monotonic()

    def __enter__(self) -> "Progress":
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def advance(self, count: int = 1) -> None:
        """Count `count` more units as done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done)
            return
        now = time.monotonic()
        if self._enabled and now - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = now
            rate = self.done / (now - self._started)
            print(
                f"{self.label}: {self.done}/{self.total} {self.unit}, {rate:.1f} {self.unit}/s",
                file=sys.stderr,
            )

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def track(items: Iterable[T], total: int, label: str, unit: str = "img", enabled: bool = True) -> Iterator[T]:
    """Yield `items`, counting each as one unit of progress."""
    with Progress(total, label, unit, enabled) as progress:
        for item in items:
            yield item
            progress.advance()
