"""Verbs of text and tokens: tokenizer train|show, data prepare|inspect|verify|overlap|retrieval|join."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trinity.base.errors import UsageError, UserError
from trinity.cli.options import ForceOption, JsonOption, check_output, note, print_json, print_rows, read_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from trinity.data.traces import Counts

InputsArgument = Annotated[
    list[str],
    typer.Argument(
        help="Files or folders (txt, md, jsonl, parquet, sources), each as PATH or PATH=DOMAIN.", metavar="INPUT..."
    ),
]
TokenizerOption = Annotated[Path, typer.Option("--tokenizer", help="Tokenizer directory.", metavar="DIR")]
OutOption = Annotated[Path, typer.Option("--out", help="Directory to write.", metavar="DIR")]
ShardsArgument = Annotated[Path, typer.Argument(help="Directory that `trinity data prepare` wrote.", metavar="DIR")]


def train_tokenizer(
    inputs: InputsArgument,
    out: OutOption,
    vocab_size: Annotated[int, typer.Option(min=256, help="Entries to learn, the 256 bytes included.")] = 200_000,
    sample_bytes: Annotated[int, typer.Option(min=1, help="Bytes of text to learn from at most.")] = 48_000_000_000,
    force: ForceOption = False,
    as_json: JsonOption = False,
) -> None:
    """Learn a byte-level BPE vocabulary from text."""
    if (out / "tokenizer.json").exists() and not force:
        raise UserError(f"{out} already holds a tokenizer; --force replaces it")
    check_output(out)
    from trinity.base.console import Console
    from trinity.config import TokenizerConfig
    from trinity.data.corpus import Input, list_files, read_documents
    from trinity.tokenizer import train_tokenizer as train

    settings = TokenizerConfig(vocab_size=vocab_size, sample_bytes=sample_bytes)
    total = sum(file.text_bytes for file in list_files([Input.parse(text) for text in inputs]).files)
    texts = (document.text for document in read_documents(inputs))
    with Console().progress("Learning the vocabulary", total=min(total, sample_bytes), unit="B") as progress:
        tokenizer = train(texts, settings, progress=progress.set, total_bytes=total)
    tokenizer.save(out)
    if tokenizer.vocab_size < vocab_size:
        note(f"the text gave {tokenizer.vocab_size:,} of {vocab_size:,} entries: no other pair of tokens occurs twice")
    result = {"directory": str(out), "vocab_size": tokenizer.vocab_size, "fingerprint": tokenizer.fingerprint}
    if as_json:
        print_json(result)
    else:
        print(f"{out}: {tokenizer.vocab_size:,} entries, fingerprint {tokenizer.fingerprint[:16]}")


def show_tokenizer(
    directory: Annotated[Path, typer.Argument(help="Tokenizer or model directory.", metavar="DIR")],
    text: Annotated[str | None, typer.Option("--text", help="Text to cut; - reads standard input.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Tell a tokenizer's size and special tokens, and how it cuts a text."""
    from trinity.tokenizer import Tokenizer
    from trinity.tokenizer.report import show_splits

    tokenizer = Tokenizer.load(directory)
    result: dict[str, Any] = {
        "directory": str(directory),
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "fingerprint": tokenizer.fingerprint,
    }
    whole = read_text(text) if text is not None else None
    if whole is not None:
        ids = tokenizer.encode(whole)
        result["tokens"] = [{"id": i, "text": tokenizer.decode([i])} for i in ids]
        result["bytes_per_token"] = round(len(whole.encode()) / max(1, len(ids)), 3)
    if as_json:
        print_json(result)
        return
    tokens = result.pop("tokens", None)
    print_rows(("property", "value"), [(key, str(value)) for key, value in result.items()])
    if whole is not None and tokens is not None:
        print(f"\n{len(tokens):,} tokens: {' '.join(str(token['id']) for token in tokens)}")
        print(show_splits(whole, tokenizer))


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
