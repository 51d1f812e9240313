"""The Random Sequential Document Buffer of the technical report (arXiv 2602.17004).

A pool of whole tokenised documents, each with a read head. To fill a row: pick a random document of the pool, copy from
its head until the row is full or the document ends, advance the head, and pick again. So a long document is spread over
many rows instead of filling a run of them, and no token is dropped. Exhausted documents leave; when the pool has fallen
to `size` documents it is refilled to twice as many.

With several domains each has a part of the pool, by its share, and each pick is a random document of the domain that is
due (`mixture.py`). Over one undivided pool a pick takes a whole short document but only a row of a long one, so that a
domain of long documents is served far less than its share until the pool is full of them, and a phase begins only when
the last phase's documents are gone.
"""

import math
from array import array
from base64 import b64decode, b64encode
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from trinity.base.rng import Draws, derive
from trinity.data.rows import IGNORE, Chunk, DocumentStore, copy_chunk


class DomainSource(Protocol):
    """Orders of documents by domain that can be saved; `mixture.DocumentStream` is the real one and says more."""

    phase: int

    @property
    def shares(self) -> list[float]: ...
    def pass_length(self, domain: int) -> int: ...
    def key(self, domain: int, length: int) -> float: ...
    def deliver(self, domain: int, length: int) -> None: ...
    def draw_from(self, domain: int, count: int) -> list[int]: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def divide(size: int, source: DomainSource) -> list[int]:
    """Documents of a pool of `size` for each domain, by its share.

    A domain of the phase has at least one and at most half of a pass over it, so that twice as many are a pass at most.
    """
    exact = [size * share for share in source.shares]
    sizes = [max(1, math.floor(part)) if part else 0 for part in exact]
    by_rest = sorted((d for d, part in enumerate(exact) if part), key=lambda d: (sizes[d] - exact[d], d))
    for domain in by_rest[: max(0, size - sum(sizes))]:
        sizes[domain] += 1
    return [min(n, max(1, source.pass_length(d) // 2)) if n else 0 for d, n in enumerate(sizes)]


class Pool:
    """Documents with read heads: three parallel columns of integers, from which a document leaves in O(1)."""

    def __init__(self, store: DocumentStore, draw: Callable[[int], list[int]], size: int) -> None:
        self._store, self._draw, self.size = store, draw, size
        self._put(array("q"), array("q"))

    def _put(self, documents: array, heads: array) -> None:
        self.documents, self.heads = documents, heads
        self.lengths = array("q", self._store.lengths[np.asarray(documents)].tolist())

    def __len__(self) -> int:
        return len(self.documents)

    def refill(self) -> None:
        """Fill up to twice the size, if the pool has fallen to the size."""
        if len(self.documents) > self.size:
            return
        drawn = self._draw(2 * self.size - len(self.documents))
        if drawn:
            self.documents.extend(drawn)
            self.heads.extend([0] * len(drawn))
            self.lengths.extend(self._store.lengths[drawn].tolist())

    def left(self, place: int) -> int:
        """Tokens from the head of the document at `place` to its end."""
        return self.lengths[place] - self.heads[place]

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
        return {"documents": pack_column(self.documents), "heads": pack_column(self.heads)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._put(unpack_column(state["documents"]), unpack_column(state["heads"]))


def pack_column(column: array) -> str:
    """Integers as base64 of little-endian int64."""
    return b64encode(np.asarray(column).astype("<i8").tobytes()).decode()


def unpack_column(text: str) -> array:
    return array("q", np.frombuffer(b64decode(text), "<i8").tolist())


class RSDB:
    """Fills rows from a pool of `size` to 2 * `size` documents, picking by random numbers of `key`."""

    def __init__(self, store: DocumentStore, source: DomainSource, size: int, key: int) -> None:
        assert size >= 1
        self._store, self._source, self._size = store, source, size
        domains = range(len(source.shares))
        self._pools = [Pool(store, lambda count, d=d: source.draw_from(d, count), 0) for d in domains]
        self._draws = [Draws(derive(key, d)) for d in domains]
        self._phase: int | None = None  # whose sizes, places and keys these are
        self._places = [0 for _ in domains]  # of the document that the domain's next chunk comes from
        self._keys = [math.inf for _ in domains]

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        seq_len = len(tokens_T)
        if self._phase != self._source.phase:
            self._phase = self._source.phase
            for domain, size in enumerate(divide(self._size, self._source)):
                self._pools[domain].size = size
                self._pick(domain, seq_len)
        at, chunks = 0, []
        while at < seq_len:
            best = min(self._keys)
            if best == math.inf:
                break
            domain = self._keys.index(best)
            chunk, is_end = self._pools[domain].take(self._places[domain], seq_len - at)
            copy_chunk(self._store, chunk, is_end, at, tokens_T, targets_T)
            chunks.append(chunk)
            at += chunk.length
            self._draws[domain].position += 1
            self._source.deliver(domain, chunk.length)
            self._pick(domain, seq_len)
        return chunks

    def _pick(self, domain: int, seq_len: int) -> None:
        """Choose the document of the domain's next chunk, from the domain's state alone."""
        pool = self._pools[domain]
        self._keys[domain] = math.inf
        if pool.size:
            pool.refill()
            if len(pool):
                place = self._places[domain] = self._draws[domain].peek(len(pool))
                self._keys[domain] = self._source.key(domain, min(pool.left(place), seq_len))

    def state_dict(self) -> dict[str, Any]:
        return {
            "draws": [draws.position for draws in self._draws],
            "pools": [pool.state_dict() for pool in self._pools],
            "source": self._source.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._source.load_state_dict(state["source"])
        for pool, saved in zip(self._pools, state["pools"], strict=True):
            pool.load_state_dict(saved)
        for draws, position in zip(self._draws, state["draws"], strict=True):
            draws.position = position
        self._phase = None


class ReferenceRSDB:
    """The same rows as `RSDB` in one phase, on plain lists of tokens: to compare with, for results and for speed."""

    def __init__(self, store: DocumentStore, source: DomainSource, size: int, key: int) -> None:
        self._store, self._source, self._sizes = store, source, divide(size, source)
        self._pools: list[list[tuple[int, list[int]]]] = [[] for _ in self._sizes]
        self._heads: list[list[int]] = [[] for _ in self._sizes]
        self._draws = [Draws(derive(key, domain)) for domain in range(len(self._sizes))]

    def fill(self, tokens_T: np.ndarray, targets_T: np.ndarray) -> list[Chunk]:
        tokens: list[int] = []
        targets: list[int] = []
        chunks: list[Chunk] = []
        while len(tokens) < len(tokens_T):
            due = []
            for domain, (pool, heads, size) in enumerate(zip(self._pools, self._heads, self._sizes, strict=True)):
                if size and len(pool) <= size:
                    for doc in self._source.draw_from(domain, 2 * size - len(pool)):
                        pool.append((doc, self._store.tokens(doc, 0, int(self._store.lengths[doc])).tolist()))
                        heads.append(0)
                if pool:
                    pick = self._draws[domain].peek(len(pool))
                    left = min(len(pool[pick][1]) - heads[pick], len(tokens_T))
                    due.append((self._source.key(domain, left), domain, pick))
            if not due:
                break
            _, domain, pick = min(due)
            pool, heads = self._pools[domain], self._heads[domain]
            (doc, text), head = pool[pick], heads[pick]
            stop = min(len(text), head + len(tokens_T) - len(tokens))
            tokens += text[head:stop]
            targets += text[head + 1 : stop + 1]
            if stop == len(text):
                targets.append(IGNORE)
                pool[pick], heads[pick] = pool[-1], heads[-1]
                pool.pop()
                heads.pop()
            else:
                heads[pick] = stop
            chunks.append(Chunk(doc, head, stop - head))
            self._draws[domain].below(1)
            self._source.deliver(domain, stop - head)
        tokens_T[: len(tokens)] = tokens
        targets_T[: len(targets)] = targets
        return chunks
