"""Options that several verbs share, and the little that verbs do with them."""

import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError, UserError

if TYPE_CHECKING:
    from trinity.config import Origin, RunConfig

RunDirOption = Annotated[Path, typer.Option("--run-dir", help="Directory that the run is kept in.", metavar="DIR")]
OverlayOption = Annotated[
    list[Path] | None,
    typer.Option("--overlay", help="TOML file whose settings replace the preset's; may be repeated.", metavar="FILE"),
]
FromOption = Annotated[
    Path, typer.Option("--from", help="Run directory or model directory that the weights come from.", metavar="PATH")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace what is there.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON value to standard output.")]
ShowOption = Annotated[bool, typer.Option("--show", help="Print the settings and where each came from; start nothing.")]
InputsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Files or folders (txt, md, jsonl, parquet, sources), each as PATH or PATH=DOMAIN.", metavar="INPUT..."
    ),
]
TokenizerOption = Annotated[Path, typer.Option("--tokenizer", help="Tokenizer directory.", metavar="DIR")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to write.", metavar="DIR")]
SettingsArgument = Annotated[
    list[str] | None,
    typer.Argument(help="A preset or a TOML file, then any number of key=value.", metavar="PRESET|FILE.toml|key=value"),
]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda or cuda:N; by default a GPU if there is one.")
]
DtypeOption = Annotated[str | None, typer.Option("--dtype", help="float32, bfloat16 or float16; by default as stored.")]


def example(*lines: str) -> str:
    """The end of a verb's help."""
    return "\b\n" + "\n".join(["Example:", *(f"  {line}" for line in lines)])


def print_json(value: Any) -> None:
    """`value` as JSON on standard output."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_rows(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """An aligned table on standard output."""
    from trinity.base.console import format_table

    print(format_table(headers, rows))


def resolve_settings(
    settings: Sequence[str] | None, overlays: Sequence[Path] | None, start_from: Path | None = None
) -> "tuple[RunConfig, dict[str, Origin]]":
    """`PRESET key=value ...` -> settings; without a preset, those of the run that `start_from` is or belongs to.

    Raises UsageError when there is neither.
    """
    from trinity.base.rundir import find_settings
    from trinity.config import list_presets, resolve

    words = list(settings or ())
    if words and "=" not in words[0]:
        return resolve(words[0], overlays or (), words[1:])
    inherited = find_settings(start_from) if start_from is not None else None
    if inherited is None:
        presets = ", ".join(list_presets())
        why = f"{start_from} has no run.toml to take settings from: " if start_from is not None else ""
        raise UsageError(f"{why}name a preset ({presets}) or a .toml file before the key=value settings")
    return resolve(str(inherited), overlays or (), words)


def show_settings(origins: "dict[str, Origin]", as_json: bool) -> None:
    """Every setting with the place that set it."""
    if as_json:
        print_json({key: {"value": _plain(o.value), "origin": o.source} for key, o in origins.items()})
        return
    rows = [(key, o.source, json.dumps(_plain(o.value), ensure_ascii=False)) for key, o in origins.items()]
    print_rows(("setting", "origin", "value"), rows)


def write_origins(run_dir: Path, origins: "dict[str, Origin]") -> None:
    """Keep where each setting came from beside the run's settings, for the report."""
    from trinity.base.files import write_json

    write_json(run_dir / "origins.json", {key: origin.source for key, origin in origins.items()})


def check_output(path: Path) -> None:
    """Refuse a directory that cannot be written, before the work that would be written there. Raises UserError."""
    import os

    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise UserError(f"{path} cannot be a directory: {place} is a file")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{path} cannot be written: no permission in {place}")


def is_main_process() -> bool:
    """Whether this process, of those that torchrun started, speaks and writes."""
    import os

    return os.environ.get("RANK", "0") == "0"


def exit_status(reason: str) -> int:
    """The status of a program that a signal ended: 128 + its number; `reason` names it."""
    return 128 + (signal.SIGINT if "SIGINT" in reason else signal.SIGTERM)


def read_text(text: str) -> str:
    """`text`, or standard input for "-". Raises UserError when that is not UTF-8."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error}") from None


def note(text: str) -> None:
    """A line for the person, on standard error."""
    print(text, file=sys.stderr)


def _plain(value: Any) -> Any:
    """A settings value as JSON would hold it."""
    from pydantic_core import to_jsonable_python

    return to_jsonable_python(value)
