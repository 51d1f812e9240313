"""The run directory: records, forgetting, the lock."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trinity.base.errors import UserError
from trinity.base.rundir import RunDir


def test_records_come_back_in_order(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "a" / "b")
    run.create()
    run.append_metric({"kind": "step", "step": 1, "loss": math.nan, "many": [1.0, math.inf], "ü": "ü"})
    run.append_metric({"kind": "eval", "step": 1, "domains": {"x": {"loss": -math.inf}}})
    assert run.read_metrics("step") == [{"kind": "step", "step": 1, "loss": None, "many": [1.0, None], "ü": "ü"}]
    assert run.read_metrics("eval")[0]["domains"] == {"x": {"loss": None}}
    assert run.stage() is None
    run.append_event({"event": "start", "stage": "sft", "step": 0})
    run.append_event({"event": "start", "stage": "sft", "step": 0})
    assert run.stage() == "sft"
    assert [sorted(e) for e in run.read_events("start")] == [["event", "stage", "step", "time"]] * 2


@given(st.lists(st.integers(1, 9), max_size=12).map(sorted), st.integers(0, 10), st.integers(0, 40))
@settings(max_examples=25, deadline=None)
def test_what_comes_after_a_step_is_forgotten(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], last: int, cut: int
) -> None:
    run = RunDir(tmp_path_factory.mktemp("run"))
    for step in steps:
        run.append_metric({"kind": "step", "step": step})
    whole = run.metrics.read_bytes() if steps else b""
    torn = json.dumps({"kind": "step", "step": 99}).encode()[:cut]
    run.metrics.write_bytes(whole + torn)
    run.mend()
    run.forget_after(last)
    kept = [step for step in steps if step <= last]
    assert [r["step"] for r in run.read_metrics()] == kept
    run.append_metric({"kind": "step", "step": last + 1})
    assert [r["step"] for r in run.read_metrics()] == [*kept, last + 1]


def test_a_torn_event_does_not_swallow_the_next(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.append_event({"event": "start", "step": 0})
    with run.events.open("ab") as file:
        file.write(b'{"event":"chec')
    run.mend()
    run.append_event({"event": "resume", "step": 0})
    assert [e["event"] for e in run.read_events()] == ["start", "resume"]


def test_the_lock_is_exclusive_and_given_back(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    with run.lock(), pytest.raises(UserError, match=r"is in use by process \d+ on "), run.lock():
        raise AssertionError("locked twice")
    with run.lock():
        pass


def test_a_file_in_the_way_is_an_error_of_the_user(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot make the run directory"):
        RunDir(tmp_path / "file").create()
