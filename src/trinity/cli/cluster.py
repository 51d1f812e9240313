"""Verbs around machines: doctor."""

from pathlib import Path
from typing import Annotated

import typer

from trinity.base.errors import UsageError
from trinity.cli.options import JsonOption, is_main_process, print_json, print_rows


def doctor(
    path: Annotated[
        Path, typer.Option("--path", help="Where runs are kept; written to, left as it was.", metavar="DIR")
    ] = Path(),
    shared: Annotated[
        Path | None,
        typer.Option("--shared", help="Directory that all machines must share; by default --path.", metavar="DIR"),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="auto, cpu or cuda: what collectives are timed on.")] = "auto",
    min_bandwidth: Annotated[
        float,
        typer.Option("--min-bandwidth", min=0.0, help="GB/s that the largest all-reduce must reach.", metavar="GB/S"),
    ] = 0.0,
    timeout: Annotated[float, typer.Option("--timeout", min=1.0, help="Seconds to wait for a rank.")] = 180.0,
    quick: Annotated[bool, typer.Option("--quick", help="Small sizes only.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, or a group of machines, before a run.

    Started by torchrun it also compares the ranks: software, clocks, storage that is really shared, bandwidth.
    Exit status 1 when something is wrong, with one sentence for each.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device} is not one of auto, cpu, cuda")
    from trinity.doctor import examine
    from trinity.parallel.rendezvous import joined

    with joined(device, timeout=timeout, settings=None):
        place = path if shared is None or path != Path() else shared
        findings = examine(place, shared=shared, device=device, min_bandwidth=min_bandwidth, quick=quick)
    problems = [finding.problem for finding in findings if finding.problem]
    if is_main_process():
        if as_json:
            listed = [{"check": f.name, "value": f.value, "problem": f.problem, **dict(f.numbers)} for f in findings]
            print_json({"ok": not problems, "checks": listed})
        else:
            print_rows(("check", "value", ""), [(f.name, f.value, "" if f.ok else "PROBLEM") for f in findings])
            print("\nfit for a run" if not problems else "")
        for problem in problems:
            typer.echo(f"trinity: {problem}", err=True)
    if problems:
        raise typer.Exit(1)
