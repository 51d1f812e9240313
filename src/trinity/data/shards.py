"""Token shards on disk, read through memory maps.

A shard directory holds

- `tokens-NNNNNN.bin`: the tokens of some documents one after the other, little-endian uint16 (vocabulary <= 65536) or
  uint32;
- `documents/NAME.bin`: one column each of the document index (COLUMNS), in the order of the documents;
- beside each of them NAME.bin.crc: a crc32 for every 64 KiB;
- `manifest.json`: counts, tokenizer, domains, the files with their sizes and checksums, the content's fingerprint, its
  own checksum.

Opening reads the manifest and file sizes. A block is verified when it is first used, so that a damaged byte cannot get
into a batch.
"""

import hashlib
import json
import threading
from bisect import bisect_right
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from trinity.base.errors import UserError
from trinity.base.files import read_json
from trinity.data.blocks import CheckedFile, FileRecord

FORMAT = "trinity-shards"
VERSION = 1
MANIFEST = "manifest.json"
OPEN_MAPS = 256
"""Token files kept mapped at once; a map holds a file descriptor and the usual limit is 1024."""
STRIDE = 1 << 20
"""Documents looked at together where all are looked at, so that memory does not grow with their number."""

COLUMNS: dict[str, str] = {
    "starts": "<i8",  # first token of the document, counted over all token files
    "lengths": "<i8",  # tokens, the final eos included
    "num_bytes": "<i8",  # UTF-8 bytes of the text
    "domain_ids": "<u2",  # number in the manifest's domains
    "source_ids": "<u4",  # number in the table of sources
    "hashes": "V16",  # blake2b of the text, 16 bytes
    "id_ends": "<i8",  # end of the document's id in `ids`
    "ids": "u1",  # UTF-8
    "source_ends": "<i8",  # end of the source's name in `sources`
    "sources": "u1",  # UTF-8
}


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type of the format that holds every token of the vocabulary."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """sha256 of the manifest without its entry `checksum`."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


class Shards:
    """The documents of one shard directory, numbered from 0.

    Tokens and columns are read-only views of memory maps. Raises UserError for a missing, truncated or damaged file,
    with its name and the place. May be used by several threads; pickles as its directory.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.manifest = manifest = _read_manifest(self.directory)
        self.num_documents: int = manifest["num_documents"]
        self.num_tokens: int = manifest["num_tokens"]
        self.domains: list[str] = [domain["name"] for domain in manifest["domains"]]
        self.fingerprint: str = manifest["fingerprint"]
        self.tokenizer_fingerprint: str = manifest["tokenizer_fingerprint"]
        self.vocab_size: int = manifest["vocab_size"]
        self.eos_id: int = manifest["eos_id"]
        self.dtype = token_dtype(self.vocab_size)
        self._files = [CheckedFile(self.directory, FileRecord(*record), self.dtype) for record in manifest["tokens"]]
        self._file_starts: list[int] = np.cumsum([0, *map(len, self._files)]).tolist()
        self._columns = {
            name: CheckedFile(self.directory, FileRecord(*manifest["documents"][name]), dtype)
            for name, dtype in COLUMNS.items()
        }
        self._lock = threading.Lock()
        self._mapped: dict[int, None] = {}  # ordered: the map that was opened first is released first

    @classmethod
    def open(cls, directory: Path | str) -> Self:
        return cls(directory)

    def __reduce__(self) -> tuple[type, tuple[Path]]:
        return type(self), (self.directory,)

    @property
    def lengths(self) -> np.ndarray:
        """[n] int64: tokens of each document, its eos included."""
        return self._lengths

    @cached_property
    def _lengths(self) -> np.ndarray:
        return self._columns["lengths"].whole()

    @property
    def domain_ids(self) -> np.ndarray:
        """[n] uint16: index into `domains`."""
        return self._domain_ids

    @cached_property
    def _domain_ids(self) -> np.ndarray:
        return self._columns["domain_ids"].whole()

    @property
    def source_ids(self) -> np.ndarray:
        """[n] uint32: index into `sources`."""
        return self._source_ids

    @cached_property
    def _source_ids(self) -> np.ndarray:
        return self._columns["source_ids"].whole()

    @cached_property
    def num_bytes(self) -> np.ndarray:
        """[n] int64: UTF-8 bytes of each document's text."""
        return self._columns["num_bytes"].whole()

    @cached_property
    def hashes(self) -> np.ndarray:
        """[n] of 16 bytes: content hash of each document."""
        return self._columns["hashes"].whole()

    @property
    def sources(self) -> list[str]:
        return self._sources

    @cached_property
    def _sources(self) -> list[str]:
        return [self._text("sources", "source_ends", number) for number in range(len(self._columns["source_ends"]))]

    def tokens(self, doc: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Tokens [start, stop) of a document: a read-only view in the type on disk, verified on first use."""
        assert 0 <= doc < self.num_documents, doc
        length = self._columns["lengths"].item(doc)
        stop = length if stop is None else stop
        assert 0 <= start <= stop <= length, (doc, start, stop, length)
        number, begin = self._place(doc)
        if number not in self._mapped:
            self._keep_mapped(number)
        return self._files[number].view(begin + start, begin + stop)

    def describe(self, doc: int) -> dict[str, Any]:
        """Where a document comes from: source, id, domain; offset is its first token's number in the file `file`."""
        assert 0 <= doc < self.num_documents, doc
        number, begin = self._place(doc)
        return {
            "source": self._text("sources", "source_ends", self._columns["source_ids"].item(doc)),
            "id": self._text("ids", "id_ends", doc),
            "domain": self.domains[self._columns["domain_ids"].item(doc)],
            "offset": begin,
            "file": self._files[number].path.name,
            "length": self._columns["lengths"].item(doc),
        }

    def verify(self) -> None:
        """Check every byte; raises UserError for the first failure. `failures` goes on to list them all."""
        for failure in self.failures():
            raise UserError(failure)

    def failures(self) -> Iterator[str]:
        """One sentence for each damaged block, file or count."""
        damaged = False
        for file in (*self._columns.values(), *self._files):
            for failure in file.failures():
                damaged = True
                yield failure
            file.release()
        if damaged:
            return
        if not self._lengths_add_up():
            yield f"{self.directory}: the documents' lengths do not add up to the manifest's {self.num_tokens} tokens"
        elif content_fingerprint(self.manifest, self._columns) != self.fingerprint:
            yield f"{self.directory}: the content does not have the manifest's fingerprint {self.fingerprint}"

    def _lengths_add_up(self) -> bool:
        total = 0
        for first in range(0, self.num_documents, STRIDE):
            lengths = self.lengths[first : first + STRIDE]
            starts = self._columns["starts"].view(first, first + lengths.size)
            if not np.array_equal(starts, total + np.cumsum(lengths) - lengths):
                return False
            total += int(lengths.sum())
        return total == self.num_tokens

    def _place(self, doc: int) -> tuple[int, int]:
        """(token file, first token inside it)."""
        start = self._columns["starts"].item(doc)
        number = bisect_right(self._file_starts, start) - 1
        return number, start - self._file_starts[number]

    def _keep_mapped(self, number: int) -> None:
        with self._lock:
            self._mapped[number] = None
            if len(self._mapped) > OPEN_MAPS:
                oldest = next(iter(self._mapped))
                del self._mapped[oldest]
                self._files[oldest].release()

    def _text(self, text: str, ends: str, index: int) -> str:
        stop = self._columns[ends].item(index)
        start = self._columns[ends].item(index - 1) if index else 0
        return self._columns[text].view(start, stop).tobytes().decode()


def content_fingerprint(manifest: dict[str, Any], columns: dict[str, CheckedFile]) -> str:
    """sha256 of what the documents are, in their order, whatever their number of files, paths and ids."""
    header = [manifest["tokenizer_fingerprint"], manifest["vocab_size"], manifest["eos_id"], manifest["domains"]]
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in ("hashes", "lengths", "domain_ids"):
        column = columns[name]
        for start in range(0, len(column), STRIDE):
            digest.update(column.view(start, min(start + STRIDE, len(column))).view(np.uint8).data)
    return digest.hexdigest()


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    if not path.exists():
        if not directory.is_dir():
            raise UserError(f"there is no directory {directory}; `trinity data prepare` writes shards")
        if (directory / "train" / MANIFEST).exists():
            raise UserError(
                f"{directory} holds two shard directories; name {directory / 'train'} or {directory / 'val'}"
            )
        raise UserError(f"{directory} is no shard directory: it has no {MANIFEST}; `trinity data prepare` writes one")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise UserError(f"{path} is no manifest of token shards")
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} has version {manifest.get('version')}; this program reads version {VERSION}")
    if manifest.get("checksum") != manifest_checksum(manifest):
        raise UserError(f"{path} is damaged: its content does not have the checksum that it states")
    return manifest
