"""Writing shards: parts that are made independently of each other, and the directory assembled from them."""

import hashlib
import json
from array import array
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np

from trinity.base.errors import UserError
from trinity.base.files import atomic_write, write_json
from trinity.data.blocks import BlockWriter, CheckedFile, FileRecord, record_of, write_blocks
from trinity.data.filters import HASH_BYTES
from trinity.data.shards import (
    COLUMNS,
    FORMAT,
    MANIFEST,
    STRIDE,
    VERSION,
    content_fingerprint,
    manifest_checksum,
    token_dtype,
)

MAX_DOMAINS = 1 << 16


class PartWriter:
    """Writes the token file `directory/tokens_name` (only if there is a document) and its part of the index; a context.

    The part is committed by the index file, which is renamed into place last.
    """

    def __init__(self, directory: Path, tokens_name: str, index_path: Path, vocab_size: int) -> None:
        self.num_tokens = 0
        self._directory = directory
        self._tokens_name = tokens_name
        self._index_path = index_path
        self._vocab_size = vocab_size
        self._dtype = token_dtype(vocab_size)
        self._stack = ExitStack()
        self._file: BlockWriter | None = None
        self._document_tokens = 0
        self._domains: dict[str, int] = {}
        self._sources: dict[str, int] = {}
        self._integers = {name: array("q") for name in ("lengths", "num_bytes", "domain_ids", "source_ids", "id_ends")}
        self._hashes = bytearray()
        self._ids = bytearray()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
        if error is None:
            assert self._document_tokens == 0, "tokens after the last end_document"
            self._write_index()

    @property
    def num_documents(self) -> int:
        return len(self._integers["lengths"])

    def add_tokens(self, ids: np.ndarray) -> None:
        """Append tokens to the current document."""
        if self._file is None:
            self._file = self._stack.enter_context(write_blocks(self._directory / self._tokens_name))
        assert ids.size == 0 or (int(ids.min()) >= 0 and int(ids.max()) < self._vocab_size), (
            "token outside the vocabulary"
        )
        self._file.write(np.ascontiguousarray(ids, dtype=self._dtype))
        self._document_tokens += ids.size

    def end_document(self, domain: str, source: str, id: str, content_hash: bytes, num_bytes: int) -> None:
        assert len(content_hash) == HASH_BYTES
        assert self._document_tokens > 0, "a document has at least its eos"
        self._ids += id.encode()
        self._hashes += content_hash
        values = {
            "lengths": self._document_tokens,
            "num_bytes": num_bytes,
            "domain_ids": self._domains.setdefault(domain, len(self._domains)),
            "source_ids": self._sources.setdefault(source, len(self._sources)),
            "id_ends": len(self._ids),
        }
        for name, value in values.items():
            self._integers[name].append(value)
        self.num_tokens += self._document_tokens
        self._document_tokens = 0

    def _write_index(self) -> None:
        record = None if self._file is None else record_of(self._directory / self._tokens_name, self._directory)
        about = {"domains": list(self._domains), "sources": list(self._sources), "record": record}
        members: dict[str, np.ndarray] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "hashes": np.frombuffer(bytes(self._hashes), COLUMNS["hashes"]),
            "ids": np.frombuffer(bytes(self._ids), np.uint8),
        }
        members |= {name: np.frombuffer(values, np.int64) for name, values in self._integers.items()}
        with atomic_write(self._index_path) as file:
            np.savez(file, allow_pickle=False, **members)


def assemble(
    directory: Path,
    indexes: Sequence[Path],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eos_id: int,
    extra: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Join the committed parts of a shard directory, given by their index files in order; returns the manifest.

    The index is written column by column, so that memory does not grow with the number of parts, and the manifest last.
    `extra` goes into the manifest.
    """
    abouts = [json.loads(_member(index, "about").tobytes()) for index in indexes]
    domains = sorted({name for about in abouts for name in about["domains"]})
    sources = sorted({name for about in abouts for name in about["sources"]})
    if len(domains) > MAX_DOMAINS:
        raise UserError(f"{len(domains)} domains, such as {domains[0]!r}: at most {MAX_DOMAINS} fit into {directory}")
    local_domains = [np.array([domains.index(name) for name in about["domains"]], np.int64) for about in abouts]
    source_ids = {name: number for number, name in enumerate(sources)}
    local_sources = [np.array([source_ids[name] for name in about["sources"]], np.int64) for about in abouts]

    def parts(column: str) -> Iterable[np.ndarray]:
        base = 0
        for number, index in enumerate(indexes):
            if column == "starts":
                lengths = _member(index, "lengths")
                yield base + np.cumsum(lengths) - lengths
                base += int(lengths.sum())
            elif column == "id_ends":
                ends = _member(index, column)
                yield base + ends
                base += int(ends[-1]) if ends.size else 0
            elif column == "domain_ids":
                yield local_domains[number][_member(index, column)]
            elif column == "source_ids":
                yield local_sources[number][_member(index, column)]
            else:
                yield _member(index, column)

    tables: dict[str, np.ndarray] = {
        "sources": np.frombuffer("".join(sources).encode(), np.uint8),
        "source_ends": np.cumsum([len(name.encode()) for name in sources], dtype=np.int64),
    }
    columns: dict[str, CheckedFile] = {}
    records: dict[str, FileRecord] = {}
    for column, dtype in COLUMNS.items():
        path = directory / "documents" / f"{column}.bin"
        with write_blocks(path) as file:
            for values in [tables[column]] if column in tables else parts(column):
                file.write(np.ascontiguousarray(values, dtype=dtype))
        records[column] = record_of(path, directory)
        columns[column] = CheckedFile(directory, records[column], dtype)
    per_domain = _count(columns, domains)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": "",
        "tokenizer_fingerprint": tokenizer_fingerprint,
        "vocab_size": vocab_size,
        "eos_id": eos_id,
        "num_documents": sum(domain["documents"] for domain in per_domain),
        "num_tokens": sum(domain["tokens"] for domain in per_domain),
        "num_bytes": sum(domain["bytes"] for domain in per_domain),
        "num_sources": len(sources),
        "domains": per_domain,
        "tokens": [about["record"] for about in abouts if about["record"] is not None],
        "documents": records,
        **(extra or {}),
    }
    manifest["fingerprint"] = content_fingerprint(manifest, columns)
    manifest["checksum"] = manifest_checksum(manifest)
    write_json(directory / MANIFEST, manifest)
    return manifest


def _count(columns: dict[str, CheckedFile], domains: list[str]) -> list[dict[str, Any]]:
    """Documents, tokens and bytes of each domain, read in strides so that memory stays bounded."""
    totals = np.zeros((3, len(domains)), np.int64)
    for start in range(0, len(columns["lengths"]), STRIDE):
        stop = min(start + STRIDE, len(columns["lengths"]))
        ids = columns["domain_ids"].view(start, stop)
        totals[0] += np.bincount(ids, minlength=len(domains))
        for row, name in ((1, "lengths"), (2, "num_bytes")):
            np.add.at(totals[row], ids, columns[name].view(start, stop))
    return [
        {"name": name, "documents": documents, "tokens": tokens, "bytes": size}
        for name, (documents, tokens, size) in zip(domains, totals.T.tolist(), strict=True)
    ]


def _member(index: Path, name: str) -> np.ndarray:
    with np.load(index, allow_pickle=False) as members:
        return members[name]


class TokenDocument(NamedTuple):
    """One document that is tokens already, its eos included."""

    tokens: np.ndarray
    domain: str
    source: str = ""
    id: str = ""
    num_bytes: int = 0


def write_shards(
    directory: Path | str,
    documents: Iterable[TokenDocument],
    *,
    tokenizer_fingerprint: str,
    vocab_size: int,
    eos_id: int,
    file_tokens: int = 1 << 28,
) -> None:
    """Write documents that are tokens already as a shard directory; a file ends at `file_tokens` or more tokens."""
    directory = Path(directory)
    indexes: list[Path] = []
    remaining = iter(documents)
    more = True
    while more:
        indexes.append(directory / f"part-{len(indexes):06d}.npz")
        with PartWriter(directory, f"tokens-{len(indexes) - 1:06d}.bin", indexes[-1], vocab_size) as part:
            while part.num_tokens < file_tokens:
                document = next(remaining, None)
                if document is None:
                    more = False
                    break
                content = hashlib.blake2b(np.asarray(document.tokens, "<u4").tobytes(), digest_size=HASH_BYTES).digest()
                part.add_tokens(document.tokens)
                part.end_document(document.domain, document.source, document.id, content, document.num_bytes)
    assemble(directory, indexes, tokenizer_fingerprint=tokenizer_fingerprint, vocab_size=vocab_size, eos_id=eos_id)
    for index in indexes:
        index.unlink()
