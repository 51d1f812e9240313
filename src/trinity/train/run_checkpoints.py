"""The checkpoints of one run: saving behind the next steps, and finding one to go on from."""

from pathlib import Path

from trinity.base import dist
from trinity.base.errors import UserError
from trinity.train.checkpoint import (
    CheckpointInfo,
    Snapshot,
    clean_partials,
    latest_good,
    list_checkpoints,
    prepare,
    verify_checkpoint,
)
from trinity.train.job import TrainJob
from trinity.train.journal import Journal
from trinity.train.writer import CheckpointWriter


def verify_together(path: Path) -> None:
    """Every rank reads some of the files. Raises UserError on every rank when one differs. A collective."""
    dist.together(lambda: verify_checkpoint(path, (dist.rank(), dist.world_size())))


class RunCheckpoints:
    """Saves on the main rank, or on every rank its part; each checkpoint is reported once it is committed."""

    def __init__(self, job: TrainJob, journal: Journal) -> None:
        settings = job.config.checkpoint
        self.folder, self._journal = job.run_dir.checkpoints, journal
        self._writer = CheckpointWriter(
            self.folder,
            settings.keep_last,
            settings.keep_every,
            main=dist.is_main(),
            timeout=job.config.runtime.timeout,
        )
        self.saved_step = -1
        """Of the newest checkpoint, written, being written or restored; -1: none."""

    def save(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Save a snapshot whose tensors nobody changes any more, unless `wait`. A collective."""
        self._journal.flush()
        if snapshot.part is not None:
            # Every rank is through with the checkpoint before, and none writes before there is a folder to write to.
            dist.together(self._writer.wait)
            if dist.on_main(lambda: prepare(self.folder, snapshot.step)) and snapshot.part.writes:
                self._writer.save(snapshot, wait=wait)
            if wait:
                dist.together(self._writer.wait)
        elif dist.is_main():
            self._writer.save(snapshot, wait=wait)
        self.saved_step = snapshot.step

    def report(self) -> None:
        """Tell of the checkpoints committed since the last call. Raises what went wrong in a save."""
        for info in self._writer.written():
            self._journal.event("checkpoint", step=info.step, path=f"checkpoints/{info.path.name}", bytes=info.bytes)

    def wait(self) -> None:
        """Wait for the save under way, on every rank. Raises what went wrong in it on any."""
        dist.together(self._writer.wait)
        self.report()

    def join(self) -> None:
        """Wait for the save under way, whatever comes of it."""
        self._writer.join()

    def whole(self, step: int) -> dict[int, Path]:
        """Folders of the checkpoints that verify, by step, oldest first; the others are reported at `step`. A
        collective."""
        found = {}
        for info in dist.on_main(lambda: list_checkpoints(self.folder)):
            try:
                verify_together(info.path)
            except UserError as error:
                self._report_damage(info, str(error), step)
            else:
                found[info.step] = info.path
        return found

    def newest(self) -> Path | None:
        """The newest whole checkpoint; None in a new run. A collective.

        Raises UserError when there are checkpoints and none is whole: the run must not start over silently.
        """
        dist.on_main(lambda: clean_partials(self.folder))
        damaged: list[str] = []

        def report(info: CheckpointInfo, reason: str) -> None:
            damaged.append(reason)
            self._report_damage(info, reason, step=0)

        path = latest_good(dist.on_main(lambda: list_checkpoints(self.folder)), report, verify_together)
        if path is None and damaged:
            raise UserError(f"no checkpoint in {self.folder} is whole; the newest: {damaged[0]}")
        return path

    def _report_damage(self, info: CheckpointInfo, reason: str, step: int) -> None:
        self._journal.event("damaged_checkpoint", step=step, checkpoint=info.step, reason=reason)
