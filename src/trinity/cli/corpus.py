"""Verbs of shards and what goes into them: data prepare|inspect|verify|overlap."""

from pathlib import Path
from typing import Annotated

import typer

from trinity.base.errors import UserError
from trinity.cli.options import (
    ForceOption,
    InputsArgument,
    JsonOption,
    OutOption,
    TokenizerOption,
    check_output,
    note,
    print_json,
    print_rows,
)

ShardsArgument = Annotated[Path, typer.Argument(help="Directory that `trinity data prepare` wrote.", metavar="DIR")]


def prepare(
    inputs: InputsArgument,
    tokenizer: TokenizerOption,
    out: OutOption,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes that read and tokenize; by default one for each CPU.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(help="Run them on a Ray cluster: its address, auto, or local for one on this machine alone."),
    ] = None,
    val_fraction: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of the documents that are held out.")
    ] = 0.005,
    text_column: Annotated[str, typer.Option(help="Column of the text in jsonl and parquet.")] = "text",
    domain_column: Annotated[str, typer.Option(help="Column of the domain in jsonl and parquet.")] = "domain",
    min_chars: Annotated[int, typer.Option(min=1, help="Leave out shorter documents.")] = 1,
    max_chars: Annotated[int | None, typer.Option(min=1, help="Leave out longer documents.")] = None,
    quality: Annotated[bool, typer.Option(help="Leave out documents that fail the quality rules.")] = True,
    deduplicate: Annotated[bool, typer.Option(help="Leave out documents whose text was seen before.")] = True,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn documents into shards of tokens, with a held-out split; the same command goes on after a stop."""
    check_output(out)
    from trinity.base.console import Console
    from trinity.data.prepare import Progress
    from trinity.data.prepare import prepare as run
    from trinity.tokenizer import Tokenizer

    with Console().progress("Preparing", total=None, unit="units") as view:

        def on_progress(p: Progress) -> None:
            view.expect(p.units)
            view.set(p.units_done, f"{p.step}: {p.documents:,} documents, {p.tokens:,} tokens")

        made = run(
            inputs,
            Tokenizer.load(tokenizer),
            out,
            workers=workers,
            ray=ray,
            val_fraction=val_fraction,
            text_column=text_column,
            domain_column=domain_column,
            min_chars=min_chars,
            max_chars=max_chars,
            quality=quality,
            deduplicate=deduplicate,
            force=force,
            progress=on_progress,
        )
    if as_json:
        print_json(
            {
                "directory": str(made.directory),
                "fingerprint": made.fingerprint,
                "documents": made.documents,
                "tokens": made.tokens,
                "dropped": made.dropped,
                "passed_over": made.passed_over,
            }
        )
        return
    print_rows(("split", "documents", "tokens"), [(s, n, made.tokens[s]) for s, n in made.documents.items()])
    if made.dropped:
        print()
        print_rows(("left out because of", "documents"), list(made.dropped.items()))
    if made.passed_over:
        note(f"{made.passed_over} files of unknown type were passed over")


def inspect(
    directory: ShardsArgument,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Tokenizer of the shards, to show documents.", metavar="DIR")
    ] = None,
    samples: Annotated[int, typer.Option(min=0, help="Documents to show; needs --tokenizer.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """What shards hold by split: domains, sources, lengths, dropped documents and samples."""
    from trinity.data.inspect import inspect_shards
    from trinity.tokenizer import Tokenizer

    found = inspect_shards(directory, None if tokenizer is None else Tokenizer.load(tokenizer), samples)
    if as_json:
        print_json(found.to_json())
    else:
        print(found.render())


def verify(directory: ShardsArgument, as_json: JsonOption = False) -> None:
    """Read every byte of shards against its checksum."""
    from trinity.data.inspect import verify_shards

    failures = verify_shards(directory)
    if as_json:
        print_json({"directory": str(directory), "failures": failures})
    elif not failures:
        print(f"{directory}: whole")
    if failures:
        more = f" ({len(failures)} failures in all; --json lists them)" if len(failures) > 1 else ""
        raise UserError(f"{failures[0]}{more}")


def overlap(
    inputs: InputsArgument,
    test: Annotated[
        list[Path], typer.Option("--test", help="File of questions (jsonl, plain or gzip); may be repeated.")
    ],
    n: Annotated[int, typer.Option("--n", min=2, help="Words of an n-gram.")] = 13,
    as_json: JsonOption = False,
) -> None:
    """Tell which questions of tests stand in training data, by n-grams of words that both have.

    Inputs are texts as for `prepare`, and files of conversations or worked questions.
    """
    from trinity.evals.contamination import find_overlap

    found = find_overlap(inputs, test, n)
    if as_json:
        print_json(found)
        return
    headers = ("test", "questions", "touched", "share", "covered by half", "too short", "such as")
    rows = []
    for name, part in found.items():
        first = part["examples"][0] if part["examples"] else None
        such = f"{first['id']} in {first['where']}" if first else ""
        share = f"{100 * part['share']:.2f} %"
        rows.append((name, part["questions"], part["touched"], share, part["covered_by_half"], part["too_short"], such))
    print_rows(headers, rows)
