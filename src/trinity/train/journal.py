"""Where a run tells what happened: the run directory's records and whoever watches, on the main rank."""

from typing import Any

from trinity.base import dist
from trinity.train.job import Record, TrainJob


class Journal:
    """Writes records on the main rank and hands them to the job's progress; other ranks write nothing."""

    def __init__(self, job: TrainJob) -> None:
        self._job, self._run_dir = job, job.run_dir
        self.last_step: Record | None = None
        """The newest step's record, on every rank."""

    def metric(self, record: Record) -> None:
        is_step = record.get("kind") == "step"
        if dist.is_main():
            self._run_dir.append_metric(record)
            (self._job.progress.on_step if is_step else self._job.progress.on_metric)(record)
        if is_step:
            self.last_step = record

    def event(self, event: str, *, step: int, **fields: Any) -> None:
        if dist.is_main():
            record = {"stage": self._job.stage, "step": step, "event": event, **fields}
            self._run_dir.append_event(record)
            self._job.progress.on_event(record)

    def sample(self, record: Record, *, step: int) -> None:
        if dist.is_main():
            self._run_dir.append_sample({"stage": self._job.stage, "step": step, **record})

    def forget_after(self, step: int) -> None:
        """Drop the records of steps after `step`: they will be taken again."""
        if dist.is_main():
            self._run_dir.forget_after(step)

    def flush(self) -> None:
        if dist.is_main():
            self._run_dir.flush()
