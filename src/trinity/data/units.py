"""The work of `prepare` as pure functions of one unit: they read inputs, write their files, and run anywhere."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from trinity.base.errors import UserError
from trinity.base.files import atomic_write
from trinity.data.filters import HASH_BYTES, REASONS, cuts, hash_text, is_held_out, judge
from trinity.data.readers import DEFAULT_COLUMNS, Columns, Document, Drop, Piece, read_piece
from trinity.data.shard_writer import PartWriter

EXAMPLES = 3
"""Dropped documents whose place a unit remembers, for each reason."""
BATCH_CHARS = 1 << 20
SPLITS = ("train", "val")
CHANGED = "changed while it was being prepared; prepare again with force"


class TokenizerLike(Protocol):
    """What `prepare` needs of a tokenizer; it must pickle, to reach the worker processes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_id(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]: ...


@dataclass(frozen=True)
class Rules:
    """What decides which documents are kept, and where they go."""

    columns: Columns = DEFAULT_COLUMNS
    min_chars: int = 1
    max_chars: int | None = None
    quality: bool = True
    val_fraction: float = 0.005


@dataclass(frozen=True)
class Unit:
    """Consecutive pieces of the inputs."""

    number: int
    pieces: tuple[Piece, ...]


class Tally(NamedTuple):
    """What one finished unit adds to the progress."""

    documents: int
    tokens: int
    bytes: int


@dataclass
class Drops:
    """Dropped documents by reason, with a few examples."""

    counts: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, drop: Drop) -> None:
        self.counts[drop.reason] += 1
        examples = self.examples.setdefault(drop.reason, [])
        if len(examples) < EXAMPLES:
            examples.append(f"{drop.where}: {drop.detail}" if drop.detail else drop.where)

    def merge(self, counts: dict[str, int], examples: dict[str, list[str]]) -> None:
        self.counts.update(counts)
        for reason, some in examples.items():
            mine = self.examples.setdefault(reason, [])
            mine.extend(some[: EXAMPLES - len(mine)])


def scan_path(work: Path, unit: int) -> Path:
    return work / "scan" / f"{unit:06d}.npz"


def index_path(work: Path, split: str, unit: int) -> Path:
    return work / split / f"{unit:06d}.npz"


def scan_unit(unit: Unit, rules: Rules, work: Path) -> Tally:
    """Read a unit, judge its documents and write their hashes and the verdicts to `scan_path`."""
    drops = Drops()
    hashes, verdicts = bytearray(), bytearray()
    total = 0
    for document in _documents(unit, rules, drops):
        content_hash, size = hash_text(document.text)
        reason = judge(document.text, rules.min_chars, rules.max_chars, rules.quality)
        if reason is not None:
            drops.add(Drop(reason, f"{document.source}, {document.id}", ""))
        hashes += content_hash
        verdicts.append(0 if reason is None else 1 + REASONS.index(reason))
        total += size
    about = json.dumps({"counts": drops.counts, "examples": drops.examples}).encode()
    with atomic_write(scan_path(work, unit.number)) as file:
        np.savez(
            file,
            allow_pickle=False,
            hashes=np.frombuffer(bytes(hashes), f"V{HASH_BYTES}"),
            verdicts=np.frombuffer(bytes(verdicts), np.uint8),
            about=np.frombuffer(about, np.uint8),
        )
    return Tally(len(verdicts), 0, total)


def encode_unit(
    unit: Unit, first: int, stop: int, rules: Rules, work: Path, out: Path, tokenizer: TokenizerLike
) -> Tally:
    """Tokenize the kept documents of a unit into `out/SPLIT/tokens-NNNNNN.bin`, committed by both splits' `index_path`.

    The unit's documents are numbers [first, stop) of `work/keep.npy`. Raises UserError when they are not those that
    were scanned.
    """
    kept = np.load(work / "keep.npy", mmap_mode="r")[first:stop]
    with np.load(scan_path(work, unit.number), allow_pickle=False) as scan:
        hashes: np.ndarray = scan["hashes"]
    name = f"tokens-{unit.number:06d}.bin"
    total = 0
    with (
        PartWriter(out / "train", name, index_path(work, "train", unit.number), tokenizer.vocab_size) as train,
        PartWriter(out / "val", name, index_path(work, "val", unit.number), tokenizer.vocab_size) as val,
    ):
        eos = np.array([tokenizer.eos_id])
        for document, last, ids in _encoded(_kept(unit, rules, kept, hashes), tokenizer):
            split = val if is_held_out(document.content_hash, rules.val_fraction) else train
            split.add_tokens(ids)
            if last:
                split.add_tokens(eos)
                split.end_document(*document)
                total += document.num_bytes
        return Tally(train.num_documents + val.num_documents, train.num_tokens + val.num_tokens, total)


class _Label(NamedTuple):
    """A document without its text: the arguments of `PartWriter.end_document`."""

    domain: str
    source: str
    id: str
    content_hash: bytes
    num_bytes: int


def _documents(unit: Unit, rules: Rules, drops: Drops) -> Iterator[Document]:
    for piece in unit.pieces:
        yield from read_piece(piece, rules.columns, drops.add)


def _kept(unit: Unit, rules: Rules, kept: np.ndarray, hashes: np.ndarray) -> Iterator[tuple[str, _Label]]:
    number = -1
    for number, document in enumerate(_documents(unit, rules, Drops())):
        if number >= len(kept):
            break
        if kept[number]:
            content_hash, size = hash_text(document.text)
            if content_hash != hashes[number].tobytes():
                raise UserError(f"{document.source}, {document.id} {CHANGED}")
            yield document.text, _Label(document.domain, document.source, document.id, content_hash, size)
    if number + 1 != len(kept):
        raise UserError(f"{unit.pieces[0].path} or a file after it {CHANGED}")


def _encoded(
    documents: Iterator[tuple[str, _Label]], tokenizer: TokenizerLike
) -> Iterator[tuple[_Label, bool, np.ndarray]]:
    """(label, whether the document ends here, ids): many short texts in one call, long texts in pieces."""
    batch: list[tuple[str, _Label, bool]] = []
    chars = 0

    def flush() -> Iterator[tuple[_Label, bool, np.ndarray]]:
        encoded = tokenizer.encode_batch([text for text, _, _ in batch])
        for (_, label, last), ids in zip(batch, encoded, strict=True):
            yield label, last, np.asarray(ids)
        batch.clear()

    for text, label in documents:
        start = 0
        for stop in cuts(text):
            batch.append((text[start:stop], label, stop == len(text)))
            chars += stop - start
            start = stop
            if chars >= BATCH_CHARS:
                yield from flush()
                chars = 0
    if batch:
        yield from flush()
