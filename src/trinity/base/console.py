"""What a person sees while the program works: a live line on a terminal, plain timestamped lines in a log.

Everything goes to standard error, so that standard output holds results only. `rich` is imported when the first live
line is drawn. A closed pipe silences the console; it never ends the work. Values that look like secrets are masked.
"""

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress

LOG_INTERVAL = 10.0
"""Seconds between two lines of the same progress in a log."""
NARROW = 72
"""Columns under which the live line shows fewer fields."""

_SECRET_NAME = re.compile(r"(TOKEN|SECRET|PASSWORD|PASSWD|API_?KEY|ACCESS_?KEY|CREDENTIAL)", re.IGNORECASE)
_SECRET_FORM = re.compile(
    r"\b(hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{16,}|AKIA[A-Z0-9]{16})\b"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def redact(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with the values of secret-looking environment variables, and strings formed like access keys, masked."""
    for name, value in (os.environ if environment is None else environment).items():
        if len(value) >= 8 and _SECRET_NAME.search(name) and value in text:
            text = text.replace(value, "***")
    return _SECRET_FORM.sub("***", text)


def clean(text: str) -> str:
    """`text` without control characters, so that what a file holds cannot steer the terminal; line breaks stay."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def duration(seconds: float) -> str:
    """Two units of time at most: `8s`, `3m10s`, `2h05m`, `4d06h`."""
    whole = max(0, round(seconds))
    for unit, size, small, small_size in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // small_size:02d}{small}"
    return f"{whole}s"


def quantity(value: float) -> str:
    """Three significant digits with a decimal unit: `812`, `4.10k`, `1.23M`, `7.00T`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}" if abs(value) >= 100 * size else f"{value / size:.2f}{unit}"
    return f"{value:g}" if float(value).is_integer() else f"{value:.3g}"


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Aligned columns with two blanks between them; numbers to the right. No line ends in a blank."""
    cells = [[clean(str(cell)).replace("\n", " ") for cell in row] for row in rows]
    numeric = [bool(rows) and all(isinstance(row[i], int | float) for row in rows) for i in range(len(headers))]
    widths = [max(len(text) for text in column) for column in zip(headers, *cells, strict=True)]

    def line(texts: Sequence[str]) -> str:
        aligned = (t.rjust(w) if right else t.ljust(w) for t, w, right in zip(texts, widths, numeric, strict=True))
        return "  ".join(aligned).rstrip()

    return "\n".join([line(headers), line(["-" * width for width in widths]), *(line(row) for row in cells)])


class Console:
    """Writes progress and messages to one stream (standard error by default); a quiet one writes nothing."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        interactive: bool | None = None,
        quiet: bool = False,
        log_interval: float = LOG_INTERVAL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stream = sys.stderr if stream is None else stream
        self.interactive = (_is_terminal(self.stream) if interactive is None else interactive) and not quiet
        self.log_interval = log_interval
        self.clock = clock
        self._closed = quiet
        self._live: RichProgress | None = None

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return shutil.get_terminal_size().columns

    def say(self, text: str) -> None:
        """One message: above the live line on a terminal, a timestamped line in a log."""
        text = redact(clean(text))
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            self._write(text if self.interactive else f"{time.strftime('%H:%M:%S')}  {text}")

    @contextmanager
    def progress(self, title: str, total: float | None = None, unit: str = "") -> "Iterator[Progress]":
        """`with console.progress("Tokenising", total=num_bytes, unit="B") as p: p.advance(n)`."""
        with Progress(self, title, total, unit) as progress:
            yield progress

    @contextmanager
    def training(self, stage: str, total_steps: int | None = None) -> "Iterator[TrainingView]":
        """The view of one training stage: hand its `on_step` and `on_event` to the loop."""
        with self.progress(stage, total_steps, "steps") as progress:
            yield TrainingView(self, progress)

    def _write(self, line: str) -> None:
        if self._closed:
            return
        try:
            self.stream.write(line + "\n")
            self.stream.flush()
        except BrokenPipeError:  # the reader went away (`| head`); the work goes on
            self._closed = True


class Progress:
    """A task with a title, how much is done and an estimate of the time left; made by `Console.progress`."""

    def __init__(self, console: Console, title: str, total: float | None, unit: str) -> None:
        self.console, self.title, self.total, self.unit = console, title, total, unit
        self.done = 0.0
        self.detail = ""
        self._start = self._printed = console.clock()
        self._counted_from = 0.0
        self._task: Any = None
        self._owns_live = False

    def __enter__(self) -> Self:
        self._start = self._printed = self.console.clock()
        if not self.console.interactive:
            return self
        if self.console._live is None:
            self.console._live = _live_progress(self.console)
            self.console._live.start()
            self._owns_live = True
        self._task = self.console._live.add_task(self.title, total=self.total, detail="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        live = self.console._live
        if live is not None and self._task is not None:
            live.update(self._task, completed=self.done, detail=self.detail, refresh=True)
            if self._owns_live:
                live.stop()
                self.console._live = None
        elif not self.console.interactive and (kind is None or self.done):
            ending = "done" if kind is None else "stopped"
            self._line(f"{ending} in {duration(self.console.clock() - self._start)}")

    def advance(self, amount: float = 1, detail: str | None = None) -> None:
        """Count `amount` more as done; `detail` replaces the text at the end of the line."""
        self.set(self.done + amount, detail)

    def set(self, done: float, detail: str | None = None) -> None:
        """Set how much is done; the first call may start above zero (a resumed run), which counts for no time."""
        if self.done == 0 and done > 1 and self.total is not None and self.unit == "steps":
            self._counted_from = done - 1
        self.done = done
        if detail is not None:
            self.detail = clean(detail)
        if self._task is not None and self.console._live is not None:
            self.console._live.update(self._task, completed=done, detail=self.detail)
        elif not self.console.interactive and self.console.clock() - self._printed >= self.console.log_interval:
            self._printed = self.console.clock()
            self._line(self._estimate())

    def expect(self, total: float) -> None:
        """Set the total once it is known."""
        self.total = total
        if self._task is not None and self.console._live is not None:
            self.console._live.update(self._task, total=total)

    def remaining(self) -> float | None:
        """Seconds left at the average speed so far, None while unknown."""
        counted = self.done - self._counted_from
        if self.total is None or counted <= 0:
            return None
        return (self.console.clock() - self._start) * max(0.0, self.total - self.done) / counted

    def _estimate(self) -> str:
        left = self.remaining()
        return "" if left is None else f"ETA {duration(left)}"

    def _line(self, ending: str) -> None:
        unit = f" {self.unit}" if self.unit else ""
        amount = quantity(self.done) + (f"/{quantity(self.total)}" if self.total is not None else "") + unit
        self.console.say("  ".join(part for part in (f"{self.title} {amount}", self.detail, ending) if part))


class TrainingView:
    """Watches a training loop: a step moves the live line, events and evaluations are said."""

    def __init__(self, console: Console, progress: Progress) -> None:
        self._console, self._progress = console, progress

    def on_step(self, record: dict[str, Any]) -> None:
        """Take a `step` record of metrics.jsonl."""
        self._progress.set(record["step"], self._detail(record))

    def on_metric(self, record: dict[str, Any]) -> None:
        """Take a record of an evaluation: `eval`, `niah` or `score`."""
        names = {"loss": "held-out loss", "bits_per_byte": "bits per byte", "score": "MK-NIAH"}
        if record.get("kind") == "score":
            names = {"value": str(record.get("name", "score"))}
        shown = [
            f"{label} {record[key]:.4f}" for key, label in names.items() if isinstance(record.get(key), int | float)
        ]
        if shown:
            self._console.say("  ".join([f"step {record.get('step', 0)}", *shown]))

    def on_event(self, record: dict[str, Any]) -> None:
        """Take a record of events.jsonl; the start of a stage tells how many steps it has."""
        if isinstance(record.get("steps"), int):
            self._progress.expect(record["steps"])
        rest = {k: v for k, v in record.items() if k not in ("time", "stage", "step", "event")}
        shown = "  ".join(f"{key} {value}" for key, value in rest.items() if isinstance(value, str | int | float))
        self._console.say(f"step {record.get('step', 0)}  {record['event']}  {shown}".rstrip()[:400])
        if record["event"] == "dead_expert":
            self._console.say(f"warning: experts {record.get('experts')} of layer {record.get('layer')} get no tokens")
        if isinstance(record.get("paths"), dict):
            self._console.say("paths: " + "; ".join(f"{name}: {path}" for name, path in record["paths"].items()))
        if record["event"] == "start" and record.get("optimizer"):
            table = format_table(("parameters", "shape", "count", "optimizer", "learning rate"), record["optimizer"])
            self._console.say(f"which optimizer moves what:\n{table}")

    def _detail(self, record: dict[str, Any]) -> str:
        narrow = self._console.interactive and self._console.width < NARROW
        fields = [("loss", "loss", "{:.3f}"), ("reward", "reward", "{:.3f}")]
        if not narrow:
            fields += [("grad_norm", "norm", "{:.2f}"), ("max_vio", "MaxVio", "{:.2f}"), ("mfu", "MFU", "{:.1%}")]
        parts = [f"{label} {form.format(record[key])}" for key, label, form in fields if record.get(key) is not None]
        if not narrow and record.get("tokens_per_second") is not None:
            parts.append(f"{quantity(record['tokens_per_second'])} tok/s")
        return "  ".join(parts)


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def _live_progress(console: Console) -> "RichProgress":
    from rich.console import Console as RichConsole
    from rich.progress import BarColumn, Progress, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.table import Column

    columns: list[ProgressColumn] = [TextColumn("{task.description}", markup=False)]
    if console.width >= NARROW:
        columns.append(BarColumn(bar_width=24))
    columns += [
        TaskProgressColumn(),
        TextColumn(
            "{task.fields[detail]}", markup=False, table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
        ),
        TimeRemainingColumn(compact=True),
    ]
    rich_console = RichConsole(file=console.stream)  # honours NO_COLOR
    return Progress(*columns, console=rich_console, refresh_per_second=4, expand=True)
