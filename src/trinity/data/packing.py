"""The other ways to fill rows, as baselines for `rsdb.py`; like it they drop no token.

concat    documents one after the other, cut wherever a row ends
single    one document to a row, the rest is padding; a longer document goes on in the next row
best-fit  whole documents where they fit, after Ding et al., "Fewer truncations improve language modeling" (2024)
"""

from array import array
from bisect import bisect_right, insort
from math import inf
from typing import Any, Protocol

import numpy as np

from trinity.base.rng import Draws
from trinity.data.rows import Chunk, DocumentStore, copy_chunk
from trinity.data.rsdb import Pool, pack_column, unpack_column


class DocumentSource(Protocol):
    """An order of documents that can be saved; `mixture.DocumentStream` is the real one."""

    def draw(self, count: int) -> list[int]:
        """The next documents, fewer than `count` only when they are used up."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Concat:
    """Documents in the order of the source, cut at the ends of rows; with `several` off a row holds one document."""

    def __init__(self, store: DocumentStore, source: DocumentSource, *, several: bool = True) -> None:
        self._store, self._source, self._several = store, source, several
        self._pool = Pool(store, source.draw, 1)

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        at, chunks = 0, []
        while at < len(tokens_T):
            self._pool.refill()
            if not len(self._pool):
                break
            chunk, is_end = self._pool.take(0, len(tokens_T) - at)
            copy_chunk(self._store, chunk, is_end, at, tokens_T, targets_T)
            chunks.append(chunk)
            at += chunk.length
            if not self._several:
                break
        return chunks

    def state_dict(self) -> dict[str, Any]:
        return {**self._pool.state_dict(), "source": self._source.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._pool.load_state_dict(state)
        self._source.load_state_dict(state["source"])


class BestFit:
    """Whole documents from a pool of `size` to 2 * `size`.

    A row begins with a random document of the pool and is filled up with the longest that still fits, until none does;
    the rest is padding. A document longer than a row fills whole rows until what is left of it fits into one. The paper
    begins each row with the longest document, which on a stream would sort by length.
    """

    def __init__(self, store: DocumentStore, source: DocumentSource, size: int, key: int) -> None:
        assert size >= 1
        self._store, self._source, self._size, self._key = store, source, size, key
        self._pool: list[tuple[int, int, int]] = []  # (tokens left, document, head), sorted
        self._draws = Draws(key)

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        if len(self._pool) <= self._size:
            drawn = self._source.draw(2 * self._size - len(self._pool))
            self._pool.extend((int(self._store.lengths[doc]), doc, 0) for doc in drawn)
            self._pool.sort()
        if not self._pool:
            return []
        at, chunks, place = 0, [], self._draws.below(len(self._pool))
        while place >= 0:
            left, doc, head = self._pool.pop(place)
            chunk = Chunk(doc, head, min(left, len(tokens_T) - at))
            copy_chunk(self._store, chunk, chunk.length == left, at, tokens_T, targets_T)
            chunks.append(chunk)
            at += chunk.length
            if chunk.length < left:
                insort(self._pool, (left - chunk.length, doc, head + chunk.length))
            place = bisect_right(self._pool, (len(tokens_T) - at, inf)) - 1
        return chunks

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": self._draws.position,
            "documents": pack_column(array("q", [doc for _, doc, _ in self._pool])),
            "heads": pack_column(array("q", [head for _, _, head in self._pool])),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        documents, heads = unpack_column(state["documents"]), unpack_column(state["heads"])
        lengths = self._store.lengths[np.asarray(documents)].tolist()
        self._pool = sorted((n - head, doc, head) for n, doc, head in zip(lengths, documents, heads, strict=True))
        self._draws = Draws(self._key, state["draws"])
        self._source.load_state_dict(state["source"])
