"""Verbs of the tokenizer: tokenizer train|show."""

from pathlib import Path
from typing import Annotated, Any

import typer

from trinity.base.errors import UserError
from trinity.cli.options import (
    ForceOption,
    InputsArgument,
    JsonOption,
    OutOption,
    check_output,
    note,
    print_json,
    print_rows,
    read_text,
)


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
