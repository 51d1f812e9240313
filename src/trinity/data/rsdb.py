"""The Random Sequential Document Buffer of the technical report (arXiv 2602.17004).

A pool of whole tokenised documents, each with a read head. To fill a row: pick a random document of the pool, copy from
its head until the row is full or the document ends, advance the head, and pick again. So a long document is spread over
many rows instead of filling a run of them, and no token is dropped. Exhausted documents leave; when the pool has fallen
to `size` documents it is refilled to twice as many.
"""

from array import array
from base64 import b64decode, b64encode
from typing import Any, Protocol

import numpy as np

from trinity.base.rng import Draws
from trinity.data.rows import IGNORE, Chunk, DocumentStore, copy_chunk


class DocumentSource(Protocol):
    """An order of documents that can be saved; `mixture.DocumentStream` is the real one."""

    def draw(self, count: int) -> list[int]:
        """The next documents, fewer than `count` only when they are used up."""
        ...

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Pool:
    """Documents with read heads: three parallel columns of integers, from which a document leaves in O(1)."""

    def __init__(self, store: DocumentStore, source: DocumentSource, size: int) -> None:
        assert size >= 1
        self._store, self._source, self._size = store, source, size
        self._put(array("q"), array("q"))

    def _put(self, documents: array, heads: array) -> None:
        self.documents, self.heads = documents, heads
        self.lengths = array("q", self._store.lengths[np.asarray(documents)].tolist())

    def __len__(self) -> int:
        return len(self.documents)

    def refill(self) -> None:
        """Fill up to twice the size, if the pool has fallen to the size."""
        if len(self.documents) > self._size:
            return
        drawn = self._source.draw(2 * self._size - len(self.documents))
        if drawn:
            self.documents.extend(drawn)
            self.heads.extend([0] * len(drawn))
            self.lengths.extend(self._store.lengths[drawn].tolist())

    def take(self, place: int, most: int) -> tuple[Chunk, bool]:
        """Up to `most` tokens from the head of the document at `place`, and whether they end it (it has left then)."""
        document, head = self.documents[place], self.heads[place]
        left = self.lengths[place] - head
        if left > most:
            self.heads[place] = head + most
            return Chunk(document, head, most), False
        for column in (self.documents, self.heads, self.lengths):
            last = column.pop()
            if place < len(column):
                column[place] = last
        return Chunk(document, head, left), True

    def state_dict(self) -> dict[str, Any]:
        """Document numbers and heads as base64 of little-endian int64: 22 bytes of JSON per document."""
        return {
            "documents": pack_column(self.documents),
            "heads": pack_column(self.heads),
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._put(unpack_column(state["documents"]), unpack_column(state["heads"]))
        self._source.load_state_dict(state["source"])


def pack_column(column: array) -> str:
    """Integers as base64 of little-endian int64."""
    return b64encode(np.asarray(column).astype("<i8").tobytes()).decode()


def unpack_column(text: str) -> array:
    return array("q", np.frombuffer(b64decode(text), "<i8").tolist())


class RSDB:
    """Fills rows from a pool of `size` to 2 * `size` documents, picking by random numbers of `key`."""

    def __init__(self, store: DocumentStore, source: DocumentSource, size: int, key: int) -> None:
        self._store, self._key = store, key
        self._pool = Pool(store, source, size)
        self._draws = Draws(key)

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        pool, at, chunks = self._pool, 0, []
        while at < len(tokens_T):
            pool.refill()
            if not len(pool):
                break
            chunk, is_end = pool.take(self._draws.below(len(pool)), len(tokens_T) - at)
            copy_chunk(self._store, chunk, is_end, at, tokens_T, targets_T)
            chunks.append(chunk)
            at += chunk.length
        return chunks

    def state_dict(self) -> dict[str, Any]:
        return {"draws": self._draws.position, **self._pool.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._draws = Draws(self._key, state["draws"])
        self._pool.load_state_dict(state)


class ReferenceRSDB:
    """The same rows as `RSDB` on plain lists of tokens: what to compare with, for results and for speed."""

    def __init__(self, store: DocumentStore, source: DocumentSource, size: int, key: int) -> None:
        self._store, self._source, self._size, self._draws = store, source, size, Draws(key)
        self._pool: list[tuple[int, list[int]]] = []
        self._heads: list[int] = []

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        tokens: list[int] = []
        targets: list[int] = []
        chunks: list[Chunk] = []
        while len(tokens) < len(tokens_T):
            if len(self._pool) <= self._size:
                for doc in self._source.draw(2 * self._size - len(self._pool)):
                    self._pool.append((doc, self._store.tokens(doc, 0, int(self._store.lengths[doc])).tolist()))
                    self._heads.append(0)
            if not self._pool:
                break
            pick = self._draws.below(len(self._pool))
            (doc, text), head = self._pool[pick], self._heads[pick]
            stop = min(len(text), head + len(tokens_T) - len(tokens))
            tokens += text[head:stop]
            targets += text[head + 1 : stop + 1]
            if stop == len(text):
                targets.append(IGNORE)
                self._pool[pick], self._heads[pick] = self._pool[-1], self._heads[-1]
                self._pool.pop()
                self._heads.pop()
            else:
                self._heads[pick] = stop
            chunks.append(Chunk(doc, head, stop - head))
        tokens_T[: len(tokens)] = tokens
        targets_T[: len(targets)] = targets
        return chunks
