"""What `--force` replaces in a run directory: set aside first, removed once the new run has begun."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from trinity.base.errors import UsageError, UserError

RUN_FILES = ("run.toml", "origins.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "report.html")
RUN_FOLDERS = ("checkpoints", "model")
ASIDE = ".replaced"


@dataclass(frozen=True)
class Replaced:
    """The old run, in a hidden folder of its directory."""

    run_dir: Path

    @property
    def _aside(self) -> Path:
        return self.run_dir / ASIDE

    def remove(self) -> None:
        """The new run has begun; the old one goes."""
        shutil.rmtree(self._aside, ignore_errors=True)

    def restore(self) -> None:
        """The new run could not begin; the old one comes back. Does nothing after `remove`."""
        if not self._aside.is_dir():
            return
        for path in list(self._aside.iterdir()):
            place = self.run_dir / path.name
            if place.is_dir() and not place.is_symlink():
                shutil.rmtree(place)
            path.replace(place)
        self._aside.rmdir()


def set_aside(run_dir: Path, start_from: Path | None = None) -> Replaced | None:
    """Move what a run left in `run_dir`, and nothing else, out of the way; None when there is nothing.

    Raises UsageError when `start_from` lies inside it, and UserError when another process is writing the run or when
    the directory is no run's.
    """
    if not run_dir.is_dir():
        return None
    if start_from is not None and start_from.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError(f"--force would remove {start_from}, which --from needs: choose another --run-dir")
    replaced = Replaced(run_dir)
    from trinity.base.rundir import RunDir

    with RunDir(run_dir).lock():
        replaced.restore()  # of a start that was killed
        folders = [name for name in RUN_FOLDERS if (run_dir / name).is_dir() and not (run_dir / name).is_symlink()]
        files = [name for name in RUN_FILES if (run_dir / name).is_file()]
        if folders and not files:
            raise UserError(
                f"{run_dir / folders[0]} is there, but {run_dir} is no run directory: choose another --run-dir"
            )
        if not files:
            return None
        (run_dir / ASIDE).mkdir()
        for name in (*folders, *files):
            (run_dir / name).rename(run_dir / ASIDE / name)
    return replaced
