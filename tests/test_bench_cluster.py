"""The benchmarks of sharding at toy size on the CPU, and the arithmetic behind the share of communication."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from multi_gpu import PARTS, cases
from sharded_step import length, union

ROOT = Path(__file__).parents[1]


def script(name: str, out: Path, *arguments: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "bench" / f"{name}.py"), "--toy", "--out", str(out), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / f"{name}.json").read_text())


def test_spans_cover_what_they_cover() -> None:
    assert union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert length(union([(0, 2), (1, 3), (10, 11)])) == 4
    assert union([]) == []


@pytest.mark.parametrize(("gpus", "toy"), [(2, True), (4, False), (8, False)])
def test_every_case_has_settings_that_fit(gpus: int, toy: bool) -> None:
    todo = cases(list(PARTS), gpus, toy=toy)
    assert {case.part for case in todo} == set(PARTS)
    assert len({case.name for case in todo}) == len(todo)
    for case in todo:
        if case.part != "correctness":
            assert case.ranks <= gpus
            case.settings()


@pytest.mark.slow
def test_a_layout_is_measured(tmp_path: Path) -> None:
    found = script("multi_gpu", tmp_path, "--gpus", "2", "--parts", "fsdp")
    (case,) = found["cases"].values()
    assert case["ranks"] == 2
    assert case["tokens_per_second_per_gpu"] > 0


@pytest.mark.slow
def test_many_gpus_from_end_to_end(tmp_path: Path) -> None:
    found = script("multi_gpu", tmp_path, "--gpus", "2")
    assert len(found["cases"]) == 6
    assert all(case["passed"] for case in found["cases"].values() if case["part"] == "correctness")


@pytest.mark.slow
def test_the_cost_of_a_world_of_one_is_measured(tmp_path: Path) -> None:
    found = script("cluster", tmp_path, "--parts", "small", "--pairs", "1", "--steps", "2")
    assert len(found["small"]["runs"]["fsdp"]) == 1
    assert found["small"]["cost_percent"] > -100


def test_a_case_that_fails_is_told_and_ends(tmp_path: Path) -> None:
    """A layout that cannot be, of which every rank says why."""
    from multi_gpu import Case, run_case

    case = Case("fsdp", "broken", 2, [{"replicate": 3}], toy=True)
    found = run_case(case, tmp_path / "broken", 60)
    assert "parallel.replicate = 3 does not divide 2 processes" in found["error"]
