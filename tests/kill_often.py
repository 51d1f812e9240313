"""Runs that are killed at chosen changes to the disk, a thousand of them in a minute or two.

    python tests/kill_often.py FOLDER --kills 1000 [--asynchronous] [--seed 0]

One process imports everything once and forks a child for each start of a run; the child kills itself (a real SIGKILL)
at its n-th change to the disk: opening for writing, writing, flushing, renaming, making and removing files and folders,
appending a record. A write or an append that is hit leaves a part of its bytes behind. Half of the kills take every n
in turn, each in a run of its own, until runs end unharmed; the others are drawn at random and hit the same run again
and again until it is done. After every kill the parent reads the whole run directory. Prints one JSON object; exit
status 1 when something was lost.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch

from train_helpers import small_config, small_job
from trinity.base import rundir
from trinity.base.rundir import RunDir
from trinity.config import RunConfig
from trinity.train import hardware, train, writer
from trinity.train.checkpoint import Snapshot, checkpoint_name, list_checkpoints, load_checkpoint
from trinity.train.manifest import FORMAT, MANIFEST, MODEL, OPTIMIZER, STATE, read_manifest
from trinity.train.tensorfile import write_bytes, write_tensors

CHANGES = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir", "ftruncate")
EVERY = 2
"""Steps between checkpoints."""
STEPS = 8
FINISHED = 8
"""Of the runs that are killed once, each of this many is then brought to its end."""


class Fault:
    """Stands before every change to the disk that this process makes and kills it at number `survives` + 1."""

    def __init__(self, survives: int, draws: random.Random) -> None:
        self.left, self.draws, self.lock = survives, draws, threading.Lock()

    def install(self) -> None:
        for name in CHANGES:
            setattr(os, name, self._before(name, getattr(os, name)))
        write = os.write
        append = rundir.append_jsonl

        def append_part(path: Path, record: dict[str, Any]) -> None:
            def part() -> None:
                line = json.dumps(record).encode()
                with path.open("ab") as file:
                    file.write(line[: self.draws.randrange(len(line) + 1)])

            self.count(part)
            append(path, record)

        rundir.append_jsonl = append_part
        assert os.write is write

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if name == "write":
                handle, data = args
                self.count(lambda: real(handle, data[: self.draws.randrange(len(data) + 1)]))
            elif name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                self.count(lambda: None)
            return real(*args, **kwargs)

        return change

    def count(self, part: Callable[[], Any]) -> None:
        with self.lock:
            self.left -= 1
            if self.left < 0:
                part()
                os.kill(os.getpid(), signal.SIGKILL)


def start(path: Path, config: RunConfig, survives: int, seed: int) -> Literal["killed", "done", "failed"]:
    """Start or resume the run in a child."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Fault(survives, random.Random(seed)).install()
            train(small_job(path, config))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return "killed"
    return "done" if os.waitstatus_to_exitcode(status) == 0 else "failed"


class Inspection:
    """Reads run directories after kills, and keeps the worst that was seen."""

    def __init__(self, config: RunConfig, calm: Path) -> None:
        self.config, self.calm = config, {k: v.sha256 for k, v in read_manifest(last(calm)).items() if "state" not in k}
        self.kills = self.unreadable = self.most_lost = self.finished = self.wrong_end = 0
        self.problems: list[str] = []

    def after_start(self, path: Path, outcome: Literal["killed", "done", "failed"]) -> None:
        if outcome == "killed":
            self.kills += 1
            self._after_kill(path)
        elif outcome == "done":
            self._after_end(path)
        else:
            self.unreadable += 1
            self.problems.append(f"{path} cannot be resumed")

    def _after_kill(self, path: Path) -> None:
        run = RunDir(path)
        try:
            for records in (run.read_metrics(), run.read_events(), run.read_samples()):
                assert isinstance(records, list)
            steps = [load_checkpoint(info.path).step for info in list_checkpoints(run.checkpoints)]
        except Exception as error:  # whatever it is, it is counted and told
            self.unreadable += 1
            self.problems.append(f"{path}: {error}")
            return
        done = max((record["step"] for record in run.read_metrics("step")), default=0)
        self.most_lost = max(self.most_lost, done - max(steps, default=0))

    def _after_end(self, path: Path) -> None:
        self.finished += 1
        files = read_manifest(last(path))
        steps = [record["step"] for record in RunDir(path).read_metrics("step")]
        if {k: v.sha256 for k, v in files.items() if "state" not in k} != self.calm or steps != [*range(1, STEPS + 1)]:
            self.wrong_end += 1
            self.problems.append(f"{path} did not end like the undisturbed run")


def save_in_place(folder: Path, snapshot: Snapshot) -> Path:
    """What a checkpoint must not be: visible before it is whole."""
    final = folder / checkpoint_name(snapshot.step)
    final.mkdir(parents=True, exist_ok=True)
    files = {
        MODEL: write_tensors(final / MODEL, snapshot.model),
        OPTIMIZER: write_tensors(final / OPTIMIZER, snapshot.optimizer),
        STATE: write_bytes(final / STATE, json.dumps(snapshot.state).encode()),
    }
    contents = {"format": FORMAT, "files": {name: entry._asdict() for name, entry in files.items()}}
    write_bytes(final / MANIFEST, json.dumps(contents).encode())
    return final


def last(path: Path) -> Path:
    return list_checkpoints(path / "checkpoints")[-1].path


def every_change(folder: Path, config: RunConfig, seen: Inspection, kills: int) -> None:
    """Kill a new run at its first change, another at its second and so on, up to `kills`."""
    for survives in range(kills):
        path = folder / f"change-{survives}"
        outcome = start(path, config, survives, survives)
        seen.after_start(path, outcome)
        if outcome == "killed" and survives % FINISHED == 0:
            seen.after_start(path, start(path, config, 10**9, 0))
        shutil.rmtree(path)
        if outcome == "done":
            return


def at_random(folder: Path, config: RunConfig, seen: Inspection, kills: int, draws: random.Random) -> None:
    """Kill the same run again and again until it is done, then the next one, until there were `kills` in all."""
    number = 0
    while seen.kills < kills:
        path = folder / f"random-{number}"
        outcome = start(path, config, draws.randrange(80), draws.randrange(2**32))
        seen.after_start(path, outcome)
        if outcome != "killed":
            shutil.rmtree(path)
            number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--asynchronous", action="store_true")
    parser.add_argument("--careless", action="store_true", help="write in place, to see that the kills find it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    asynchronous = str(options.asynchronous).lower()
    config = small_config(
        f"checkpoint.every_steps={EVERY}",
        f"checkpoint.asynchronous={asynchronous}",
        f'pretrain.phases=[{{name="a", tokens={64 * STEPS}, weights={{x=1.0}}}}]',
    )
    small_job(options.folder / "warm", config)  # imports what the children need
    hardware.measure_matmul = lambda device, dtype: 1e11
    if options.careless:
        writer.save_checkpoint = save_in_place
    assert start(options.folder / "calm", config, 10**9, 0) == "done"
    seen = Inspection(config, options.folder / "calm")
    every_change(options.folder, config, seen, options.kills // 2)
    at_random(options.folder, config, seen, options.kills, random.Random(options.seed))
    # A save under way takes up to another interval, and the next one waits for it.
    allowed = EVERY if not options.asynchronous else 2 * EVERY
    print(
        json.dumps(
            {
                "kills": seen.kills,
                "unreadable": seen.unreadable,
                "most_steps_lost": seen.most_lost,
                "steps_between_checkpoints": EVERY,
                "runs_finished": seen.finished,
                "runs_with_another_end": seen.wrong_end,
                "problems": seen.problems[:5],
            }
        )
    )
    return 1 if seen.unreadable or seen.wrong_end or seen.most_lost > allowed else 0


if __name__ == "__main__":
    sys.exit(main())
