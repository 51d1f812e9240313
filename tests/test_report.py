"""The report of a run: what it shows, what it leaves out, and that nothing in a run's files can act on the reader."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_run import HOSTILE, event, make_pipeline, make_stage, write_lines
from trinity.base.errors import UserError
from trinity.report import write_report
from trinity.report.charts import stage_charts
from trinity.report.read import read_run
from trinity.report.series import Folded, envelope, kept_steps, smooth

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
BROWSER_SWITCHES = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
    "disable-component-update",
    "disable-sync",
    "enable-logging=stderr",
    "virtual-time-budget=2000",
)
numbers = st.lists(st.one_of(st.floats(-1e6, 1e6), st.just(math.nan)), min_size=1, max_size=300)


def page_data(page: Path) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page.read_text(), re.DOTALL)
    assert found is not None
    return json.loads(found[1])


def test_a_pipeline_gives_one_page_with_every_section(tmp_path: Path) -> None:
    page = write_report(make_pipeline(tmp_path, steps=60))
    text = page.read_text()
    assert page == tmp_path / "report.html"
    assert len(text) < 2_000_000
    assert "No data" not in re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    # A heat map for each task of each evaluation that is shown.
    titles = re.findall(r"<figure class=\"card niah\">.*?<small>(.*?)</small>", text)
    assert titles
    assert {title.split(", ")[1] for title in titles} == {"MK-NIAH", "variable tracking"}
    stages = page_data(page)["stages"]
    assert [s["name"] for s in stages] == ["pretrain", "extend", "sft", "rl"]
    assert [b["name"] for b in stages[0]["bands"]] == ["general", "enriched", "quality"]
    assert {m["kind"] for m in stages[0]["marks"]} == {"skip", "rollback", "checkpoint"}
    assert len(stages[0]["charts"]["bits_per_byte"]["curves"]) == 4
    assert stages[3]["charts"]["reward"]["curves"][0]["lo"]
    assert stages[0]["load"]["experts"] == 8
    assert stages[0]["load"]["first"] == 1


def test_experts_that_died_are_a_warning_at_the_top(tmp_path: Path) -> None:
    calm = write_report(make_stage(tmp_path / "calm", steps=30)).read_text()
    assert "experts died" not in calm
    folder = make_stage(tmp_path / "dying", steps=30)
    with (folder / "events.jsonl").open("a") as file:
        file.writelines(
            json.dumps(event("pretrain", step, "dead_expert", layer=step, experts=experts)) + "\n"
            for step, experts in ((20, [5, 17]), (21, list(range(40))), (22, HOSTILE), (23, []))
        )
    text = write_report(folder).read_text()
    [notice] = re.findall(r'<p class="notice" role="note">(.*?)</p>', text)
    assert notice.startswith("Pretraining: experts died 42 times")
    assert "layer 20, experts 5, 17, step 20" in notice
    assert len(notice) < 400
    assert {m["x"] for m in page_data(folder / "report.html")["stages"][0]["marks"] if m["kind"] == "dead_expert"}


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    text = write_report(make_stage(tmp_path, steps=30)).read_text()
    assert "default-src 'none'" in text
    assert re.findall(r"(?:src|href)=[\"'](?!#|data:)[^\"']+", text) == []
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "").replace('http-equiv="Content', "")


def test_text_of_a_run_cannot_leave_its_place(tmp_path: Path) -> None:
    make_stage(tmp_path, steps=30, text=HOSTILE)
    write_lines(
        tmp_path / "events.jsonl", [{"stage": HOSTILE, "step": 1, "event": HOSTILE, "note": HOSTILE, "time": HOSTILE}]
    )
    (tmp_path / "run.toml").write_text(f"name = {json.dumps(HOSTILE)}\n[model]\nx = {json.dumps(HOSTILE)}\n")
    text = write_report(tmp_path).read_text()
    assert len(re.findall(r"<script", text)) == 2
    assert len(re.findall(r"</script", text)) == 2
    assert "<img" not in text
    assert "&lt;img src=x" in text


def test_secrets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "abcdefgh12345678")
    make_stage(tmp_path, steps=30, text="key abcdefgh12345678 and hf_abcdefghijklmnopqrst")
    text = write_report(tmp_path).read_text()
    assert "abcdefgh12345678" not in text
    assert "hf_abcdefghijklmnopqrst" not in text


def test_a_killed_run_is_reported_as_far_as_it_came(tmp_path: Path) -> None:
    make_stage(tmp_path, steps=40, finished=False)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-25])
    text = write_report(tmp_path).read_text()
    assert "unfinished" in text
    assert "damaged" not in text
    assert page_data(tmp_path / "report.html")["stages"][0]["charts"]["loss"]["curves"][0]["x"][-1] == 39


def test_damaged_lines_are_counted_and_told(tmp_path: Path) -> None:
    make_stage(tmp_path, steps=30)
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([*lines[:5], b"\xff{not json", b"17", *lines[5:]]))
    assert "metrics.jsonl: 2 damaged lines left out" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("keep", ["run.toml", "events.jsonl", "metrics.jsonl"])
def test_missing_files_become_no_data(tmp_path: Path, keep: str) -> None:
    make_stage(tmp_path, steps=30)
    for path in tmp_path.iterdir():
        if path.name != keep:
            path.unlink()
    assert "No data: no text was sampled." in write_report(tmp_path).read_text()


def test_fields_of_the_wrong_kind_break_nothing(tmp_path: Path) -> None:
    odd: list[Any] = [None, "x", [1], {"a": 1}, True, -1, 10**400, []]
    keys = "stage phase step loss load max_vio_layers bits_per_byte domains grid score name value".split()  # noqa: SIM905
    records = [
        {"kind": kind, "stage": "pretrain", "step": i, "loss": 1.0, "grid": [], key: value}
        for kind in ("step", "eval", "niah", "score", "other")
        for key in keys
        for i, value in enumerate(odd)
    ]
    write_lines(tmp_path / "metrics.jsonl", records)
    write_lines(
        tmp_path / "events.jsonl", [{"event": "skip", key: v} for key in ("time", "step", "stage") for v in odd]
    )
    write_lines(tmp_path / "samples.jsonl", [{"prompt": v, "text": v, "step": v} for v in odd])
    (tmp_path / "run.toml").write_text("model = 3\noptim = [1, 2]\n")
    assert write_report(tmp_path).exists()


def test_no_run_is_a_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run directory"):
        write_report(tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        write_report(tmp_path / "missing")


def test_steps_taken_again_count_once(tmp_path: Path) -> None:
    stage = read_run(make_stage(tmp_path, steps=60, rollback=True)).stages[0]
    assert stage.step_N.tolist() == list(range(1, 61))
    assert stage.repeated == 23


def test_expert_loads_survive_the_encoding(tmp_path: Path) -> None:
    import base64

    stage = read_run(make_stage(tmp_path, steps=60)).stages[0]
    load = stage_charts(stage)["load"]
    code = np.frombuffer(base64.b64decode(load["data"]), np.uint8)
    want = np.stack([rows for _, rows in stage.loads]).ravel()
    got = np.where(code == 0, 0, 2.0 ** ((code.astype(float) - 128) / 127 * 3))
    inside = (want > 0.126) & (want < 7.9)
    assert ((want == 0) == (code == 0)).all()
    np.testing.assert_allclose(got[inside], want[inside], rtol=0.01)


def test_a_long_run_stays_small_and_keeps_its_spike(tmp_path: Path) -> None:
    records = [
        {"kind": "step", "stage": "pretrain", "step": i, "loss": 99.0 if i == 12_345 else 2.0, "bias_norm": [0.1] * 54}
        for i in range(1, 30_001)
    ]
    for record in records[::100]:
        record["load"] = [[1.0] * 256] * 54
    write_lines(tmp_path / "metrics.jsonl", records)
    page = write_report(tmp_path)
    curve = page_data(page)["stages"][0]["charts"]["loss"]["curves"][0]
    assert page.stat().st_size < 2_000_000
    assert len(curve["x"]) <= 480
    assert max(curve["hi"]) == 99.0


@given(st.lists(st.integers(0, 30), max_size=60))
def test_kept_steps_rise_and_are_the_last_of_their_step(steps: list[int]) -> None:
    step_N = np.array(steps, dtype=np.int64)
    kept = np.flatnonzero(kept_steps(step_N)).tolist()
    assert kept == [i for i, s in enumerate(steps) if all(later > s for later in steps[i + 1 :])]


@given(numbers, st.integers(1, 50))
def test_an_envelope_keeps_extremes_and_order(values: list[float], points: int) -> None:
    y_N = np.array(values)
    curve = envelope(np.arange(y_N.size, dtype=float), y_N, points)
    finite = y_N[np.isfinite(y_N)]
    if finite.size == 0:
        assert curve is None
        return
    assert curve is not None
    assert len(curve["x"]) <= points
    assert curve["x"] == sorted(set(curve["x"]))
    np.testing.assert_allclose(max(curve.get("hi", curve["y"])), finite.max(), rtol=1e-4)
    np.testing.assert_allclose(min(curve.get("lo", curve["y"])), finite.min(), rtol=1e-4)


@given(st.floats(-1e3, 1e3), st.integers(1, 50), st.floats(1, 30))
def test_smoothing_leaves_a_constant_alone(value: float, count: int, span: float) -> None:
    np.testing.assert_allclose(smooth(np.full(count, value), span), value, rtol=1e-9, atol=1e-300)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=120), st.integers(2, 8))
def test_folding_is_bounded_and_keeps_extremes(steps: list[int], columns: int) -> None:
    rising = sorted(set(steps))
    folded = Folded(columns)
    for step in rising:
        folded.add(step, np.array([step, -step], dtype=np.float64))
    assert len(folded) < 2 * columns
    assert folded.values("max")[:, 0].max() == rising[-1]
    assert folded.values("min")[:, 0].min() == rising[0]
    assert folded.steps.tolist() == sorted(folded.steps.tolist())


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
@pytest.mark.parametrize("hostile", [False, True])
def test_the_page_runs_in_a_browser_without_an_error(tmp_path: Path, hostile: bool) -> None:
    make_pipeline(tmp_path / "run", steps=60, text=HOSTILE if hostile else "calm")
    page = write_report(tmp_path / "run")
    browser = subprocess.run(
        [
            str(CHROMIUM),
            *(f"--{switch}" for switch in BROWSER_SWITCHES),
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "CONSOLE" not in browser.stderr
    assert browser.stdout.count("<path ") > 20
    assert "<title>demo" in browser.stdout
