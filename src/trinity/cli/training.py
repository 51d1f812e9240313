"""Verbs that train: pretrain, extend, sft, rl. The same command goes on with a run that was stopped."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError
from trinity.cli.options import (
    ForceOption,
    FromOption,
    JsonOption,
    OverlayOption,
    SettingsArgument,
    ShowOption,
    check_output,
    exit_status,
    is_main_process,
    note,
    print_json,
    resolve_settings,
    show_settings,
    write_origins,
)
from trinity.cli.replace import Replaced, set_aside

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


def _later(stage: str, what: str) -> "Callable[..., None]":
    """The verb of a stage that starts from a model."""

    def verb(
        start_from: FromOption,
        settings: SettingsArgument = None,
        run_dir: OptionalRunDir = None,
        overlay: OverlayOption = None,
        show: ShowOption = False,
        force: ForceOption = False,
        as_json: JsonOption = False,
    ) -> None:
        _train(stage, settings, run_dir, start_from, overlay, show, force, as_json)

    verb.__doc__ = f"{what}\n\nSettings come from the run behind --from unless a preset is named."
    return verb


extend = _later("extend", "Extend the context of a model.")
sft = _later("sft", "Tune a model on conversations.")
rl = _later("rl", "Tune a model on verifiable rewards.")


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
    from trinity.parallel.rendezvous import attempt, joined

    # A group that was started again goes on with the run that its first start began.
    main, anew = is_main_process(), force and attempt() == 0
    same = {**config.model_dump(mode="json"), "stage": stage, "--run-dir": run_dir, "--from": start_from}
    with joined(config.runtime.device, timeout=config.runtime.timeout, settings=same):
        replaced = set_aside(run_dir, start_from) if anew and main else None
        from trinity.base.console import Console

        with Console(quiet=not main).training(stage) as view:
            watch = _Watch(view, run_dir, origins, replaced)
            try:
                result = _stage_function(stage)(config, run_dir, start_from=start_from, progress=watch)
            except BaseException:
                if replaced is not None:
                    replaced.restore()
                raise
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
        model = f"model in {result.model_dir}" if result.model_dir else "nothing was saved"
        print(f"{run_dir}: {outcome.step:,} steps, {outcome.tokens:,} tokens; {model}")
    if not outcome.finished:
        if main:
            note(f"{outcome.reason}; the same command goes on from there")
        raise typer.Exit(exit_status(outcome.reason))


@dataclass(frozen=True)
class _Watch:
    """The console; once the stage has taken the run directory the origins of the settings are written, and what
    `--force` set aside is removed."""

    view: "TrainingView"
    run_dir: Path
    origins: "dict[str, Origin]"
    replaced: Replaced | None

    def on_step(self, record: dict[str, Any]) -> None:
        self.view.on_step(record)

    def on_metric(self, record: dict[str, Any]) -> None:
        self.view.on_metric(record)

    def on_event(self, record: dict[str, Any]) -> None:
        if record["event"] in ("start", "resume"):
            write_origins(self.run_dir, self.origins)
            if self.replaced is not None:
                self.replaced.remove()
        self.view.on_event(record)


def _stage_function(stage: str) -> "Callable[..., Any]":
    from trinity.stages import extend, pretrain, rl, sft

    return {"pretrain": pretrain.run, "extend": extend.run, "sft": sft.run, "rl": rl.run}[stage]
