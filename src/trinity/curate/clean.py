"""The first pass over a block of documents: read, normalise, filter, hash."""

import re
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from trinity.config.curate import CurateConfig, FilterConfig
from trinity.curate.blocks import block_path, write_block
from trinity.curate.language import NONE, identify
from trinity.curate.minhash import Hasher
from trinity.curate.shift import BINS, add_words
from trinity.curate.tally import Tallies, Tally
from trinity.data.filters import hash_text, is_held_out, judge
from trinity.data.readers import Columns, Document, Drop, Piece, read_piece

_LINE_ENDS = re.compile(r"\r\n?|[\u0085\u2028\u2029]")
_INVISIBLE = re.compile(r"[\u200b\u2060\ufeff\u00ad\x00-\x08\x0b\x0e-\x1f\x7f]")
_BLANKS_AT_END = re.compile(r"[ \t\u00a0]+(?=\n|$)")
_EMPTY_LINES = re.compile(r"\n{3,}")
_WORD = re.compile(r"\S+")
SAMPLE_CHARS = 1 << 16
"""Of a long text that the quality rules look at."""


@dataclass(frozen=True)
class Block:
    """One unit of work."""

    number: int
    pieces: tuple[Piece, ...]


def clean_block(block: Block, config: CurateConfig, folder: Path) -> dict[str, Any]:
    """Read, normalise, filter and hash the documents of a block; commits `folder/NUMBER.parquet`."""
    import pyarrow

    read, normalise, keep = Tally(), Tally(), Tally()
    rows: list[tuple[Document, str, bytes, int]] = []
    signatures: list[bytes] = []
    hasher = Hasher(config.duplicates) if config.has("deduplicate") and config.duplicates.near else None
    words = np.zeros(BINS, np.int64)
    start = time.perf_counter()

    def bad(drop: Drop) -> None:
        read.taken += 1
        read.drop(drop.reason, f"{drop.where}: {drop.detail}")

    columns = Columns(config.input.text_column, config.input.domain_column)
    for piece in block.pieces:
        for document in read_piece(piece, columns, bad):
            read.taken += 1
            where = f"{document.source}/{document.id}"
            content = hash_text(document.text)[0]
            if is_held_out(content, config.input.val_fraction):
                read.drop("held out", where)
                continue
            if not is_taken(content, config.input.share):
                read.drop("not sampled", where)
                continue
            read.given += 1
            tokens = count_tokens(document.text, config.tokenizer)
            read.tokens_out += tokens
            read.tokens_in += tokens
            seconds = time.perf_counter()
            if config.has("normalise"):
                normalise.taken += 1
                normalise.tokens_in += tokens
                document = document._replace(text=normalised(document.text))
                if not document.text:
                    normalise.drop("empty", where)
                    continue
                normalise.given += 1
                tokens = count_tokens(document.text, config.tokenizer)
                normalise.tokens_out += tokens
                normalise.seconds += time.perf_counter() - seconds
            seconds = time.perf_counter()
            language = NONE
            if config.has("filter"):
                keep.taken += 1
                keep.tokens_in += tokens
                language, reason = verdict(document.text, config.filter)
                keep.seconds += time.perf_counter() - seconds
                if reason is not None:
                    keep.drop(reason, where)
                    continue
                keep.given += 1
                keep.tokens_out += tokens
            add_words(words, document.text)
            rows.append((document, language, hash_text(document.text)[0], tokens))
            if hasher is not None:
                signatures.append(hasher.signature(document.text).tobytes())
    read.seconds = time.perf_counter() - start - normalise.seconds - keep.seconds
    tallies: Tallies = {"read": read}
    if config.has("normalise"):
        tallies["normalise"] = normalise
    if config.has("filter"):
        tallies["filter"] = keep
    about = {
        "tallies": {name: tally.as_json() for name, tally in tallies.items()},
        "words": {str(i): int(words[i]) for i in np.flatnonzero(words)},
    }
    text = pyarrow.string()
    table: dict[str, tuple[Any, list[Any]]] = {
        "text": (pyarrow.large_string(), [document.text for document, *_ in rows]),
        "domain": (text, [document.domain for document, *_ in rows]),
        "source": (text, [document.source for document, *_ in rows]),
        "id": (text, [document.id for document, *_ in rows]),
        "language": (text, [language for _, language, *_ in rows]),
        "hash": (pyarrow.binary(16), [content for *_, content, _ in rows]),
        "tokens": (pyarrow.int64(), [tokens for *_, tokens in rows]),
    }
    if hasher is not None:
        table["signature"] = (pyarrow.binary(4 * config.duplicates.permutations), signatures)
    write_block(block_path(folder, block.number), table, about)
    return {"documents": read.taken}


def is_taken(content_hash: bytes, share: float) -> bool:
    """Whether a document is in the sample, by its content; independent of what `data prepare` holds out."""
    return int.from_bytes(content_hash[:8], "big") < share * 2**64


def normalised(text: str) -> str:
    """NFC, one kind of line end, no invisible characters, no blanks at line ends, one empty line at most."""
    text = unicodedata.normalize("NFC", text)
    text = _INVISIBLE.sub("", _LINE_ENDS.sub("\n", text))
    return _EMPTY_LINES.sub("\n\n", _BLANKS_AT_END.sub("", text)).strip()


def verdict(text: str, settings: FilterConfig) -> tuple[str, str | None]:
    """(language, reason to drop the text or None). The rules follow Gopher's (Rae et al. 2021, appendix A)."""
    reason = judge(text, settings.min_chars, settings.max_chars, quality=True)
    if reason is not None:
        return NONE, reason
    language, _ = identify(text, settings.min_language_probability)
    if settings.languages and language not in settings.languages:
        return language, f"language {language}" if language != NONE else "no clear language"
    return language, _quality(text[:SAMPLE_CHARS], settings)


def _quality(text: str, settings: FilterConfig) -> str | None:
    symbols = sum(unicodedata.category(c)[0] in "PSC" for c in text if not c.isspace())
    if symbols > settings.max_symbol_share * len(text):
        return "symbols"
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    seen: set[str] = set()
    repeated = 0
    for line in lines:
        repeated += len(line) if line in seen else 0
        seen.add(line)
    if repeated > settings.max_repeated_lines * len(text):
        return "repeated lines"
    words = _WORD.findall(text)
    if len(words) * 30 < len(text):  # a script without blanks: the rules on words say nothing
        return None
    mean = sum(map(len, words)) / len(words)
    if not settings.min_mean_word <= mean <= settings.max_mean_word:
        return "word length"
    if len(words) >= 30:
        runs = Counter(zip(words, words[1:], words[2:], strict=False))
        if 3 * runs.most_common(1)[0][1] > settings.max_top_ngram * len(words):
            return "one sequence of words over and over"
    return None


BYTES_PER_TOKEN = 4


def count_tokens(text: str, tokenizer: str | None) -> int:
    """With the tokenizer of a directory; without one, a quarter of the bytes."""
    if tokenizer is None:
        return -(-len(text.encode("utf-8", "replace")) // BYTES_PER_TOKEN)
    return len(_tokenizer(tokenizer).encode(text))


@cache
def _tokenizer(directory: str) -> Any:
    from trinity.tokenizer import Tokenizer

    return Tokenizer.load(Path(directory))
