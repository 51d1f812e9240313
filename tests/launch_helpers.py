"""Starting groups of processes as a user does, with torchrun, and finding a rank among them."""

import os
import subprocess
import sys
import time
from pathlib import Path

from stage_fixtures import tiny_config, write_inputs
from trinity.base.rundir import RunDir
from trinity.config import to_toml

SOURCE = Path(__file__).parents[1] / "src"


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def torchrun(ranks: int, *arguments: str, restarts: int = 0) -> subprocess.Popen[str]:
    """`torchrun -m ARGUMENTS` on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["--max-restarts", str(restarts), "--monitor-interval", "0.1", "-m", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())


def write_run(folder: Path, steps: int, **sections: dict) -> Path:
    """Inputs and a settings file for a pretraining run of `steps` steps of 4 rows of 64 tokens."""
    write_inputs(folder)
    phases = [{"name": "general", "tokens": steps * 256, "weights": {"prose": 0.5, "math": 0.5}}]
    sections["pretrain"] = {"phases": phases, **sections.get("pretrain", {})}
    data = {"streams": 4, "max_epochs": 1000, **sections.pop("data", {})}
    config = tiny_config(folder, data=data, **sections)
    path = folder / "run.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    return path


def wait_for_step(path: Path, step: int, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in RunDir(path).read_metrics("step")):
            return
        time.sleep(0.02)
    raise AssertionError(f"no step {step} within {seconds} s")


def worker(launcher: int, rank: int) -> int:
    """The process id of a rank below `launcher`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if parent == launcher and f"RANK={rank}".encode() in variables:
            return int(entry.name)
    raise AssertionError(f"rank {rank} is not among the children of {launcher}")
