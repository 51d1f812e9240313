"""What a person sees: rate, estimates, narrow terminals, closed pipes, secrets."""

import io
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trinity.base.console import Console, clean, duration, format_table, quantity, redact


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Closed(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_a_log_gets_few_lines_with_an_estimate() -> None:
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, log_interval=10, clock=clock)
    with console.progress("Reading", total=100) as progress:
        for _ in range(100):
            clock.now += 1
            progress.advance()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 11
    assert lines[0].endswith("Reading 10/100  ETA 1m30s")
    assert lines[-1].endswith("Reading 100/100  done in 1m40s")


def test_a_resumed_run_is_estimated_by_its_own_steps() -> None:
    clock = Clock()
    console = Console(io.StringIO(), clock=clock)
    with console.training("pretrain", 1000) as view:
        for step in range(901, 911):
            clock.now += 2
            view.on_step({"step": step, "loss": 2.0})
        assert view._progress.remaining() == pytest.approx(180)


def test_failure_is_not_called_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Console(stream).progress("Reading", total=2):
        raise RuntimeError
    assert stream.getvalue() == ""  # nothing was done, and the error speaks for itself

    def fail_in_the_middle() -> None:
        with Console(stream).progress("Reading", total=2) as progress:
            progress.advance()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_in_the_middle()
    assert "stopped in" in stream.getvalue()


@pytest.mark.parametrize("columns", [40, 120])
@pytest.mark.parametrize("no_color", [False, True])
def test_a_terminal_gets_a_live_line_that_fits(monkeypatch: pytest.MonkeyPatch, columns: int, no_color: bool) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("CI", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    stream = Terminal()
    console = Console(stream)
    assert console.interactive
    with console.training("pretrain", 10) as view:
        view.on_event({"event": "start", "step": 0, "steps": 20})
        record = {"step": 5, "loss": 3.25, "grad_norm": 0.5, "max_vio": 0.2, "tokens_per_second": 6100.0, "mfu": 0.3}
        view.on_step(record)
        view.on_metric({"kind": "eval", "step": 5, "loss": 3.0, "bits_per_byte": 1.5})
    text = stream.getvalue()
    assert "loss 3.250" in text
    assert ("MaxVio" in text) == (columns == 120)
    assert ("\x1b[3" in text) != no_color
    assert "bits per byte 1.5000" in text


def test_the_start_says_the_path_of_each_operation_and_which_optimizer_moves_what() -> None:
    stream = io.StringIO()
    with Console(stream, interactive=False).training("pretrain", 10) as view:
        row = ["layers.*.attn.o.weight", "128x128", "131,072", "Muon", "0.02"]
        view.on_event({"event": "start", "step": 0, "paths": {"experts": "grouped_mm"}, "optimizer": [row]})
        view.on_event({"event": "resume", "step": 5, "paths": {"experts": "grouped_mm"}, "optimizer": [row]})
    text = stream.getvalue()
    assert text.count("experts: grouped_mm") == 2
    assert text.count("layers.*.attn.o.weight") == 1
    assert "Muon" in text


def test_the_death_of_an_expert_is_a_warning() -> None:
    stream = io.StringIO()
    with Console(stream, interactive=False).training("pretrain", 10) as view:
        view.on_event({"event": "dead_expert", "step": 20, "layer": 3, "experts": [5, 17]})
    assert "warning: experts [5, 17] of layer 3 get no tokens" in stream.getvalue()


def test_a_closed_pipe_ends_nothing() -> None:
    console = Console(Closed())
    console.say("one")
    with console.progress("Reading", total=1) as progress:
        progress.advance()
    console.say("two")


def test_a_quiet_console_writes_nothing() -> None:
    stream = Terminal()
    with Console(stream, quiet=True).progress("Reading", total=1) as progress:
        progress.advance()
    assert stream.getvalue() == ""


def test_no_control_character_and_no_secret_reaches_the_terminal() -> None:
    stream = io.StringIO()
    Console(stream).say("a\x1b[2Jb hf_abcdefghijklmnopqrst")
    assert "\x1b" not in stream.getvalue()
    assert "hf_abc" not in stream.getvalue()
    assert redact("pass word12345", {"DB_PASSWORD": "word12345", "HOME": "pass"}) == "pass ***"
    assert clean("tab\there\nline") == "tab\there\nline"


@given(st.floats(0, 1e9))
def test_durations_are_short(seconds: float) -> None:
    assert len(duration(seconds)) <= 9
    assert duration(seconds)[-1] in "smhd"


@given(st.floats(1e-6, 9.9e14))
def test_quantities_keep_their_size(value: float) -> None:
    text = quantity(value)
    unit = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    assert math.isclose(float(text.rstrip("kMBT")) * unit, value, rel_tol=0.006)


@given(st.lists(st.tuples(st.text(max_size=8), st.integers()), max_size=6))
def test_tables_are_aligned(rows: list[tuple[str, int]]) -> None:
    lines = format_table(("name", "count"), rows).split("\n")
    assert len(lines) == len(rows) + 2
    assert all(line == line.rstrip() for line in lines)
