"""Runs that are killed, signalled and started twice, in real processes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train_helpers import STEPS, numbers, small_config, small_job, weights
from trinity.base.rundir import RunDir
from trinity.train import train
from trinity.train.checkpoint import list_checkpoints, load_checkpoint, verify_checkpoint

HELPERS = Path(__file__).with_name("train_helpers.py")


def start(path: Path, *overrides: str) -> subprocess.Popen[str]:
    """A training process that has come as far as its own work."""
    source = str(HELPERS.parents[1] / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    process = subprocess.Popen(
        [sys.executable, str(HELPERS), str(path), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def wait_for_step(path: Path, step: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if any(record["step"] >= step for record in RunDir(path).read_metrics("step")):
            return
        time.sleep(0.01)
    raise AssertionError(f"no step {step} within a minute")


def kill_until_finished(path: Path, seed: int, most_kills: int) -> int:
    """Kill a run at random moments, then let it finish; returns the number of kills that hit it at work."""
    draws = random.Random(seed)
    kills = 0
    for _ in range(most_kills):
        process = start(path)
        time.sleep(draws.uniform(0.0, 1.2))
        process.kill()
        output, errors = process.communicate()
        assert "the plan is done" in output or process.returncode == -signal.SIGKILL, errors
        kills += process.returncode == -signal.SIGKILL
        whole = [verify_checkpoint(info.path) for info in list_checkpoints(path / "checkpoints")]
        assert all(whole), "what is visible verifies"
        if (path / "metrics.jsonl").exists():
            RunDir(path).read_metrics()
    process = start(path)
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "the plan is done\n"), errors
    return kills


@pytest.mark.parametrize(
    ("seed", "most_kills"),
    [(0, 3), pytest.param(1, 15, marks=pytest.mark.slow), pytest.param(2, 15, marks=pytest.mark.slow)],
)
def test_killed_at_random_moments(tmp_path: Path, seed: int, most_kills: int) -> None:
    whole = small_job(tmp_path / "whole")
    train(whole)
    path = tmp_path / "killed"
    assert kill_until_finished(path, seed, most_kills) > 0
    assert numbers(RunDir(path).read_metrics()) == numbers(whole.run_dir.read_metrics())
    end = load_checkpoint(path / f"checkpoints/step-{STEPS:08d}")
    expected = weights(whole)
    for name, tensor in {**end.model, **{f"optimizer {k}": v for k, v in end.optimizer.items()}}.items():
        assert torch.equal(tensor, expected[name]), name
    assert not list((path / "checkpoints").glob(".*")), "nothing half-written is left"


THOUSAND = (pytest.mark.slow, pytest.mark.timeout(3600))  # minutes, or many on a busy machine


@pytest.mark.parametrize(
    ("kills", "mode"),
    [
        (24, ()),
        pytest.param(1000, (), marks=THOUSAND),
        pytest.param(1000, ("--asynchronous",), marks=THOUSAND),
    ],
)
def test_killed_at_every_change_to_the_disk_and_at_random_ones(
    tmp_path: Path, kills: int, mode: tuple[str, ...]
) -> None:
    """No run directory that cannot be read, at most one interval between checkpoints lost, and the same end."""
    command = [sys.executable, str(HELPERS.with_name("kill_often.py")), str(tmp_path), "--kills", str(kills), *mode]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parents[1] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["kills"] == kills
    assert found["unreadable"] == found["runs_with_another_end"] == 0
    assert found["runs_finished"] > 0


def test_a_commit_before_the_files_are_written_is_found_out(tmp_path: Path) -> None:
    """The kills can tell: with the rename before the writing, as a careless writer would have it, they find damage."""
    command = [sys.executable, str(HELPERS.with_name("kill_often.py")), str(tmp_path), "--kills", "40", "--careless"]
    environment = {**os.environ, "PYTHONPATH": str(HELPERS.parents[1] / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["unreadable"] > 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_after_the_step(tmp_path: Path, number: signal.Signals) -> None:
    process = start(tmp_path, "checkpoint.every_steps=1000")
    wait_for_step(tmp_path, 2)
    process.send_signal(number)
    output, errors = process.communicate(timeout=30)
    assert process.returncode == 3, errors
    stopped = int(output.split("after step ")[1].split(";")[0])
    assert output.startswith(f"stopped by {number.name} after step {stopped}; checkpoint of step {stopped} is saved")
    assert list_checkpoints(tmp_path / "checkpoints")[-1].step == stopped
    [event] = RunDir(tmp_path).read_events("stop")
    assert event["checkpoint"] == stopped
    result = train(small_job(tmp_path, small_config("checkpoint.every_steps=1000")))
    assert result.finished
    assert [r["step"] for r in RunDir(tmp_path).read_metrics("step")] == list(range(1, STEPS + 1))


def test_two_processes_do_not_share_a_directory(tmp_path: Path) -> None:
    process = start(tmp_path)
    wait_for_step(tmp_path, 1)
    with pytest.raises(ValueError, match=f"in use by process {process.pid} on "):
        train(small_job(tmp_path))
    process.kill()
    process.communicate()
    assert train(small_job(tmp_path)).finished, "the lock of a dead process does not count"
