"""Verbs that write training text: data retrieval|join|traces."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.options import ForceOption, InputsArgument, JsonOption, TokenizerOption, check_output, note, print_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trinity.data.traces import Counts


def retrieval(
    tokenizer: TokenizerOption,
    shards: Annotated[Path, typer.Option("--shards", help="Shards whose training texts are haystacks.", metavar="DIR")],
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to write.", metavar="FILE")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a document.")] = 16384,
    documents: Annotated[int, typer.Option(min=1, help="Number of documents.")] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Another seed gives other documents.")] = 0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Setting as key=value, such as retrieval.density='[0.1, 0.3]'.", metavar="KEY=VALUE"
        ),
    ] = None,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write training documents that ask for what they said: facts in real text, questions and answers.

    `data prepare FILE=retrieval` makes shards of them. Nothing in them meets the evaluation.
    """
    if out.exists() and not force:
        raise UserError(f"{out} exists already; --force replaces it")
    check_output(out.parent)
    from trinity.base.console import Console
    from trinity.config import resolve
    from trinity.data.retrieval import LEAST_TOKENS, Hay, RetrievalDocuments, write_documents
    from trinity.data.shards import Shards
    from trinity.tokenizer import Tokenizer

    if tokens < LEAST_TOKENS:
        raise UsageError(f"--tokens {tokens} is too short for a fact and a question: use {LEAST_TOKENS} or more")
    chosen = settings or []
    if wrong := [text for text in chosen if not text.startswith("retrieval.")]:
        raise UsageError(f"--set {wrong[0]} is no setting of retrieval documents: use retrieval.KEY=VALUE")
    config, _ = resolve("demo", overrides=chosen)
    words = Tokenizer.load(tokenizer)
    store = Shards.open(shards / "train")
    if store.tokenizer_fingerprint != words.fingerprint:
        raise UserError(f"{store.directory} was made with another tokenizer than {tokenizer}")
    made = RetrievalDocuments(words, Hay(store, words), config.retrieval, seed)
    with Console().progress("Writing", total=documents, unit="documents") as progress:
        write_documents(out, made, words, documents, tokens, progress.set)
    if as_json:
        print_json({"file": str(out), "documents": documents, "tokens": tokens, "fingerprint": made.fingerprint})
    else:
        print(f"{out}: {documents:,} documents of {tokens:,} tokens, fingerprint {made.fingerprint[:16]}")


def join(
    inputs: InputsArgument,
    out: Annotated[Path, typer.Option("--out", help="File of JSON lines to write.", metavar="FILE")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a joined document at most.")] = 131_072,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", help="Counts the tokens; without it four characters are one.")
    ] = None,
    parts: Annotated[int, typer.Option(min=1, help="Parts of a path that name its folder.")] = 1,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Join the files of each folder into long documents, as a repository reads: in the order of their paths.

    `data prepare FILE=repositories` makes shards of them.
    """
    if out.exists() and not force:
        raise UserError(f"{out} exists already; --force replaces it")
    check_output(out.parent)
    from trinity.data.corpus import read_documents
    from trinity.data.join import join_documents, write_joined
    from trinity.tokenizer import Tokenizer

    counter = None if tokenizer is None else Tokenizer.load(tokenizer)

    def size(text: str) -> int:
        return len(text) // 4 + 1 if counter is None else len(counter.encode(text))

    count = write_joined(out, join_documents(read_documents(inputs), size, tokens, parts))
    if as_json:
        print_json({"file": str(out), "documents": count})
    else:
        print(f"{out}: {count:,} documents")


def traces(
    out: Annotated[Path, typer.Option("--out", help="File of conversations to write (jsonl).", metavar="FILE")],
    sessions: Annotated[
        list[Path] | None,
        typer.Argument(help="Sessions of coding agents (jsonl, .gz, .zst), see docs/sandbox.md.", metavar="FILE"),
    ] = None,
    generate: Annotated[
        int, typer.Option("--generate", min=0, help="Repaired repositories to generate instead, in the sandbox.")
    ] = 0,
    seed: Annotated[int, typer.Option("--seed", help="Of what is generated.")] = 0,
    failed_too: Annotated[bool, typer.Option("--failed-too", help="Keep sessions that did not pass.")] = False,
    observation_chars: Annotated[int, typer.Option(min=100, help="Longest observation; longer ones are cut.")] = 8000,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Turn sessions of coding agents into conversations for SFT, or generate such conversations."""
    if bool(sessions) == bool(generate):
        raise UsageError("name files of sessions, or how many to --generate, not both")
    if out.exists() and not force:
        raise UserError(f"{out} is already there; --force replaces it")
    check_output(out.parent)
    import json

    from trinity.base.files import atomic_write
    from trinity.data.traces import Counts, TraceSettings, convert

    counts = Counts()
    if generate:
        rows = _generated(generate, seed, counts)
    else:
        settings = TraceSettings(only_passed=not failed_too, observation_chars=observation_chars)
        rows = convert(sessions or [], settings, counts)
    with atomic_write(out, "w") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        if not counts.kept:
            raise UserError(f"no session is left to write: {_reasons(counts.left_out)}")
    if as_json:
        print_json({"file": str(out), "conversations": counts.kept, "left_out": counts.left_out})
    else:
        print(f"{out}: {counts.kept:,} conversations")
        if counts.left_out:
            note(f"left out: {_reasons(counts.left_out)}")


def _reasons(left_out: dict[str, int]) -> str:
    return ", ".join(f"{count} ({reason})" for reason, count in left_out.items()) or "the files hold none"


def _generated(number: int, seed: int, counts: "Counts") -> "Iterator[dict[str, Any]]":
    from trinity.base.console import Console
    from trinity.rl.environments.oracle import trace
    from trinity.rl.environments.repository import Repository
    from trinity.rl.sandbox.pool import Sandbox

    with Sandbox() as sandbox, Console().progress("Repairing", total=number, unit="repositories") as progress:
        environment = Repository(sandbox, seed)
        for i in range(number):
            yield trace(environment, i, seed)
            counts.kept += 1
            progress.set(i + 1)
