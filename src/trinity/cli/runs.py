"""Verbs around runs: demo, eval, report, checkpoints ls|verify."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.options import (
    DeviceOption,
    DtypeOption,
    ForceOption,
    JsonOption,
    OverlayOption,
    RunDirOption,
    ShowOption,
    check_output,
    exit_status,
    note,
    print_json,
    print_rows,
    resolve_settings,
    show_settings,
)

if TYPE_CHECKING:
    from trinity.rl.sandbox.pool import Sandbox

ALL_NEEDLES = 'eval.niah_tasks=["multikey", "single", "multivalue", "multiquery", "tracking"]'
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
    check_output(run_dir)
    from trinity.base.console import Console
    from trinity.pipeline import demo as pipeline
    from trinity.pipeline.path import Interruption

    try:
        summary = pipeline.run(run_dir, config, origins=origins, force=force, console=Console())
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
        list[str] | None,
        typer.Option(
            "--task", help="heldout, positions, niah, arithmetic or arithmetic_chat; may be repeated. By default all."
        ),
    ] = None,
    suite: Annotated[
        str | None,
        typer.Option(
            "--suite", help="niah: needles of every kind. Or benchmarks: trinity-base, trinity-instruct or quick."
        ),
    ] = None,
    transformers: Annotated[
        bool, typer.Option("--transformers", help="With --suite niah: any model directory that transformers loads.")
    ] = False,
    bench: Annotated[
        list[str] | None, typer.Option("--bench", help="One benchmark, such as mmlu; may be repeated.", metavar="NAME")
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Directory of the benchmarks' files.", metavar="DIR")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where the benchmarks' answers are kept; the same call goes on.", metavar="DIR"),
    ] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Questions of each benchmark at most.")] = None,
    skip_missing: Annotated[
        bool, typer.Option("--skip-missing", help="Leave out benchmarks whose files are not there.")
    ] = False,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", help="Ask an OpenAI-compatible server, PATH being its model.", metavar="URL"),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Setting as key=value, such as eval.niah_samples=50.", metavar="KEY=VALUE"),
    ] = None,
    shards: Annotated[
        Path | None,
        typer.Option("--shards", help="Shards of `trinity data prepare`, for held-out loss.", metavar="DIR"),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Evaluate a model.

    Held-out loss by domain and by position (with --shards), retrieval in long contexts (niah) and arithmetic, with the
    settings of the run that the model belongs to; or benchmarks over local files (--suite or --bench, with --data).
    """
    if transformers and suite != "niah":
        raise UsageError("--transformers belongs to --suite niah")
    if suite == "niah":
        if bench or task:
            raise UsageError("--suite niah stands alone: leave out --bench and --task")
        task, settings, suite = ["niah"], [ALL_NEEDLES, *(settings or [])], None
    if suite is not None or bench:
        if task or settings or shards is not None:
            raise UsageError("--suite and --bench stand alone: leave out --task, --set and --shards")
        _benchmarks(path, suite, bench or [], data, out, limit, skip_missing, endpoint, device, dtype, as_json)
        return
    for name, value in (("--data", data), ("--out", out), ("--limit", limit), ("--endpoint", endpoint)):
        if value is not None:
            raise UsageError(f"{name} belongs to benchmarks: name a --suite or a --bench")
    if transformers:
        from trinity.evals.foreign import evaluate_foreign

        found = evaluate_foreign(path, overrides=settings or (), device=device, dtype=dtype, on_note=note)
        _print_scores({"niah": found}, as_json)
        return
    from trinity.evals import evaluate_saved

    results = evaluate_saved(
        path,
        tasks=task or (),
        overrides=settings or (),
        shards=shards,
        device=device,
        dtype=dtype,
        on_note=note,
        on_result=lambda name, _: note(f"{name} is done"),
    )
    _print_scores(results, as_json)


def _print_scores(results: dict[str, dict[str, Any]], as_json: bool) -> None:
    if as_json:
        print_json(results)
    else:
        print_rows(("task", "measure", "value", "standard error", "samples"), _score_rows(results))


def _benchmarks(
    path: Path,
    suite: str | None,
    bench: list[str],
    data: Path | None,
    out: Path | None,
    limit: int | None,
    skip_missing: bool,
    endpoint: str | None,
    device: str | None,
    dtype: str | None,
    as_json: bool,
) -> None:
    import os

    from trinity.evals.benchmarks.run import table
    from trinity.evals.benchmarks.saved import run_saved

    if data is None:
        raise UsageError("name the directory that holds the benchmarks' files, --data DIR")
    if out is None:
        raise UsageError("name a directory for the answers, --out DIR: the same call goes on from there")
    check_output(out)
    outcome = run_saved(
        str(path),
        data,
        out,
        suite=suite,
        tasks=bench,
        limit=limit,
        skip_missing=skip_missing,
        endpoint=endpoint,
        key=os.environ.get("OPENAI_API_KEY", ""),
        device=device,
        dtype=dtype,
        make_runner=_sandbox,
        on_note=note,
    )
    if as_json:
        print_json(outcome)
    else:
        headers = ("benchmark", "metric", "value", "standard error", "samples", "chance", "Trinity Large")
        print_rows(headers, table(outcome))


def _sandbox() -> "Sandbox":
    """What runs programs of code benchmarks; their tests use NumPy."""
    import numpy

    from trinity.rl.sandbox.limits import MIB, Limits
    from trinity.rl.sandbox.pool import Sandbox

    limits = Limits(seconds=60.0, cpu_seconds=60, memory=4096 * MIB)
    packages = [Path(numpy.__file__).parents[1]]
    return Sandbox(limits, packages=packages, preload=["numpy"])


def _score_rows(results: dict[str, dict[str, Any]]) -> list[tuple[object, ...]]:
    """Held-out loss and bits per byte by domain, retrieval by length, and the other scores."""
    rows: list[tuple[object, ...]] = []
    for name, result in results.items():
        if name == "heldout":
            for domain, part in {"all": result, **result["domains"]}.items():
                rows.append((name, f"loss, {domain}", f"{part['loss']:.4f}", f"{part['standard_error']:.4f}", ""))
                rows.append((name, f"bits per byte, {domain}", f"{part['bits_per_byte']:.4f}", "", ""))
            continue
        if name == "positions":
            for domain, part in result["domains"].items():
                for cell in part["positions"]:
                    place = f"bits per byte, {domain}, {cell['from']:,} to {cell['to']:,}"
                    rows.append((name, place, f"{cell['bits_per_byte']:.4f}", "", part["documents"]))
            continue
        score = result["score"] if name == "niah" else result["value"]
        rows.append((name, "share right", f"{score:.3f}", f"{result['standard_error']:.3f}", result["samples"]))
        cells: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for cell in result.get("grid", ()):
            cells.setdefault((cell["task"], cell["length"]), []).append(cell)
        for (kind, length), row in cells.items():
            mean = sum(cell["score"] for cell in row) / len(row)
            place = f"{kind}, at {length:,} tokens"
            rows.append((name, place, f"{mean:.3f}", "", sum(cell["samples"] for cell in row)))
    return rows


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
    """Read every checkpoint of a run: checksums, and that every number is finite."""
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
