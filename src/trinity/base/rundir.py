"""The run directory: what a run is, what it measured and what happened to it, in plain files.

    RUN/run.toml  metrics.jsonl  events.jsonl  samples.jsonl  checkpoints/  model/  report.html

One process at a time writes a run directory; any number may read it.
"""

import fcntl
import json
import math
import os
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trinity.base.errors import UserError
from trinity.base.files import append_jsonl, atomic_write, read_jsonl

STAGES = ("rl", "sft", "extend", "pretrain")
"""Stages of a pipeline directory, the last one first."""


@dataclass(frozen=True)
class RunDir:
    """Paths of a run directory, and appending to its records."""

    path: Path

    @property
    def settings(self) -> Path:
        return self.path / "run.toml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def events(self) -> Path:
        return self.path / "events.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    def create(self) -> None:
        """Make the directory; raises UserError when the path cannot be one."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run directory {self.path}: {error.strerror}") from None

    def lock(self) -> "RunLock":
        """Hold the directory for this process; `with run.lock(): ...`.

        Raises UserError when another process holds it. The kernel releases the lock when its process dies, however it
        dies.
        """
        return RunLock(self.path / ".lock")

    def append_metric(self, record: Mapping[str, Any]) -> None:
        append_jsonl(self.metrics, clean(record))

    def append_event(self, record: Mapping[str, Any]) -> None:
        """Append an event; `time` (seconds since 1970) is added where it is missing."""
        append_jsonl(self.events, clean({"time": round(time.time(), 3), **record}))

    def append_sample(self, record: Mapping[str, Any]) -> None:
        append_jsonl(self.samples, clean(record))

    def read_metrics(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Records of metrics.jsonl in order, all or of one kind."""
        return [r for r in read_jsonl(self.metrics) if kind is None or r.get("kind") == kind]

    def read_events(self, event: str | None = None) -> list[dict[str, Any]]:
        return [r for r in read_jsonl(self.events) if event is None or r.get("event") == event]

    def read_samples(self) -> list[dict[str, Any]]:
        return read_jsonl(self.samples)

    def stage(self) -> str | None:
        """The stage that this directory belongs to; None before its first event."""
        start = next(iter(self.read_events("start")), None)
        return start["stage"] if start else None

    def forget_after(self, step: int) -> int:
        """Drop what metrics and samples say about steps after `step`, atomically; returns the number of records
        dropped.

        A resumed run takes these steps again. Events stay: they are the history of what happened, not of what counts.
        """
        dropped = 0
        for path in (self.metrics, self.samples):
            records = read_jsonl(path)
            kept = [r for r in records if r.get("step", 0) <= step]
            if len(kept) < len(records):
                _rewrite(path, kept)
            dropped += len(records) - len(kept)
        return dropped

    def mend(self) -> None:
        """Drop a last line that a kill cut off, so that the next record does not continue it."""
        for path in (self.metrics, self.events, self.samples):
            if path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
                _rewrite(path, read_jsonl(path))

    def flush(self) -> None:
        """Bring the records to the disk itself: after this they survive a power failure."""
        for path in (self.metrics, self.events, self.samples):
            if path.exists():
                with path.open("ab") as file:
                    os.fsync(file.fileno())


def find_settings(path: Path) -> Path | None:
    """run.toml of a run, of the run around a checkpoint or an exported model, or of a pipeline's last stage."""
    around = [path.parent] if path.name == "model" else []
    if path.parent.name == "checkpoints":
        around = [path.parent.parent]
    for folder in (path, *around, *(path / stage for stage in STAGES)):
        if (folder / "run.toml").is_file():
            return folder / "run.toml"
    return None


class RunLock:
    """An exclusive lock on a run directory, kept in `.lock` with the holder's process id and host."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: int | None = None

    def __enter__(self) -> Self:
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.read(handle, 200).decode("utf-8", "replace").strip() or "another process"
            os.close(handle)
            raise UserError(
                f"{self.path.parent} is in use by {holder}: wait for it or choose another --run-dir"
            ) from None
        os.ftruncate(handle, 0)
        os.write(handle, f"process {os.getpid()} on {socket.gethostname()}".encode())
        self._handle = handle
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._handle is not None:
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def clean(value: Any) -> Any:
    """`value` with numbers that JSON lacks (NaN, infinities) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    return value


def _rewrite(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    with atomic_write(path) as file:
        for record in records:
            file.write((json.dumps(record, ensure_ascii=False, separators=(",", ":")) + "\n").encode())
