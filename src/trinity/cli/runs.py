"""Verbs around runs: demo, eval, report, checkpoints ls|verify."""

from pathlib import Path
from typing import Annotated

import typer

from trinity.base.errors import UserError
from trinity.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OverlayOption,
    RunDirOption,
    ShowOption,
    exit_status,
    note,
    print_json,
    print_rows,
    resolve_settings,
    show_settings,
)

RunArgument = Annotated[Path, typer.Argument(help="Run directory or pipeline directory.", metavar="RUN")]


def demo(
    settings: Annotated[
        list[str] | None, typer.Argument(help="Settings to change in the demo preset.", metavar="key=value")
    ] = None,
    run_dir: RunDirOption = Path("demo"),
    overlay: OverlayOption = None,
    show: ShowOption = False,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """The whole path on this machine, in a few minutes.

    Tokenizer, data, all stages, evaluation and report.
    """
    config, origins = resolve_settings(["demo", *(settings or [])], overlay)
    if show:
        show_settings(origins, as_json)
        return
    from trinity.base.console import Console
    from trinity.pipeline import demo as pipeline
    from trinity.pipeline.path import Interruption

    try:
        summary = pipeline.run(run_dir, config, force=force, console=Console())
    except Interruption as stop:
        note(f"{stop}; the same command goes on from there")
        raise typer.Exit(exit_status(str(stop))) from None
    if as_json:
        print_json(summary)
    else:
        print(pipeline.render(summary))


def evaluate(
    path: Annotated[Path, typer.Argument(help="Model directory, run directory or checkpoint.", metavar="PATH")],
    task: Annotated[
        list[str] | None, typer.Option("--task", help="niah, arithmetic or a task's name; may be repeated.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting as key=value, such as eval.niah_samples=50.", metavar="KEY=VALUE"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model.

    Retrieval in long contexts (niah), arithmetic and other tasks.
    """
    from trinity import evals

    records = evals.run(path, tasks=task or None, overrides=settings or [], device=device, dtype=dtype)
    if as_json:
        print_json(records)
        return
    rows = [
        (
            r.get("name", r.get("kind")),
            r.get("value", r.get("score")),
            r.get("standard_error", ""),
            r.get("samples", ""),
        )
        for r in records
    ]
    print_rows(("task", "score", "standard error", "samples"), rows)


def report(run: RunArgument, as_json: JsonOption = False) -> None:
    """Write RUN/report.html, one page in one file.

    It shows everything that the run recorded, whether it is finished, running or was killed.
    """
    from trinity.report import write_report

    path = write_report(run)
    if as_json:
        print_json({"report": str(path), "bytes": path.stat().st_size})
    else:
        print(path)


def list_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """List the checkpoints of a run."""
    folders = _checkpoint_folders(run)
    from trinity.base.console import quantity
    from trinity.train.checkpoint import list_checkpoints as find

    found = [c for folder in folders for c in find(folder)]
    if as_json:
        print_json([{"path": str(c.path), "step": c.step, "bytes": c.bytes, "complete": c.complete} for c in found])
        return
    rows = [(c.step, f"{quantity(c.bytes)}B", "whole" if c.complete else "incomplete", str(c.path)) for c in found]
    print_rows(("step", "size", "state", "path"), rows)


def verify_checkpoints(run: RunArgument, as_json: JsonOption = False) -> None:
    """Read every checkpoint of a run against its checksums."""
    folders = _checkpoint_folders(run)
    from trinity.train.checkpoint import list_checkpoints as find
    from trinity.train.checkpoint import verify_checkpoint

    results: dict[str, str] = {}
    for folder in folders:
        for checkpoint in find(folder):
            try:
                verify_checkpoint(checkpoint.path)
                results[str(checkpoint.path)] = "whole"
            except UserError as error:
                results[str(checkpoint.path)] = str(error)
    if as_json:
        print_json(results)
    else:
        print_rows(("checkpoint", "state"), list(results.items()))
    damaged = [path for path, state in results.items() if state != "whole"]
    if damaged:
        raise UserError(f"{len(damaged)} of {len(results)} checkpoints are damaged, such as {damaged[0]}")


def _checkpoint_folders(run: Path) -> list[Path]:
    """`checkpoints` of a run directory, or of each stage of a pipeline directory."""
    if not run.is_dir():
        raise UserError(f"there is no run directory {run}")
    stages = [run / stage for stage in ("pretrain", "extend", "sft", "rl")]
    folders = [folder / "checkpoints" for folder in (run, *stages) if (folder / "checkpoints").is_dir()]
    if not folders:
        raise UserError(f"{run} has no checkpoints")
    return folders
