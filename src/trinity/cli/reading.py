"""How much of a long prompt is read."""

import time
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from trinity.base.console import Console, Progress, quantity

LONG = 4096
"""Tokens from which on a prompt is worth a line."""


class ReadingView:
    """A line of progress while a long prompt is read, gone before the answer begins; hand `show` to the engine."""

    def __init__(self, console: Console | None = None, long: int = LONG) -> None:
        self._console, self._long = console or Console(), long
        self._stack = ExitStack()
        self._progress: Progress | None = None
        self._first: int | None = None
        """What was read already when the engine began."""
        self._begun = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def show(self, done: int, total: int) -> None:
        """`done` of `total` tokens are read; the first call comes before anything is."""
        if self._first is None:
            self._first, self._begun = done, time.monotonic()
        if total - self._first < self._long:
            return
        if self._progress is None:
            self._progress = self._stack.enter_context(self._console.progress("Reading", total, "tokens"))
        rate = (done - self._first) / max(1e-9, time.monotonic() - self._begun)
        amount = f"{quantity(done)}/{quantity(total)} tokens  " if self._console.interactive else ""  # else said anyway
        self._progress.set(done, f"{amount}{quantity(rate)} tok/s")
        if done == total:
            self._stack.close()
