"""The command line: exit statuses, messages, help, and what verbs hand to the rooms."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from fake_run import make_pipeline, make_stage
from trinity.base.errors import UserError
from trinity.cli import main, training
from trinity.cli.replace import set_aside

VERBS = (
    """
demo, tokenizer train, tokenizer show, data prepare, data inspect, data verify, pretrain, extend, sft, rl, eval,
generate, chat, serve, export, import, report, checkpoints ls, checkpoints verify
""".strip()
    .replace("\n", " ")
    .split(", ")
)


def run_process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "trinity", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_help_has_an_example_that_names_the_verb(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert f"Example:\n    trinity {verb}" in text


def test_help_imports_no_room() -> None:
    code = (
        "import sys; from trinity.cli import main; assert main(['--help']) == 0; "
        "print([m for m in ('torch', 'pydantic', 'rich', 'numpy', 'jinja2') if m in sys.modules], file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stderr.strip() == "[]"
    assert "Usage: trinity" in found.stdout


def test_help_costs_little() -> None:
    def processor_seconds() -> float:  # not wall time: other processes must not fail this test
        before = os.times()
        assert run_process("--help").returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    assert min(processor_seconds() for _ in range(4)) < 0.3


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["pretrian"], 2, "Did you mean 'pretrain'"),
        (["data", "inspct"], 2, "Did you mean 'inspect'"),
        (["report", "x", "--jsn"], 2, "--json"),
        (["report"], 2, "missing argument"),
        (["extend", "demo"], 2, "--from"),
        (["pretrain", "demo"], 2, "--run-dir"),
        (["pretrain", "dmo", "--show"], 2, "did you mean 'demo'"),
        (["pretrain", "demo", "optim.moun_lr=1", "--show"], 2, "did you mean 'muon_lr'"),
        (["pretrain", "demo", "pretrain.seq_len=abc", "--show"], 2, "pretrain.seq_len"),
        (["pretrain", "pretrain.seq_len=256", "--show"], 2, "name a preset"),
        (["pretrain", "demo", "--show", "--overlay", "missing.toml"], 2, "missing.toml"),
        (["report", "missing"], 1, "no run directory missing"),
        (["checkpoints", "ls", "missing"], 1, "no run directory missing"),
    ],
)
def test_mistakes_get_one_paragraph(
    arguments: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == status
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("trinity: ")
    assert output.err.count("\n") == 1
    assert message in output.err


def test_debug_shows_where(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError):
        main(["report", "missing", "--debug"])
    with pytest.raises(UserError):
        main(["--debug", "report", "missing"])
    assert "Traceback" in run_process("report", "missing", "--debug").stderr
    assert "Traceback" not in run_process("report", "missing").stderr


def test_an_unforeseen_error_fails_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("the key is hf_abcdefghijklmnopqrst")

    monkeypatch.setattr("trinity.report.write_report", fail)
    assert main(["report", "x"]) == 1
    error = capsys.readouterr().err
    assert "RuntimeError" in error
    assert "--debug" in error
    assert "hf_abc" not in error


def test_an_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("trinity.report.write_report", interrupt)
    assert main(["report", "x"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_termination_is_143_and_undoes_what_is_half_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    undone: list[bool] = []

    def wait(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        finally:
            undone.append(True)

    monkeypatch.setattr("trinity.report.write_report", wait)
    assert main(["report", "x"]) == 143
    assert capsys.readouterr().err == "trinity: terminated\n"
    assert undone
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_reader_that_goes_away_leaves_no_message() -> None:
    verb = f"{sys.executable} -m trinity pretrain large --show --json"
    shell = subprocess.run(["bash", "-c", f"{verb} | head -c 1"], capture_output=True, text=True, check=True)
    assert shell.stdout == "{"
    assert shell.stderr == ""


def test_show_tells_values_and_origins(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    overlay = tmp_path / "more.toml"
    overlay.write_text("[optim]\nadamw_lr = 0.5\n")
    arguments = ["pretrain", "demo", "optim.muon_lr=0.25", "--overlay", str(overlay), "--show"]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["optim.muon_lr"] == {"value": 0.25, "origin": "command line"}
    assert shown["optim.adamw_lr"] == {"value": 0.5, "origin": f"overlay {overlay}"}
    assert shown["model.dim"]["origin"] == "preset demo"
    assert shown["optim.clip_norm"]["origin"] == "default"
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    column = lines[0].index("value")
    assert all(line[column - 1] == " " for line in lines)


def test_report_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_pipeline(tmp_path, steps=24)
    assert main(["report", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["bytes"] == Path(told["report"]).stat().st_size


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Training replaced by a record of what it was given."""
    calls: list[dict[str, Any]] = []

    def function(stage: str) -> Any:
        def run(config: Any, run_dir: Path, *, start_from: Path | None, progress: Any) -> Any:
            calls.append({"stage": stage, "config": config, "run_dir": run_dir, "start_from": start_from})
            run_dir.mkdir(exist_ok=True)
            progress.on_event({"event": "start", "stage": stage, "step": 0, "steps": 5})
            reason = f"stopped by {os.environ['STOP']} after step 3" if "STOP" in os.environ else "all steps done"
            done = "STOP" not in os.environ
            outcome = SimpleNamespace(step=3, tokens=30, finished=done, reason=reason, last={"loss": 2})
            return SimpleNamespace(train=outcome, model_dir=run_dir / "model")

        return run

    monkeypatch.setattr(training, "_stage_function", function)
    return calls


def test_training_verbs_hand_over_settings_and_keep_origins(
    stages: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["pretrain", "demo", "optim.muon_lr=0.5", "--run-dir", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["finished"] is True
    assert stages[0]["config"].optim.muon_lr == 0.5
    assert json.loads((run / "origins.json").read_text())["optim.muon_lr"] == "command line"


def test_later_stages_take_the_settings_of_the_run_they_come_from(stages: list[dict[str, Any]], tmp_path: Path) -> None:
    from trinity.config import resolve, to_toml

    source = tmp_path / "first"
    (source / "model").mkdir(parents=True)
    (source / "run.toml").write_text(to_toml(resolve("demo", (), ["name=mine"])[0]))
    for place in (source, source / "model"):
        assert main(["sft", "--from", str(place), "sft.epochs=7", "--run-dir", str(tmp_path / "second")]) == 0
        assert (stages[-1]["config"].name, stages[-1]["config"].sft.epochs) == ("mine", 7)
        assert stages[-1]["start_from"] == place


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_stopped_stage_says_how_to_go_on(
    stages: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    status: int,
) -> None:
    monkeypatch.setenv("STOP", name)
    assert main(["pretrain", "demo", "--run-dir", str(tmp_path / "run")]) == status
    assert "the same command goes on" in capsys.readouterr().err


def test_force_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    run = make_stage(tmp_path / "run", steps=20)
    (run / "notes.txt").write_text("mine")
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_text("keep")
    (run / "model").symlink_to(outside)
    replaced = set_aside(run)
    assert replaced is not None
    replaced.remove()
    assert sorted(p.name for p in run.iterdir() if p.name != ".lock") == ["model", "notes.txt"]
    assert (outside / "keep").exists()
    with pytest.raises(UserError, match="--from"):
        set_aside(run, run / "model-of-old")


def test_what_force_set_aside_comes_back(tmp_path: Path) -> None:
    run = make_stage(tmp_path / "run", steps=20)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    before = sorted(str(p) for p in run.rglob("*") if p.name != ".lock")
    replaced = set_aside(run)
    assert replaced is not None
    assert not (run / "run.toml").exists()
    (run / "run.toml").write_text("of a run that could not begin")
    (run / "checkpoints").mkdir()
    replaced.restore()
    assert sorted(str(p) for p in run.rglob("*") if p.name != ".lock") == before
    assert "could not begin" not in (run / "run.toml").read_text()
    assert set_aside(run) is not None
    assert set_aside(run) is not None  # the first start was killed: its old run is found again


def test_force_leaves_a_directory_that_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    with pytest.raises(UserError, match="no run directory"):
        set_aside(tmp_path)
    assert (tmp_path / "model" / "mine").exists()
