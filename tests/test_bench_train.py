"""bench/train.py: the whole call at toy size on the CPU, and what it computes from its measurements."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from trainbench.check import FLOOR, differences, within
from trainbench.device import speed
from trainbench.parts import part_of, summarize
from trainbench.shapes import made_up_rows

BENCH = Path(__file__).parents[1] / "bench"


def test_the_whole_call(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    command = [sys.executable, str(BENCH / "train.py"), "--shape", "toy", "--device", "cpu", "--out", str(out)]
    command += ["--jobs", "check", "launched", "torchtitan", "--check-layers", "2", "--steps", "2", "--repeats", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    jobs = json.loads(out.read_text())["jobs"]
    assert jobs["check"]["passed"], done.stdout + done.stderr
    assert jobs["launched"]["step"]["tokens_per_second"] > 0
    assert len(jobs["launched"]["losses"]) == 4
    assert "--torchtitan" in jobs["torchtitan"]["error"]
    assert done.returncode == 1  # a job that was asked for did not run
    assert "launched" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert again.returncode != 0
    assert "exists already" in again.stderr


def test_a_job_past_its_time_is_ended_and_keeps_what_it_had(tmp_path: Path) -> None:
    out = tmp_path / "toy.json"
    command = [sys.executable, str(BENCH / "train.py"), "--shape", "toy", "--device", "cpu", "--out", str(out)]
    command += ["--jobs", "launched", "--job-seconds", "0.1"]
    subprocess.run(command, capture_output=True, check=False)
    assert "ended after" in json.loads(out.read_text())["jobs"]["launched"]["error"]


def test_differences_find_the_worst_gradient() -> None:
    exact = {"loss": torch.tensor(2.0), "a": torch.ones(4), "b": torch.ones(4)}
    found = {"loss": torch.tensor(2.0), "a": torch.ones(4), "b": torch.tensor([1.0, 1.0, 1.0, 3.0])}
    errors = differences(found, exact)
    assert (errors["worst_name"], errors["worst"]) == ("b", 1.0)
    nothing = {"loss": 0.0, "median": 0.0, "worst": 0.0}
    assert not within(errors, nothing)
    assert within({"loss": FLOOR / 2, "median": FLOOR / 2, "worst": FLOOR / 2}, nothing)
    broken = differences({**found, "b": torch.full((4,), float("nan"))}, exact)
    assert broken["worst_name"] == "b"
    assert not within(broken, {"loss": 1.0, "median": 1.0, "worst": 1.0})


def test_speed_is_that_of_the_median() -> None:
    found = speed([1.0, 2.0, 4.0], tokens=100, flops_per_token=10.0, peak=1000.0)
    assert (found["tokens_per_second"], found["slowest"], found["fastest"], found["mfu"]) == (50, 25, 100, 0.5)


def test_parts_of_a_profile() -> None:
    assert part_of("triton_tem_fused_flex_attention_0") == "attention"
    assert part_of("nvjet_tst_128x256_64x4_2x1_v_bz_TNT") == "matrix products"
    assert part_of("_permute_kernel") == part_of("_add_up") == "routing"
    assert part_of("_accumulate") == "optimizer and accumulation"
    assert part_of("_residual_backward") == "norms"
    assert part_of("_chunk") == "loss"
    found = summarize([("nvjet_x", 3.0, 2), ("_rms_norm_forward", 1.0, 5), ("cudaGraphLaunch", 0.0, 1)], 8.0, most=1)
    assert found["parts"] == {"matrix products": 0.75, "norms": 0.25}
    assert (found["busy"], found["kernel_calls"], len(found["kernels"])) == (0.5, 7, 1)
    assert "profile_error" in summarize([], 1.0, most=1)


def test_made_up_rows_are_whole_documents() -> None:
    rows = made_up_rows(3, 64, 100, seed=1)
    assert np.array_equal(rows.tokens_BT, made_up_rows(3, 64, 100, seed=1).tokens_BT)
    for row in range(3):
        ends = np.flatnonzero(np.diff(rows.segments_BT[row], append=-2))
        assert (rows.targets_BT[row, ends] == -100).all()
        inside = np.setdiff1d(np.arange(63), ends)
        assert (rows.targets_BT[row, inside] == rows.tokens_BT[row, inside + 1]).all()


def test_ways_of_attention_are_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At toy size; FlashAttention needs a GPU, which the result says and the exit status with it."""
    import attention  # a script of bench/

    out = tmp_path / "attention.json"
    sizes = ["--rows", "2", "--seq-len", "96", "--window", "24", "--head-dim", "16", "--repeats", "1"]
    words = ["attention.py", "--out", str(out), "--device", "cpu", *sizes, "--variants", "masked", "flex"]
    monkeypatch.setattr(sys, "argv", words)
    assert attention.main() == 0
    found = json.loads(out.read_text())["kinds"]
    assert max(found["local"]["flex"]["differences"] + found["global"]["flex"]["differences"]) < 1e-5
    monkeypatch.setattr(sys, "argv", [*words, "varlen"])
    assert attention.main() == 1
    assert "error" in json.loads(out.read_text())["kinds"]["local"]["varlen"]
