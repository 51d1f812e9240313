"""The sandbox: programs in, outcomes out."""

import contextlib
import os
import queue
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path, PurePosixPath
from typing import Self

from trinity.base.errors import UserError
from trinity.rl.sandbox import self_check
from trinity.rl.sandbox.limits import Limits, Outcome
from trinity.rl.sandbox.self_check import Layer
from trinity.rl.sandbox.worker import LostWorkerError, MissingLayerError, Worker

Files = Mapping[str, str | bytes]
"""Content by relative path."""

DEFAULT_PRELOAD = (
    "bisect",
    "collections",
    "copy",
    "dataclasses",
    "datetime",
    "decimal",
    "fractions",
    "functools",
    "heapq",
    "itertools",
    "json",
    "math",
    "operator",
    "random",
    "re",
    "statistics",
    "string",
    "threading",
    "typing",
)


class Sandbox:
    """A pool of warm interpreters that run programs, each in namespaces of its own. Safe to share between threads.

    packages: folders of modules that programs may import, seen read-only. preload: modules that are imported once,
    before the programs. unsafe: go without namespaces where this machine has none; limits, filter and the empty
    environment are kept, but a program then sees the files that this user may read.

    Raises MissingLayerError, which names the layer, where the isolation is not whole.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        workers: int | None = None,
        packages: Sequence[str | Path] = (),
        preload: Sequence[str] = (),
        unsafe: bool = False,
    ) -> None:
        if sys.platform != "linux":
            raise UserError(f"the sandbox is Linux's namespaces and seccomp; this is {sys.platform}")
        self.limits = limits or Limits()
        self._packages = [str(Path(path).resolve()) for path in packages]
        self._preload = [*DEFAULT_PRELOAD, *preload]
        self.isolated = True
        self._numbers = count()
        self.workers = workers or len(os.sched_getaffinity(0))
        self._idle: queue.LifoQueue[Worker | None] = queue.LifoQueue()
        self._end = weakref.finalize(self, _close_idle, self._idle)  # also when nobody closes it
        self._closed = False
        try:
            first = self._start()
            self.layers = self._examine(first)
        except UserError:
            if not unsafe:
                raise
            self.isolated = False
            first = self._start()
            self.layers = self._examine(first)
        for _ in range(self.workers - 1):
            self._idle.put(None)  # started when needed
        self._idle.put(first)

    def _examine(self, worker: Worker) -> list[Layer]:
        """The layers, seen from inside; raises MissingLayerError for one that does not hold."""
        if not self.isolated:
            return [Layer("namespaces", "left out on demand")]
        outcome = worker.run(source=self_check.PROGRAM.encode(), folder="", seconds=60.0, output=1 << 16)
        found = self_check.layers(outcome)
        for layer in found:
            if layer.problem:
                worker.close()
                raise MissingLayerError(layer.name, layer.problem)
        for kind in ("memory", "processes"):
            missing = "" if kind in worker.group.folders else "no control group: the limits are of each process only"
            found.append(Layer(f"{kind} of all together", missing, needed=False))
        return found

    def _start(self) -> Worker:
        return Worker(next(self._numbers), self.limits, self._packages, self._preload, isolated=self.isolated)

    def run(
        self,
        source: str | bytes,
        *,
        arguments: Sequence[str] = (),
        stdin: str | bytes = b"",
        files: Files | None = None,
        seconds: float | None = None,
    ) -> Outcome:
        """A Python program, with `files` beside it; `seconds` may shorten the limit of wall-clock time, not lengthen
        it."""
        return self._run(_bytes(source), arguments, True, stdin, files, seconds)

    def command(
        self,
        arguments: Sequence[str],
        *,
        stdin: str | bytes = b"",
        files: Files | None = None,
        seconds: float | None = None,
    ) -> Outcome:
        """A command of the system, or `python`, in a folder that holds `files`."""
        if not arguments:
            raise UserError("a command needs a name")
        return self._run(b"", arguments, False, stdin, files, seconds)

    def run_all(self, sources: Sequence[str | bytes], *, seconds: float | None = None) -> list[Outcome]:
        """Outcomes of Python programs, in their order, all workers at once."""
        with ThreadPoolExecutor(self.workers) as threads:
            return list(threads.map(lambda source: self.run(source, seconds=seconds), sources))

    def passes(self, program: str, *, seconds: float) -> bool:
        """Whether a Python program runs to the end of its text within `seconds`, and then ends with status 0.

        A program that leaves before, even with status 0, does not pass: tests at its end would not have run.
        """
        return self.passes_with(program, seconds=seconds)

    def passes_with(self, program: str, *, files: Files | None = None, seconds: float | None = None) -> bool:
        """`passes`, with files beside the program."""
        outcome = self.run(program, files=files, seconds=seconds)
        return outcome.completed and outcome.status == 0

    def _run(
        self,
        source: bytes,
        arguments: Sequence[str],
        python: bool,
        stdin: str | bytes,
        files: Files | None,
        seconds: float | None,
    ) -> Outcome:
        wanted = min(self.limits.seconds, seconds or self.limits.seconds)
        checked = {_relative(path): _bytes(content) for path, content in (files or {}).items()}
        for argument in arguments:
            if "\0" in argument:
                raise UserError("an argument holds a null character, which no program can be given")
        with self._worker() as worker, self._folder() as folder:
            return worker.run(
                source=source,
                arguments=arguments,
                python=python,
                stdin=_bytes(stdin),
                files=checked,
                folder=folder,
                seconds=wanted,
                output=self.limits.output,
            )

    @contextlib.contextmanager
    def _worker(self) -> Iterator[Worker]:
        """A worker for one program; one that is lost gives way to a new one the next time."""
        if self._closed:
            raise UserError("this sandbox is closed")
        worker = self._idle.get()
        try:
            if worker is None:
                worker = self._start()
            yield worker
        except LostWorkerError as error:
            if worker is not None:
                worker.close()
                worker = None
            raise UserError(f"a worker of the sandbox was lost while it ran a program ({error})") from None
        except BaseException:
            if worker is not None:  # it may be in the middle of a program: its answer would be taken for the next one's
                worker.close()
                worker = None
            raise
        finally:
            self._idle.put(worker)

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """Where a program runs that has no /tmp of its own."""
        if self.isolated:
            yield ""
            return
        folder = tempfile.mkdtemp(prefix="trinity-program-")
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """End all workers; waits for programs that still run."""
        self._closed = True
        workers = [self._idle.get() for _ in range(self.workers)]
        for worker in workers:
            if worker is not None:
                worker.close()
            self._idle.put(None)
        self._end.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _close_idle(idle: "queue.LifoQueue[Worker | None]") -> None:
    while not idle.empty():
        worker = idle.get()
        if worker is not None:
            worker.close()


def _bytes(text: str | bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text


def _relative(path: str) -> str:
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or not pure.parts or "\0" in path:
        raise UserError(f"{path!r} is no path inside the program's folder")
    return str(pure)


def examine() -> list[Layer]:
    """The layers of the isolation on this machine, with the first one that is missing, if any."""
    try:
        with Sandbox(workers=1) as sandbox:
            return sandbox.layers
    except MissingLayerError as error:
        return [Layer(error.layer, error.reason)]
    except UserError as error:
        return [Layer("worker", str(error))]
