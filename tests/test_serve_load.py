"""The load test of the server at a small size, and that its verdict sees what is wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from load_clients import WRONG
from serve_load import quantiles, slope, verdict

SCRIPT = Path(__file__).parents[1] / "bench" / "serve_load.py"
GOOD: dict[str, Any] = {
    "errors": 0,
    "first_errors": [],
    "answers": 10,
    "rss_mib": {"growth_by_trend": 0.5},
    "left_under_way": {"answers_running": 0.0, "cache_bytes": 0.0},
    "greedy_same_afterwards": True,
    "exit_status": 0,
    "log": "",
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"errors": 1, "first_errors": ["status 500"]}, "status 500"),
        ({"answers": 0}, "no answer"),
        ({"rss_mib": {"growth_by_trend": 30.0}}, "memory grew by 30.0"),
        ({"left_under_way": {"answers_running": 1.0}}, "left under way"),
        ({"greedy_same_afterwards": False}, "greedy"),
        ({"exit_status": 1}, "exit status 1"),
        ({"log": "Traceback"}, "Traceback"),
    ],
)
def test_the_verdict_sees_what_is_wrong(change: dict[str, Any], words: str) -> None:
    assert verdict(GOOD) == []
    (said,) = verdict({**GOOD, **change})
    assert words in said


def test_figures() -> None:
    assert quantiles([]) is None
    assert quantiles([i / 1000 for i in range(1, 101)]) == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "max": 100.0}
    line = [{"seconds": float(t), "rss_mib": 100 + 0.5 * t} for t in range(10)]
    assert slope(line, "rss_mib") == pytest.approx(0.5)


@pytest.mark.slow  # a process of its own and ten seconds of load
def test_well_formed_requests_are_answered_whatever_happens_beside_them(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, str(SCRIPT), "--minutes", "0.17", "--out", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    found = json.loads(out.read_text())
    # Ten seconds say nothing about a trend of memory.
    assert [said for said in found["failed"] if not said.startswith("memory")] == [], done.stderr
    assert found["answers"] > 0
    assert found["first_token_ms"]["p99"] > 0
    assert {kind.split(": ")[0] for kind in found["wrong_requests"]} == set(WRONG)
