"""Groups of processes under torchrun: a killed rank, a signal, ranks that disagree, a rank that does not come."""

import os
import signal
from pathlib import Path

import pytest

from launch_helpers import torchrun, wait_for_step, worker, write_run
from train_helpers import numbers
from trinity.base.rundir import RunDir
from trinity.config import resolve
from trinity.stages import pretrain

STEPS = 60


def finish(process, seconds: float = 240) -> tuple[str, str]:
    output, errors = process.communicate(timeout=seconds)
    return output, errors


def killed_run(path: Path, settings: Path, ranks: int) -> None:
    """A run of which one rank is killed in the middle, and which ends all the same."""
    process = torchrun(ranks, "trinity", "pretrain", str(settings), "--run-dir", str(path), "--force", restarts=1)
    wait_for_step(path, 10)
    os.kill(worker(process.pid, ranks - 1), signal.SIGKILL)
    output, errors = finish(process)
    assert process.returncode == 0, errors
    assert f"{STEPS} steps" in output
    (resumed,) = RunDir(path).read_events("resume")
    assert int(resumed["checkpoint"][-8:]) >= 8
    assert [r["step"] for r in RunDir(path).read_metrics("step")] == list(range(1, STEPS + 1))


def test_a_run_of_which_a_rank_is_killed_has_the_losses_of_one_process(tmp_path: Path) -> None:
    settings = write_run(tmp_path, STEPS, checkpoint={"every_steps": 4})
    killed_run(tmp_path / "killed", settings, 2)
    pretrain.run(resolve(str(settings))[0], tmp_path / "alone")
    found, expected = (RunDir(tmp_path / name).read_metrics("step") for name in ("killed", "alone"))
    for one, other in zip(found, expected, strict=True):
        # Sums in another order: rounding grows along the run, while a wrong row is off by several per cent at once.
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5 if one["step"] < 4 else 3e-3), one["step"]


@pytest.mark.slow
def test_a_killed_rank_of_four_does_not_change_a_bit(tmp_path: Path) -> None:
    settings = write_run(tmp_path, STEPS, checkpoint={"every_steps": 4})
    killed_run(tmp_path / "killed", settings, 4)
    undisturbed = torchrun(4, "trinity", "pretrain", str(settings), "--run-dir", str(tmp_path / "whole"))
    _, errors = finish(undisturbed)
    assert undisturbed.returncode == 0, errors
    found, expected = (RunDir(tmp_path / name) for name in ("killed", "whole"))
    assert numbers(found.read_metrics("step")) == numbers(expected.read_metrics("step"))
    weights = [(run.model / "model.safetensors").read_bytes() for run in (found, expected)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_and_a_signal_saves_on_all(tmp_path: Path) -> None:
    settings = write_run(tmp_path, 4000, checkpoint={"every_steps": 4})
    path = tmp_path / "run"
    command = ("trinity", "pretrain", str(settings), "runtime.timeout=8", "--run-dir", str(path))
    process = torchrun(2, *command)
    wait_for_step(path, 6)
    stopped = worker(process.pid, 1)
    os.kill(stopped, signal.SIGSTOP)
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("trinity: rank 1 ("))
        assert "did not arrive at step " in line
        assert "within 8 s: last seen at step " in line
    finally:
        os.kill(stopped, signal.SIGCONT)
    finish(process)
    assert process.returncode != 0

    steps = len(RunDir(path).read_metrics("step"))
    process = torchrun(2, *command)
    wait_for_step(path, steps + 2)
    process.send_signal(signal.SIGTERM)
    _, errors = finish(process)
    assert process.returncode != 0
    assert errors.count("is saved; the same command goes on from there") == 1, errors
    (event,) = RunDir(path).read_events("stop")
    assert event["checkpoint"] == event["step"] == RunDir(path).read_metrics("step")[-1]["step"]


@pytest.mark.slow
def test_ranks_with_other_settings_and_mistakes_are_refused_once(tmp_path: Path) -> None:
    settings = write_run(tmp_path, 4, pretrain={"batch": [{"from_tokens": 0, "rows": 3}]})
    process = torchrun(2, "trinity", "pretrain", str(settings), "--run-dir", str(tmp_path / "run"))
    _, errors = finish(process)
    assert process.returncode != 0
    assert errors.count("trinity: ") == 1, errors
    assert "3 rows cannot be shared by 2 data-parallel ranks" in errors
