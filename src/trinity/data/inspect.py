"""What is in a shard directory: counts, lengths, sources, samples, damage."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from trinity.base.errors import UserError
from trinity.data.shards import MANIFEST, Shards

MOST_SOURCES = 20
BAR_CHARS = 40
SAMPLE_TOKENS = 64


class Decoder(Protocol):
    """The part of a tokenizer that samples need."""

    @property
    def fingerprint(self) -> str: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@dataclass(frozen=True)
class Group:
    """Totals of one domain or source."""

    name: str
    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Sample:
    """The beginning of one document."""

    doc: int
    domain: str
    source: str
    id: str
    length: int
    text: str


@dataclass(frozen=True)
class SplitInspection:
    """One shard directory."""

    directory: str
    fingerprint: str
    tokenizer_fingerprint: str
    documents: int
    tokens: int
    bytes: int
    files: int
    domains: list[Group]
    sources: list[Group]
    """The largest by tokens, at most MOST_SOURCES of `num_sources`."""
    num_sources: int
    histogram: list[tuple[int, int, int]]
    """(least length, documents, tokens) for lengths in [least, 2 * least), least a power of two."""
    longest: int
    dropped: dict[str, int]
    """Documents that `prepare` dropped, by reason, of both splits together."""
    samples: list[Sample]


@dataclass(frozen=True)
class Inspection:
    """Every shard directory found."""

    splits: list[SplitInspection]

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(asdict(self)))

    def render(self) -> str:
        """As text for a terminal of 100 columns or more."""
        return "\n\n".join(_render(split) for split in self.splits)


def inspect_shards(directory: Path | str, tokenizer: Decoder | None = None, samples: int = 3) -> Inspection:
    """Look at one shard directory, or at both splits in one that `prepare` wrote.

    Samples, evenly over the documents, need the tokenizer. Raises UserError for another tokenizer than that of the
    shards, and for damage in what it reads.
    """
    return Inspection([_inspect(Shards.open(path), tokenizer, samples) for path in split_directories(directory)])


def verify_shards(directory: Path | str) -> list[str]:
    """Check every byte of one shard directory or of both splits; one sentence for each failure, none if all is well."""
    failures: list[str] = []
    for path in split_directories(directory):
        try:
            failures.extend(Shards.open(path).failures())
        except UserError as error:  # not even its manifest and sizes hold; the other split may still be judged
            failures.append(str(error))
    return failures


def split_directories(directory: Path | str) -> list[Path]:
    """The shard directory itself, or its `train` and `val`."""
    root = Path(directory)
    splits = [root / name for name in ("train", "val")]
    # Both where either is: a split that is gone is damage.
    return [root] if (root / MANIFEST).exists() or not any(split.is_dir() for split in splits) else splits


def _inspect(shards: Shards, tokenizer: Decoder | None, samples: int) -> SplitInspection:
    if tokenizer is not None and tokenizer.fingerprint != shards.tokenizer_fingerprint:
        raise UserError(
            f"{shards.directory} was made with the tokenizer {shards.tokenizer_fingerprint:.12}, "
            f"not with {tokenizer.fingerprint:.12}"
        )
    manifest = shards.manifest
    lengths = shards.lengths
    tokens_by_source = np.zeros(len(shards.sources), np.int64)
    bytes_by_source = np.zeros(len(shards.sources), np.int64)
    np.add.at(tokens_by_source, shards.source_ids, lengths)
    np.add.at(bytes_by_source, shards.source_ids, shards.num_bytes)
    documents_by_source = np.bincount(shards.source_ids, minlength=len(shards.sources))
    largest = np.argsort(-tokens_by_source, kind="stable")[:MOST_SOURCES].tolist()
    return SplitInspection(
        directory=str(shards.directory),
        fingerprint=shards.fingerprint,
        tokenizer_fingerprint=shards.tokenizer_fingerprint,
        documents=shards.num_documents,
        tokens=shards.num_tokens,
        bytes=manifest["num_bytes"],
        files=len(manifest["tokens"]),
        domains=[Group(**domain) for domain in manifest["domains"]],
        sources=[
            Group(shards.sources[i], int(documents_by_source[i]), int(tokens_by_source[i]), int(bytes_by_source[i]))
            for i in largest
        ],
        num_sources=manifest["num_sources"],
        histogram=_histogram(lengths),
        longest=int(lengths.max(initial=0)),
        dropped=manifest.get("prepared", {}).get("dropped", {}),
        samples=[] if tokenizer is None else _samples(shards, tokenizer, samples),
    )


def _histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    if lengths.size == 0:
        return []
    powers = np.frexp(lengths)[1] - 1  # floor(log2), exact below 2^53
    documents = np.bincount(powers)
    tokens = np.zeros(documents.size, np.int64)
    np.add.at(tokens, powers, lengths)
    first = int(powers.min())
    return [(1 << power, int(documents[power]), int(tokens[power])) for power in range(first, documents.size)]


def _samples(shards: Shards, tokenizer: Decoder, samples: int) -> list[Sample]:
    found = []
    for number in range(min(samples, shards.num_documents)):
        doc = number * shards.num_documents // min(samples, shards.num_documents)
        about = shards.describe(doc)
        text = tokenizer.decode(shards.tokens(doc, 0, min(SAMPLE_TOKENS, about["length"])).tolist())
        found.append(Sample(doc, about["domain"], about["source"], about["id"], about["length"], text))
    return found


def _render(split: SplitInspection) -> str:
    lines = [
        split.directory,
        f"  {split.documents:,} documents, {split.tokens:,} tokens, {split.bytes:,} bytes of text, {split.files} files",
        f"  fingerprint {split.fingerprint:.16}, tokenizer {split.tokenizer_fingerprint:.16}",
    ]
    for title, groups in (("domain", split.domains), (f"source (of {split.num_sources:,})", split.sources)):
        lines += ["", f"  {title:<40.40} {'documents':>13} {'tokens':>17} {'share':>7} {'bytes/token':>12}"]
        for group in groups:
            share, ratio = group.tokens / max(1, split.tokens), group.bytes / max(1, group.tokens)
            counts = f"{group.documents:>13,} {group.tokens:>17,} {share:>7.1%} {ratio:>12.2f}"
            lines.append(f"  {group.name:<40.40} {counts}")
    lines += ["", f"  {'length in tokens':<26} {'documents':>13} {'tokens':>17}  share of tokens"]
    for least, documents, tokens in split.histogram:
        bar = "#" * round(BAR_CHARS * tokens / max(1, split.tokens))
        lines.append(f"  {f'{least:,} to {2 * least - 1:,}':<26} {documents:>13,} {tokens:>17,}  {bar}".rstrip())
    lines.append(f"  the longest has {split.longest:,}")
    if split.dropped:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in split.dropped.items())
        lines += ["", f"  dropped, of both splits: {dropped}"]
    for sample in split.samples:
        text = sample.text.replace("\n", "\\n")
        lines += [
            "",
            f"  document {sample.doc:,} ({sample.domain}; {sample.source}, {sample.id}; {sample.length:,} tokens)",
        ]
        lines.append(f"    {text}")
    return "\n".join(lines)
