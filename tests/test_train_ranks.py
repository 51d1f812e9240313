"""Two processes, each with half of every batch, train as one does; what goes wrong on one rank ends them all."""

import signal
from pathlib import Path

import pytest
import torch

from test_train_killed import start, wait_for_step
from train_helpers import STEPS, small_config, small_job, weights
from trinity.base.rundir import RunDir
from trinity.train import train
from trinity.train.checkpoint import list_checkpoints, load_checkpoint

RANKS = 2


def start_all(path: Path, store: Path, *overrides: str):
    return [
        start(path, *overrides, "--rank", str(rank), "--ranks", str(RANKS), "--store", str(store))
        for rank in range(RANKS)
    ]


@pytest.mark.slow
def test_quantile_balancing_sums_its_histograms_over_ranks(tmp_path: Path) -> None:
    """A bias that comes from one rank's half of the batch would be another one from the first step on."""
    alone = small_job(tmp_path / "alone", small_config("balance.kind=quantile"))
    train(alone)
    for process in start_all(tmp_path / "together", tmp_path / "store", "balance.kind=quantile"):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    records = RunDir(tmp_path / "together").read_metrics("step")
    for found, expected in zip(records[:3], alone.run_dir.read_metrics("step"), strict=False):
        for name in ("bias_min", "bias_max", "bias_norm"):
            assert found[name] == pytest.approx(expected[name], abs=5e-4), name
        assert min(found["bias_max"]) > 1e-3


@pytest.mark.slow
def test_two_ranks_train_as_one_and_resume_as_one(tmp_path: Path) -> None:
    alone = small_job(tmp_path / "alone")
    train(alone)
    path = tmp_path / "together"
    processes = start_all(path, tmp_path / "store-0")
    wait_for_step(path, 6)
    processes[1].send_signal(signal.SIGTERM)  # either rank may be the one that is told
    for process in processes:
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 3, errors
        assert output.startswith("stopped by "), errors
    stopped = list_checkpoints(path / "checkpoints")[-1].step
    assert 6 <= stopped < STEPS
    for process in start_all(path, tmp_path / "store-1"):
        output, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
    records = RunDir(path).read_metrics("step")
    assert [r["step"] for r in records] == list(range(1, STEPS + 1))
    for found, expected in zip(records, alone.run_dir.read_metrics("step"), strict=True):
        assert found["max_vio_layers"] == pytest.approx(expected["max_vio_layers"], abs=0.1)
        for name in ("loss", "ce", "z_loss", "sequence_loss", "grad_norm"):
            assert found[name] == pytest.approx(expected[name], rel=2e-3), name
    first = [r["loss"] for r in records[:3]]
    assert first == pytest.approx([r["loss"] for r in alone.run_dir.read_metrics("step")[:3]], rel=1e-5)
    end = load_checkpoint(path / f"checkpoints/step-{STEPS:08d}").model
    for name, tensor in weights(alone).items():
        if name in end and name.endswith("weight"):
            torch.testing.assert_close(end[name], tensor, rtol=0.05, atol=2e-3)


@pytest.mark.slow
def test_every_rank_is_told_of_an_error(tmp_path: Path) -> None:
    train(small_job(tmp_path / "run"))
    for process in start_all(tmp_path / "run", tmp_path / "store", "optim.muon_lr=0.5"):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert "optim.muon_lr was 0.02, now 0.5" in errors
