"""Runs that are killed at chosen changes to the disk, a thousand of them in a few minutes.

    python tests/kill_often.py FOLDER --kills 1000 [--asynchronous] [--seed 0]

One process imports everything once and forks a child for each start of a run; the child kills itself (a real SIGKILL)
at its n-th change to the disk: opening for writing, writing, flushing, renaming, making and removing files and folders,
appending a record. A write or an append that is hit leaves a part of its bytes behind. An undisturbed run tells how
many changes there are. One part of the kills goes through them in turn, each kill in a run of its own: all of them, or,
where `--kills` is too small to leave as many for the other part, every second, third ... one. The rest is drawn at
random over all changes of a whole run and hits the same run again and again until it is done. After every kill the
parent reads the whole run directory. Prints one JSON object, which also says at which steps and kinds of change the
kills fell; exit status 1 when something was lost.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import threading
from collections import Counter
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
APPEND = "append"
NEVER = 10**9
"""A number of changes that no run reaches."""
FINISHED = 8
"""Of the runs that are killed once, each of this many is then brought to its end."""


class Board:
    """Memory that a child shares with its parent, and that outlives it: changes to the disk so far, and the last."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 64)

    def write(self, changes: int, kind: str) -> None:
        self._memory[:] = struct.pack("q56s", changes, kind.encode())

    def read(self) -> tuple[int, str]:
        changes, kind = struct.unpack("q56s", self._memory[:])
        return changes, kind.rstrip(b"\0").decode()


class Fault:
    """Stands before every change to the disk that this process makes and kills it at number `survives` + 1."""

    def __init__(self, survives: int, draws: random.Random, board: Board) -> None:
        self.survives, self.draws, self.board, self.lock = survives, draws, board, threading.Lock()
        self.changes = 0
        board.write(0, "")

    def install(self) -> None:
        for name in CHANGES:
            setattr(os, name, self._before(name, getattr(os, name)))
        append = rundir.append_jsonl

        def append_part(path: Path, record: dict[str, Any]) -> None:
            def part() -> None:
                line = json.dumps(record).encode()
                with path.open("ab") as file:
                    file.write(line[: self.draws.randrange(len(line) + 1)])

            self.count(APPEND, part)
            append(path, record)

        rundir.append_jsonl = append_part

    def _before(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            if name == "write":
                handle, data = args
                self.count(name, lambda: real(handle, data[: self.draws.randrange(len(data) + 1)]))
            elif name != "open" or args[1] & (os.O_WRONLY | os.O_RDWR):
                self.count(name, lambda: None)
            return real(*args, **kwargs)

        return change

    def count(self, kind: str, part: Callable[[], Any]) -> None:
        with self.lock:
            self.changes += 1
            self.board.write(self.changes, kind)
            if self.changes > self.survives:
                part()
                os.kill(os.getpid(), signal.SIGKILL)


def start(
    path: Path, config: RunConfig, board: Board, survives: int = NEVER, seed: int = 0
) -> Literal["killed", "done", "failed"]:
    """Start or resume the run in a child, which tells the board about its changes to the disk."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            Fault(survives, random.Random(seed), board).install()
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

    def __init__(self, calm: Path, board: Board) -> None:
        self.board, self.calm = board, {k: v.sha256 for k, v in read_manifest(last(calm)).items() if "state" not in k}
        self.kills = self.unreadable = self.most_lost = self.finished = self.wrong_end = 0
        self.problems: list[str] = []
        self.kinds, self.at_steps = Counter[str](), Counter[int]()

    def after_start(self, path: Path, outcome: Literal["killed", "done", "failed"]) -> None:
        if outcome == "killed":
            self.kills += 1
            self.kinds[self.board.read()[1]] += 1
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
        self.at_steps[done] += 1
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


def in_turn(folder: Path, config: RunConfig, seen: Inspection, changes: range) -> None:
    """Kill a new run after each of these numbers of changes."""
    for survives in changes:
        path = folder / f"change-{survives}"
        outcome = start(path, config, seen.board, survives, survives)
        seen.after_start(path, outcome)
        if outcome == "killed" and survives // changes.step % FINISHED == 0:
            seen.after_start(path, start(path, config, seen.board))
        shutil.rmtree(path)


def at_random(
    folder: Path, config: RunConfig, seen: Inspection, kills: int, changes: int, draws: random.Random
) -> None:
    """Kill the same run again and again until it is done, then the next one, until there were `kills` in all.

    Each kill falls on one of the `changes` changes of an undisturbed run, all equally likely; one that lies beyond what
    is left of a resumed run lets it end.
    """
    number = 0
    while seen.kills < kills:
        path = folder / f"random-{number}"
        outcome = start(path, config, seen.board, draws.randrange(changes), draws.randrange(2**32))
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
    board = Board()
    assert start(options.folder / "calm", config, board) == "done"
    changes, _ = board.read()
    seen = Inspection(options.folder / "calm", board)
    chosen = range(0, changes, -(-changes // (options.kills // 2)))
    in_turn(options.folder, config, seen, chosen)
    first = seen.kills
    at_random(options.folder, config, seen, options.kills, changes, random.Random(options.seed))
    # A save under way takes up to another interval, and the next one waits for it.
    allowed = EVERY if not options.asynchronous else 2 * EVERY
    print(
        json.dumps(
            {
                "kills": seen.kills,
                "changes_of_an_undisturbed_run": changes,
                "kills_in_turn": first,
                "one_of_so_many_changes": chosen.step,
                "kills_at_random": seen.kills - first,
                "unreadable": seen.unreadable,
                "most_steps_lost": seen.most_lost,
                "steps_between_checkpoints": EVERY,
                "runs_finished": seen.finished,
                "runs_with_another_end": seen.wrong_end,
                "kills_by_steps_recorded": {str(step): seen.at_steps[step] for step in sorted(seen.at_steps)},
                "kills_by_kind_of_change": dict(sorted(seen.kinds.items())),
                "problems": seen.problems[:5],
            }
        )
    )
    return 1 if seen.unreadable or seen.wrong_end or seen.most_lost > allowed else 0


if __name__ == "__main__":
    sys.exit(main())
