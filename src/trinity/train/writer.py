"""Saving behind the next steps: a thread that writes one checkpoint at a time."""

import queue
import threading
from pathlib import Path

from trinity.train.checkpoint import CheckpointInfo, Snapshot, prune, save_checkpoint
from trinity.train.manifest import read_manifest


class CheckpointWriter:
    """Saves checkpoints in a thread, at most one at a time; an error appears at the next call."""

    def __init__(self, folder: Path, keep_last: int, keep_every: int) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: queue.SimpleQueue[CheckpointInfo] = queue.SimpleQueue()

    def save(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Save `snapshot`, whose tensors nobody changes any more unless `wait`; waits for the previous one first."""
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
        self._raise()
        return [self._written.get() for _ in range(self._written.qsize())]

    def _save(self, snapshot: Snapshot) -> None:
        try:
            path = save_checkpoint(self.folder, snapshot)
            size = sum(entry.bytes for entry in read_manifest(path).values())
            self._written.put(CheckpointInfo(path, snapshot.step, size, True))
            prune(self.folder, self.keep_last, self.keep_every)
        except BaseException as error:  # carried to the main thread, which raises it
            self._error = error

    def _raise(self) -> None:
        error, self._error = self._error, None
        if error is not None:
            raise error
