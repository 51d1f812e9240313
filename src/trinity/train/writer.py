"""Saving behind the next steps: a thread that writes one checkpoint, or one rank's part of it, at a time.

No rank talks to another from the thread: whoever trains may be in a collective at the same moment. Each rank leaves a
receipt in the checkpoint's folder, which all ranks share, and the main rank waits for the receipts.
"""

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trinity.base.errors import UserError
from trinity.train.checkpoint import (
    CheckpointInfo,
    Snapshot,
    abandoned_on_error,
    checkpoint_name,
    commit,
    partial_folder,
    prune,
    save_checkpoint,
    write_tensor_files,
)
from trinity.train.manifest import read_json, read_manifest
from trinity.train.tensorfile import Digest, write_bytes

_LOOK_AGAIN = 0.02  # seconds between looks for receipts


class CheckpointWriter:
    """Saves checkpoints in a thread, at most one at a time; an error appears at the next call."""

    def __init__(
        self, folder: Path, keep_last: int, keep_every: int, *, main: bool = True, timeout: float = 600.0
    ) -> None:
        """`main`: of several ranks, this one commits. It waits `timeout` seconds for the others' parts."""
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self.main, self.timeout = main, timeout
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: queue.SimpleQueue[CheckpointInfo] = queue.SimpleQueue()

    def save(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Save `snapshot`, whose tensors nobody changes any more unless `wait`; waits for the previous one first.

        For a part of a checkpoint the folder must be prepared (`checkpoint.prepare`).
        """
        self.wait()
        if wait:
            self._save(snapshot)
            self._raise()
            return
        self._thread = threading.Thread(target=self._save, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Wait for the save under way. Raises what went wrong in it."""
        self.join()
        self._raise()

    def join(self) -> None:
        """Wait for the save under way, whatever comes of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def written(self) -> list[CheckpointInfo]:
        """The checkpoints committed since the last call; does not wait. Raises what went wrong in a save."""
        if self.main:  # the main rank tells of the others' errors, too
            self._raise()
        return [self._written.get() for _ in range(self._written.qsize())]

    def _save(self, snapshot: Snapshot) -> None:
        try:
            if snapshot.part is None:
                save_checkpoint(self.folder, snapshot)
            elif self.main:
                _save_with_others(self.folder, snapshot, self.timeout)
            else:
                _save_part(self.folder, snapshot)
            if self.main:
                path = self.folder / checkpoint_name(snapshot.step)
                size = sum(entry.bytes for entry in read_manifest(path).values())
                self._written.put(CheckpointInfo(path, snapshot.step, size, True))
                prune(self.folder, self.keep_last, self.keep_every)
        except BaseException as error:  # carried to the main thread, which raises it
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error


def _receipt(folder: Path, step: int, number: int) -> Path:
    return partial_folder(folder, step) / f"part-{number:05d}.json"


def _save_part(folder: Path, snapshot: Snapshot) -> None:
    """Write this rank's files and its receipt."""
    assert snapshot.part is not None
    place = _receipt(folder, snapshot.step, snapshot.part.number)
    try:
        files = write_tensor_files(folder, snapshot)
        content = {"files": {name: entry._asdict() for name, entry in files.items()}}
    except OSError as error:
        content = {"error": error.strerror or str(error)}
    try:
        unfinished = place.with_suffix(".unfinished")
        write_bytes(unfinished, json.dumps(content).encode())
        os.rename(unfinished, place)  # noqa: PTH104
    except OSError as error:
        reason = content.get("error", error.strerror or error)
        raise UserError(f"part {snapshot.part.number} of the checkpoint of step {snapshot.step}: {reason}") from error


def _save_with_others(folder: Path, snapshot: Snapshot, timeout: float) -> None:
    """Write this rank's files, wait for those of the others, and commit."""
    assert snapshot.part is not None
    with abandoned_on_error(folder, snapshot.step):
        files = write_tensor_files(folder, snapshot)
        deadline = time.monotonic() + timeout
        for number in range(snapshot.part.parts):
            if number != snapshot.part.number:
                place = _receipt(folder, snapshot.step, number)
                _wait(place.exists, deadline, f"{place.parent} has no part {number}")
                content = read_json(place)
                if "error" in content:
                    raise OSError(f"part {number}: {content['error']}")
                files |= {name: Digest(**entry) for name, entry in content["files"].items()}
                place.unlink()
        commit(folder, snapshot, files)


def _wait(happened: Callable[[], bool], deadline: float, missing: str) -> None:
    while not happened():
        if time.monotonic() > deadline:
            raise OSError(f"{missing}: is the run directory on storage that all hosts share?")
        time.sleep(_LOOK_AGAIN)
