"""Stopping on request: SIGTERM (preemption) and Ctrl-C let the current step finish, so that it can be saved."""

import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

EXIT_PREEMPTED = 75
"""Exit code after saving and stopping on a signal (sysexits.h's EX_TEMPFAIL: try again later)."""

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_CTRL_C_SECONDS = 1.0


class StopRequest:
    """Turns SIGTERM and SIGINT into a flag while the context lasts, and restores the old handlers after it.

    A second SIGINT raises KeyboardInterrupt at once. One that follows within a second does not count: on Ctrl-C
    the terminal signals every process, and torchrun then passes the signal on once more.
    Outside the main thread, where Python allows no handlers, the flag can only be set by hand.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_interrupt: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which Python cannot put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if self._first_interrupt is None:
            self._first_interrupt = now
        elif now - self._first_interrupt > _SAME_CTRL_C_SECONDS:
            raise KeyboardInterrupt
