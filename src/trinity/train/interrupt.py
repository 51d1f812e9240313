"""SIGTERM and Ctrl-C: finish the step, save, leave. A second signal, or a deadline, ends the process at once."""

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Self

DEADLINE = 120.0
"""Seconds between the signal and the end of the process, whatever it is doing."""


class StopSignal:
    """Context manager: remembers the first SIGTERM or SIGINT instead of dying of it.

    The second raises KeyboardInterrupt. Handlers can only be installed in the main thread; elsewhere nothing is caught.
    """

    def __init__(self, deadline: float = DEADLINE) -> None:
        self.deadline = deadline
        self.received: str | None = None
        self._before: dict[int, object] = {}
        self._timer: threading.Timer | None = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name
        self._timer = threading.Timer(self.deadline, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def _expire(self) -> None:
        print(
            f"the step did not end within {self.deadline:g} s of {self.received}: leaving without saving; "
            "the same command resumes from the last checkpoint",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)
