"""Verbs that train: pretrain, extend, sft, rl. The same command goes on with a run that was stopped."""

import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.options import (
    ForceOption,
    FromOption,
    JsonOption,
    OverlayOption,
    SettingsArgument,
    ShowOption,
    check_output,
    is_main_process,
    note,
    print_json,
    resolve_settings,
    show_settings,
    write_origins,
)

if TYPE_CHECKING:
    from trinity.base.console import TrainingView
    from trinity.config import Origin

OptionalRunDir = Annotated[
    Path | None, typer.Option("--run-dir", help="Directory that the run is kept in.", metavar="DIR")
]
OptionalFrom = Annotated[
    Path | None,
    typer.Option("--from", help="Go on with the weights of a run directory or model directory.", metavar="PATH"),
]
RUN_FILES = ("run.toml", "origins.json", "metrics.jsonl", "events.jsonl", "samples.jsonl", "report.html")
RUN_FOLDERS = ("checkpoints", "model")


def pretrain(
    settings: SettingsArgument = None,
    run_dir: OptionalRunDir = None,
    start_from: OptionalFrom = None,
    overlay: OverlayOption = None,
    show: ShowOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pretrain a model in phases.

    The same command goes on with a run that was stopped.
    """
    _train("pretrain", settings, run_dir, start_from, overlay, show, force, as_json)


def extend(
    start_from: FromOption,
    settings: SettingsArgument = None,
    run_dir: OptionalRunDir = None,
    overlay: OverlayOption = None,
    show: ShowOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Extend the context of a model.

    Settings come from the run behind --from unless a preset is named.
    """
    _train("extend", settings, run_dir, start_from, overlay, show, force, as_json)


def sft(
    start_from: FromOption,
    settings: SettingsArgument = None,
    run_dir: OptionalRunDir = None,
    overlay: OverlayOption = None,
    show: ShowOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune a model on conversations.

    Settings come from the run behind --from unless a preset is named.
    """
    _train("sft", settings, run_dir, start_from, overlay, show, force, as_json)


def rl(
    start_from: FromOption,
    settings: SettingsArgument = None,
    run_dir: OptionalRunDir = None,
    overlay: OverlayOption = None,
    show: ShowOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tune a model on verifiable rewards.

    Settings come from the run behind --from unless a preset is named.
    """
    _train("rl", settings, run_dir, start_from, overlay, show, force, as_json)


def _train(
    stage: str,
    settings: list[str] | None,
    run_dir: Path | None,
    start_from: Path | None,
    overlays: list[Path] | None,
    show: bool,
    force: bool,
    as_json: bool,
) -> None:
    if start_from is not None and not start_from.exists():
        raise UsageError(f"--from {start_from}: there is no such directory")
    config, origins = resolve_settings(settings, overlays, start_from)
    if show:
        show_settings(origins, as_json)
        return
    if run_dir is None:
        raise UsageError("name the directory of the run: --run-dir DIR")
    check_output(run_dir)
    if force and is_main_process():
        start_over(run_dir, start_from)
    from trinity.base.console import Console

    main = is_main_process()
    with Console(quiet=not main).training(stage) as view:
        watch = _Watch(view, run_dir, origins)
        result = _stage_function(stage)(config, run_dir, start_from=start_from, progress=watch)
    outcome = result.train
    if main and as_json:
        model = str(result.model_dir) if result.model_dir else None
        last = outcome.last or {}
        print_json(
            {
                "run_dir": str(run_dir),
                "stage": stage,
                "step": outcome.step,
                "tokens": outcome.tokens,
                "finished": outcome.finished,
                "reason": outcome.reason,
                "loss": last.get("loss"),
                "model": model,
            }
        )
    elif main and outcome.finished:
        print(f"{run_dir}: {outcome.step:,} steps, {outcome.tokens:,} tokens; model in {result.model_dir}")
    if not outcome.finished:
        note(f"{outcome.reason}; the same command goes on from there")
        raise typer.Exit(128 + (signal.SIGINT if "SIGINT" in outcome.reason else signal.SIGTERM))


@dataclass(frozen=True)
class _Watch:
    """The console, and the origins of the settings written once the stage has taken the run directory."""

    view: "TrainingView"
    run_dir: Path
    origins: "dict[str, Origin]"

    def on_step(self, record: dict[str, Any]) -> None:
        self.view.on_step(record)

    def on_metric(self, record: dict[str, Any]) -> None:
        self.view.on_metric(record)

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] in ("start", "resume"):
            write_origins(self.run_dir, self.origins)
        self.view.on_event(record)


def _stage_function(stage: str) -> "Callable[..., Any]":
    from trinity.stages import extend, pretrain, rl, sft

    return {"pretrain": pretrain.run, "extend": extend.run, "sft": sft.run, "rl": rl.run}[stage]


def start_over(run_dir: Path, start_from: Path | None = None) -> None:
    """Remove what a run left in `run_dir`, and nothing else.

    Raises UsageError when `start_from` lies inside it, and UserError when another process is writing the run or when
    the directory is no run's.
    """
    if not run_dir.is_dir():
        return
    if start_from is not None and start_from.resolve().is_relative_to(run_dir.resolve()):
        raise UsageError(f"--force would remove {start_from}, which --from needs: choose another --run-dir")
    ours = [name for name in RUN_FOLDERS if (run_dir / name).exists()]
    if ours and not any((run_dir / name).is_file() for name in RUN_FILES):
        raise UserError(f"{run_dir / ours[0]} is there, but {run_dir} is no run directory: choose another --run-dir")
    from trinity.base.rundir import RunDir

    with RunDir(run_dir).lock():
        for name in RUN_FOLDERS:
            if (run_dir / name).is_dir() and not (run_dir / name).is_symlink():
                shutil.rmtree(run_dir / name)
        for name in RUN_FILES:
            (run_dir / name).unlink(missing_ok=True)
